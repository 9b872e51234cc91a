package runners

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pipeops/vm-agent/proxy/answer"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// Limits of a command.
const (
	HeaderTimeout  = 30 * time.Second // from the command's last byte to the answer's headers
	CommandTimeout = 5 * time.Minute  // from the command's headers to the end of the answer
	MaxCommands    = 32               // that are relayed at a time

	maxEndpoint      = 2 << 10  // bytes
	maxCommand       = 10 << 20 // bytes
	maxAnswer        = 64 << 20 // bytes; the rest is cut off
	maxAnswerHeaders = 16 << 10 // bytes
)

// Relay answers a command for the runner id with that runner's answer. body is the request's, nil if it has none.
func (r *Runners) Relay(w http.ResponseWriter, req *http.Request, id string, body *kube.Body) {
	if !idPattern.MatchString(id) {
		answer.WriteProblem(w, http.StatusBadRequest, "invalid runner id: give "+validID)
		return
	}
	via := "1.1 " + r.config.Agent.ID
	if slices.Contains(kube.ListOf(req, "Via"), via) {
		answer.WriteProblem(w, http.StatusLoopDetected,
			fmt.Sprintf("the endpoint of runner %q leads back to this agent: assign it another one", id))
		return
	}
	select {
	case r.running <- struct{}{}:
		defer func() { <-r.running }()
	default:
		r.refused()
		w.Header().Set("Retry-After", "1")
		answer.WriteProblem(w, http.StatusTooManyRequests, "too many commands are being relayed: try again")
		return
	}
	body.Within(CommandTimeout)
	ctx, cancel := context.WithTimeout(req.Context(), CommandTimeout)
	defer cancel()
	reading, cancelReading := context.WithTimeout(ctx, RegistryTimeout)
	defer cancelReading()
	found, err := r.find(reading, id)
	if err != nil {
		WriteError(reading, w, err)
		return
	}
	if found == nil {
		answer.WriteProblem(w, http.StatusNotFound,
			fmt.Sprintf("no runner %q is assigned to this agent: send it a runner_assigned message", id))
		return
	}
	endpoint, err := r.checkEndpoint(found.Endpoint) // again: the setting may have changed since the assignment
	if err != nil {
		answer.WriteProblem(w, http.StatusBadGateway, "the runner's endpoint "+err.Error())
		return
	}
	endpoint.RawQuery = strings.Trim(endpoint.RawQuery+"&"+req.URL.RawQuery, "&")
	c := &command{host: endpoint.Host, body: body}
	trace := &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { c.connected = true }}
	req = req.WithContext(httptrace.WithClientTrace(ctx, trace))
	req.Body = http.MaxBytesReader(w, req.Body, maxCommand)
	relay := &httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL, pr.Out.Host = endpoint, ""
			kube.RemoveCaller(pr.Out.Header)
			for _, name := range []string{"Upgrade", "Connection", "Sec-Websocket-Protocol"} {
				pr.Out.Header.Del(name)
			}
			pr.Out.Header.Add("Via", via)
			pr.Out.Header.Set("Authorization", "Bearer "+found.Token.Reveal()) // in place of the caller's
		},
		Transport: r.Transport, ModifyResponse: checkAnswer, ErrorHandler: c.fail,
		FlushInterval: -1, // answers may be streams
		ErrorLog:      slog.NewLogLogger(r.log.Handler(), slog.LevelDebug),
	}
	relay.ServeHTTP(w, req)
}

// checkAnswer refuses invalid statuses and limits the body. Beyond the limit reading fails, so that a cut answer does
// not look complete.
func checkAnswer(resp *http.Response) error {
	if resp.StatusCode < 200 || resp.StatusCode > 599 {
		return fmt.Errorf("its status is %d", resp.StatusCode)
	}
	resp.Body = http.MaxBytesReader(nil, resp.Body, maxAnswer)
	return nil
}

// command is a command that is being relayed.
type command struct {
	host      string // of the runner's endpoint
	body      *kube.Body
	connected bool // the runner may have received part of the command
}

// fail answers for a runner that gave no valid answer. out is the request as rewritten.
func (c *command) fail(w http.ResponseWriter, out *http.Request, err error) {
	code, what := http.StatusBadGateway, "broke off or gave no valid answer"
	do := "it may have done the command: check its log"
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		code, what = http.StatusGatewayTimeout, "does not answer"
	}
	ended, _ := errors.AsType[*kube.Ended](context.Cause(out.Context()))
	_, tooLarge := errors.AsType[*http.MaxBytesError](err)
	cause, unread := context.Cause(out.Context()), c.body.Failure()
	switch {
	case tooLarge:
		why := fmt.Sprintf("the command is larger than %d bytes", maxCommand)
		answer.WriteProblem(w, http.StatusRequestEntityTooLarge, why)
		return
	case errors.Is(cause, context.Canceled) && !errors.Is(unread, os.ErrDeadlineExceeded):
		panic(http.ErrAbortHandler) // the caller has gone
	case unread != nil:
		answer.WriteBodyError(w, unread, CommandTimeout)
		return
	case ended != nil:
		code, what, err = http.StatusForbidden, "has not answered", ended
	case errors.Is(cause, kube.ErrShutdown):
		code, what, err = http.StatusGatewayTimeout, "has not answered", errors.New("the agent has stopped")
	case errors.Is(err, errForbiddenAddress):
		what, do = "is not called", "give the runner an endpoint in the cluster, or add its IP to runners.allowed_hosts"
	case !c.connected:
		what, do = "cannot be reached", "check that it runs, and its endpoint"
	}
	answer.WriteProblem(w, code, fmt.Sprintf("the runner at %s %s: %v: %s", c.host, what, err, do))
}

// namePattern matches DNS names. The last label begins with a letter: some resolvers would read any other name as an
// IP.
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
	if !r.allows(host, ip) {
		return nil, fmt.Errorf("names the host %.253q, which is not among runners.allowed_hosts (%s)",
			host, strings.Join(r.config.Runners.AllowedHosts, ", "))
	}
	return u, nil
}

// allows reports whether the allowed hosts name the host. An ip is compared as an address, be it written as IPv4 or
// mapped to IPv6, and belongs to no domain.
func (r *Runners) allows(host string, ip netip.Addr) bool {
	return slices.ContainsFunc(r.config.Runners.AllowedHosts, func(allowed string) bool {
		if ip.IsValid() {
			addr, err := netip.ParseAddr(allowed)
			return err == nil && addr.Unmap() == ip.Unmap()
		}
		domain, wildcard := strings.CutPrefix(allowed, "*")
		return host == allowed || wildcard && strings.HasSuffix(host, domain)
	})
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
	if internal && !r.allows("", ip) {
		return fmt.Errorf("%w (%s)", errForbiddenAddress, ip)
	}
	return nil
}
