package lease

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/controlplane"
	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/secret"
)

// publicRoots returns the public authorities of this host, PEM. Source: crypto/x509/root_linux.go.
func publicRoots() ([]byte, error) {
	for _, file := range []string{
		os.Getenv("SSL_CERT_FILE"), "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
		"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/cert.pem",
	} {
		if roots, err := os.ReadFile(file); err == nil { //nolint:gosec // a file that Go trusts, too
			return roots, nil
		}
	}
	return nil, errors.New("this host has no list of public authorities to verify frps by: set frp.tls.ca_file (PIPEOPS_FRP_TLS_CA_FILE), or accept any certificate with frp.tls.insecure_skip_verify (PIPEOPS_FRP_TLS_INSECURE_SKIP_VERIFY)")
}

// isLocal reports whether a host is this one, or one that no router leads to, such as the cloud's metadata service.
func isLocal(host string) bool {
	ip := net.ParseIP(host)
	return strings.HasSuffix("."+strings.ToLower(host), ".localhost") ||
		ip != nil && (ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsUnspecified() || ip.IsMulticast())
}

// newLease joins the configuration and the control plane's answer; the answer wins. admin is what frpc was told
// before, if it was: it may still run. What admin leaves out is made up.
func newLease(cfg *config.Config, answer controlplane.Answer, admin frpc.Admin) (_ frpc.Lease, err error) {
	defer func() {
		if token, tokenErr := cfg.Agent.CurrentToken(); err != nil && tokenErr == nil { // the answer may repeat it
			err = token.RedactIn(err)
		}
	}()
	answer.AuthMethod = cmp.Or(answer.AuthMethod, "token")
	if answer.AuthMethod != "token" && answer.AuthMethod != "oidc" {
		return frpc.Lease{}, fmt.Errorf("the control plane's lease has auth_method %.100q, which this version does not know: update the agent", answer.AuthMethod)
	}
	name := cfg.Agent.ID + "." + cfg.Agent.Instance
	tunnel, configured := answer.Tunnel, cfg.FRP.Tunnel
	tunnel.Type = cmp.Or(tunnel.Type, configured.Type)
	if (tunnel.Type == "tcp") == (configured.Type == "tcp") {
		if tunnel.Subdomain == "" && len(tunnel.CustomDomains) == 0 {
			tunnel.Subdomain, tunnel.CustomDomains = configured.Subdomain, configured.CustomDomains
		}
		tunnel.RemotePort = cmp.Or(tunnel.RemotePort, configured.RemotePort)
	}
	tunnel.LocalIP, tunnel.LocalPort = configured.LocalIP, configured.LocalPort
	if !slices.Contains([]string{"http", "https", "tcp"}, tunnel.Type) {
		return frpc.Lease{}, fmt.Errorf("the control plane's lease has a tunnel of type %.100q, which this version does not know: update the agent", tunnel.Type)
	}
	if configured.Type == "https" && tunnel.Type != "https" && cfg.FRP.TypeConfigured { // else write warns
		return frpc.Lease{}, fmt.Errorf("the control plane's lease has a tunnel of type %s, but frp.tunnel.type (PIPEOPS_FRP_TUNNEL_TYPE) is https: have the control plane give https, or change the setting if others may read what passes", tunnel.Type)
	}
	// frpc takes no key that is not the type's.
	if tunnel.Type == "tcp" {
		tunnel.Subdomain, tunnel.CustomDomains = "", nil
	} else {
		tunnel.RemotePort = 0
	}
	for _, host := range slices.Concat([]string{answer.ServerAddr, tunnel.Subdomain}, tunnel.CustomDomains) {
		if host != "" && (!config.IsHost(host) || host != answer.ServerAddr && net.ParseIP(host) != nil) {
			return frpc.Lease{}, fmt.Errorf("the control plane's lease names the host %.100q, which is none: tell those who run it", host)
		}
	}
	if isLocal(answer.ServerAddr) && !strings.EqualFold(answer.ServerAddr, cfg.FRP.ServerAddr) {
		return frpc.Lease{}, fmt.Errorf("the control plane's lease names %q as frps, which is not another host: tell those who run it, or set frp.server_addr (PIPEOPS_FRP_SERVER_ADDR) to the same if frps does run there", answer.ServerAddr)
	}
	for _, port := range []int{answer.ServerPort, tunnel.RemotePort} {
		if port < 0 || port > 65535 {
			return frpc.Lease{}, fmt.Errorf("the control plane's lease has port %d, which is none: tell those who run it", port)
		}
	}
	tunnel.Name, tunnel.HealthPath = name, agentapi.TunnelHealthPath
	admin = frpc.Admin{
		Port: cmp.Or(admin.Port, cfg.FRP.AdminPort), User: cmp.Or(admin.User, adminUser), Password: cmp.Or(admin.Password, secret.Secret(rand.Text())),
	}
	lease := frpc.Lease{
		IssuedAt:    time.Now().UTC().Truncate(time.Second),
		ExpiresAt:   answer.Ends,
		Permissions: answer.Permissions,
		Frpc: frpc.Config{
			ServerAddr: cmp.Or(answer.ServerAddr, cfg.FRP.ServerAddr),
			ServerPort: cmp.Or(answer.ServerPort, cfg.FRP.ServerPort),
			User:       answer.User,
			ClientID:   name,
			Protocol:   cfg.FRP.Protocol,
			ProxyURL:   cfg.FRP.ProxyURL,
			TLS:        cfg.FRP.TLS,
			AuthMethod: answer.AuthMethod,
			Token:      answer.FRPToken,
			Metadatas:  answer.Metadatas,
			LogLevel:   cmp.Or(map[string]string{"debug": "debug", "error": "error"}[cfg.Logging.Level], "warn"), // info has two lines for each look at it
			Admin:      admin,
			Tunnel:     tunnel,
		},
	}
	if tls := &lease.Frpc.TLS; tls.CAFile == "" && !tls.InsecureSkipVerify {
		if lease.Roots, err = publicRoots(); err != nil {
			return frpc.Lease{}, err
		}
		tls.CAFile = filepath.Join(cfg.RunDir, frpc.RootsFile)
	}
	if answer.AuthMethod == "oidc" {
		lease.Frpc.TokenFile = filepath.Join(cfg.RunDir, frpc.TokenFile)
	}
	return lease, nil
}
