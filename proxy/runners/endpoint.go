package runners

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

const maxEndpoint = 2 << 10 // bytes

// namePattern matches DNS names. The last label begins with a letter: some resolvers would read the rest as an IP.
var namePattern = regexp.MustCompile(`^([a-z0-9_-]+\.)*[a-z][a-z0-9_-]*$`)

// checkEndpoint returns the endpoint parsed, or why it may not be used. It refuses whatever the dialer could take for
// another host than the one compared here, such as an IP with a zone.
func (r *Runners) checkEndpoint(endpoint string) (*url.URL, error) {
	if len(endpoint) > maxEndpoint {
		return nil, fmt.Errorf("is longer than %d bytes", maxEndpoint)
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.Fragment != "" {
		return nil, errors.New("is not an http or https URL without user and fragment")
	}
	if port, err := strconv.ParseUint(u.Port(), 10, 16); u.Port() != "" && (err != nil || port == 0) {
		return nil, errors.New("names a port that is not among 1 to 65535")
	}
	host := strings.ToLower(u.Hostname())
	ip, err := netip.ParseAddr(host)
	if err != nil {
		host = strings.TrimSuffix(host, ".")
	}
	if ip.Zone() != "" || err != nil && !namePattern.MatchString(host) {
		return nil, fmt.Errorf("names the host %.253q, which is neither a DNS name nor an IP", host)
	}
	if !slices.ContainsFunc(r.config.AllowedHosts, func(allowed string) bool {
		if ip.IsValid() { // compared as an address: it has many notations, and belongs to no domain
			return isIP(allowed, ip)
		}
		domain, wildcard := strings.CutPrefix(allowed, "*")
		return host == allowed || wildcard && strings.HasSuffix(host, domain)
	}) {
		return nil, fmt.Errorf("names the host %.253q, which is not among runners.allowed_hosts (%s)",
			host, strings.Join(r.config.AllowedHosts, ", "))
	}
	return u, nil
}

// isIP reports whether text is the address ip, be it written as IPv4 or mapped to IPv6.
func isIP(text string, ip netip.Addr) bool {
	addr, err := netip.ParseAddr(text)
	return err == nil && addr.Unmap() == ip.Unmap()
}

var errForbiddenAddress = errors.New("its name resolves to loopback, a link-local address or a cloud's metadata")

// metadataAddrs are where clouds give machines their credentials, beside the link-local 169.254.169.254.
var metadataAddrs = []string{
	"fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "fd00:c1::a9fe:a9fe",
	"100.100.100.200", "192.0.0.192", "168.63.129.16",
}

// checkAddress refuses addresses that an allowed name must not resolve to, for example through an ExternalName Service,
// unless the address itself is among the allowed hosts. The dialer calls it after the name is resolved.
func (r *Runners) checkAddress(_ context.Context, _, address string, _ syscall.RawConn) error {
	addr, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	ip := addr.Addr().Unmap().WithZone("")
	internal := ip.IsLoopback() || ip.IsUnspecified() || ip.IsLinkLocalUnicast() || ip.IsMulticast() ||
		slices.Contains(metadataAddrs, ip.String())
	if internal && !slices.ContainsFunc(r.config.AllowedHosts, func(allowed string) bool { return isIP(allowed, ip) }) {
		return fmt.Errorf("%w (%s)", errForbiddenAddress, ip)
	}
	return nil
}
