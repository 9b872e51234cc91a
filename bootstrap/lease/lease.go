// Package lease gets leases for the tunnel, writes them for frpc and the proxy, and renews them.
package lease

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/controlplane"
	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/secret"
)

// Run gets a lease, writes its files, and unless once is set renews it until ctx ends. It fails if there is no lease
// after timeout, and if the control plane no longer wants the agent.
func Run(ctx context.Context, cfg *config.Config, timeout time.Duration, once bool, log *slog.Logger) error {
	release, err := lock(cfg.RunDir)
	if err != nil {
		return err
	}
	defer release()
	stuck := filepath.Join(cfg.RunDir, frpc.StuckFile)
	_ = os.Remove(stuck) // left by a bootstrap that was killed
	defer func() { _ = os.Remove(stuck) }()
	if warning := cfg.Agent.TokenWarning(); warning != "" {
		log.Warn(warning)
	}
	if cfg.FRP.TLS.InsecureSkipVerify {
		log.Warn("frpc does not verify frps", "reason", config.Name("frp.tls.insecure_skip_verify")+" is set",
			"consequence", "whoever can redirect the connection gets the agent's credential")
	}
	client, err := controlplane.New(cfg)
	if err != nil {
		return err
	}
	r := &renewer{cfg: cfg, issue: client.RequestLease, login: frpc.Login, log: log, backoff: backoffMin}
	toml, _ := os.ReadFile(filepath.Join(cfg.RunDir, frpc.ConfigFile)) // empty: there is none
	old, readErr := Read(cfg.RunDir)
	if readErr == nil && !once {
		// This container was restarted. frpc may run with these files, so they stay until there is a new lease.
		r.lease, r.renewAt = *old, time.Now()
		markStale(&r.lease, toml)
		return r.run(ctx)
	}
	// frpc may still run with older files, of which some are missing or broken.
	admin := frpc.Admin{Port: cfg.FRP.AdminPort, User: adminUser, Password: frpc.AdminPassword(toml)}
	if old != nil {
		admin = old.Frpc.Admin
	}
	if r.token, err = r.credential(); err != nil {
		return err
	}
	first, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r.lease.Frpc.Admin.Password = admin.Password
	lease, fail := requestLease(first, cfg, retryUntilLease(r.issue, log), r.lease)
	if fail != nil {
		noTunnel := old == nil && admin.Password == "" && errors.Is(readErr, fs.ErrNotExist)
		if fail.Revoked && !noTunnel {
			return closeTunnel(ctx, cfg.RunDir, admin, fail)
		}
		return fail
	}
	markStale(&lease, toml)
	if err := write(cfg, lease, log); err != nil || once {
		return err
	}
	r.adopt(lease, time.Now())
	return r.run(ctx)
}

// issuer is [controlplane.Client.RequestLease], or one that retries it.
type issuer func(ctx context.Context, certificate []byte) (controlplane.Answer, *controlplane.Failure)

// Try requests a lease and writes nothing. It shows the certificate that is in use, because the control plane would
// trust another one in its place.
func Try(ctx context.Context, cfg *config.Config) (frpc.Lease, error) {
	client, err := controlplane.New(cfg)
	if err != nil {
		return frpc.Lease{}, err
	}
	current, _ := Read(cfg.RunDir) // there may be none
	answer, fail := client.RequestLease(ctx, cmp.Or(current, &frpc.Lease{}).Certificate)
	if fail != nil {
		return frpc.Lease{}, fail
	}
	return newLease(cfg, answer, frpc.Admin{})
}

// requestLease returns a new lease; for a tunnel of type https, the issuer has seen its certificate. What that holds
// depends on the lease: so the first request shows one made for the last lease, and if need be a second one that fits.
func requestLease(
	ctx context.Context, cfg *config.Config, issue issuer, last frpc.Lease,
) (frpc.Lease, *controlplane.Failure) {
	fail := func(err error) (frpc.Lease, *controlplane.Failure) {
		return frpc.Lease{}, &controlplane.Failure{Err: err, Final: true}
	}
	tunnel, end := last.Frpc.Tunnel, time.Time{}
	switch {
	case tunnel.Type == "": // the first
		tunnel, end = cfg.FRP.Tunnel, time.Now().Add(24*time.Hour)
	case !last.ExpiresAt.IsZero():
		end = time.Now().Add(last.ExpiresAt.Sub(last.IssuedAt))
	}
	for range 3 {
		var shown, key []byte
		var err error
		names := certificateNames(cfg.Agent.ID, tunnel)
		if tunnel.Type == "https" {
			if shown, key, err = newCertificate(names, end); err != nil {
				return fail(fmt.Errorf("make the tunnel's certificate: %w", err))
			}
		}
		answer, refusal := issue(ctx, shown)
		if refusal != nil {
			return frpc.Lease{}, refusal
		}
		lease, err := newLease(cfg, answer, last.Frpc.Admin)
		if err != nil {
			return fail(err)
		}
		tunnel = lease.Frpc.Tunnel
		if tunnel.Type != "https" {
			return lease, nil
		}
		sameNames := slices.Equal(names, certificateNames(cfg.Agent.ID, tunnel))
		if shown != nil && sameNames && sameEnd(end, answer.ExpiresAt) {
			lease.Certificate, lease.Key = shown, key
			return lease, nil
		}
		end = answer.ExpiresAt
	}
	return fail(errors.New("the control plane's lease has another tunnel or another end each time: contact its operator"))
}

// A certificate outlives the lease that it was made for by grace, and fits leases that end within tolerance.
const grace, tolerance = 330 * time.Second, 270 * time.Second

// newCertificate makes what the proxy shows to callers of a tunnel of type https, PEM, for a lease that expires at end;
// zero: never. The first name is the agent's id. The certificate is self-signed: the control plane gets it with the
// request for the lease, and trusts no other. The key never leaves the run directory.
func newCertificate(names []string, end time.Time) (certificate, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	notAfter := end.Add(grace)
	if end.IsZero() {
		notAfter = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) // never, by RFC 5280, 4.1.2.5
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: notAfter, // clocks differ
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return certificate, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), err
}

// certificateNames returns the names that callers may ask for: the agent's id and the tunnel's domains.
func certificateNames(agentID string, tunnel frpc.Tunnel) []string {
	names := append([]string{agentID, tunnel.Subdomain}, tunnel.CustomDomains...)
	return slices.Compact(slices.DeleteFunc(names, func(name string) bool { return name == "" }))
}

// sameEnd reports whether a certificate for a lease that expires at end is as good for one that expires at other.
func sameEnd(end, other time.Time) bool {
	return end.Equal(other) || !end.IsZero() && !other.IsZero() && end.Sub(other).Abs() <= tolerance
}

// retryUntilLease returns an issuer that retries until there is a lease, the failure is final, or ctx ends.
func retryUntilLease(issue issuer, log *slog.Logger) issuer {
	return func(ctx context.Context, certificate []byte) (controlplane.Answer, *controlplane.Failure) {
		for delay := time.Second; ; delay = min(2*delay, 30*time.Second) {
			answer, fail := issue(ctx, certificate)
			if fail == nil || fail.Final {
				return answer, fail
			}
			wait := max(jitter(delay), fail.RetryAfter)
			if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < wait {
				return answer, &controlplane.Failure{Err: fmt.Errorf("%w (gave up after --timeout)", fail)}
			}
			log.Warn("no lease yet", "error", fail, "next_attempt_in", wait.String())
			select {
			case <-time.After(wait):
			case <-ctx.Done(): // by a signal: the deadline is later
				return answer, &controlplane.Failure{Err: errors.New("stopped by a signal before there was a lease")}
			}
		}
	}
}

// jitter returns a random duration around d, so that agents which failed together do not retry together.
func jitter(d time.Duration) time.Duration {
	return d/2 + mathrand.N(max(d, 1)) //nolint:gosec // no secret
}

const adminUser = "pipeops" // who bootstrap and the proxy are for frpc's admin API

// newLease joins the configuration and the control plane's answer; the answer wins. admin is the admin API of the last
// lease, if any, because frpc may still run with it; what admin leaves out gets a default, the password a random one.
func newLease(cfg *config.Config, answer controlplane.Answer, admin frpc.Admin) (frpc.Lease, error) {
	tunnel := joinTunnel(cfg, answer.Tunnel)
	err := check(cfg, answer, tunnel)
	if err != nil {
		token, _ := cfg.Agent.CurrentToken() // the answer may repeat it
		return frpc.Lease{}, token.RedactIn(fmt.Errorf("the control plane's lease %w", err))
	}
	lease := frpc.Lease{
		IssuedAt: time.Now().UTC().Truncate(time.Second), ExpiresAt: answer.Ends, Permissions: answer.Permissions,
		Frpc: frpc.Config{
			ServerAddr: cmp.Or(answer.ServerAddr, cfg.FRP.ServerAddr),
			ServerPort: cmp.Or(answer.ServerPort, cfg.FRP.ServerPort),
			Protocol:   cfg.FRP.Protocol, ProxyURL: cfg.FRP.ProxyURL, TLS: cfg.FRP.TLS,
			AuthMethod: cmp.Or(answer.AuthMethod, "token"), Token: answer.FRPToken,
			User: answer.User, ClientID: tunnel.Name, Metadatas: answer.Metadatas,
			// At level info frpc logs two lines for each request to its admin API.
			LogLevel: cmp.Or(map[string]string{"debug": "debug", "error": "error"}[cfg.Logging.Level], "warn"),
			Admin: frpc.Admin{
				Port: cmp.Or(admin.Port, cfg.FRP.AdminPort), User: cmp.Or(admin.User, adminUser),
				Password: cmp.Or(admin.Password, secret.Secret(rand.Text())),
			},
			Tunnel: tunnel,
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

// joinTunnel returns the tunnel that the control plane granted, completed by the configured one.
func joinTunnel(cfg *config.Config, tunnel frpc.Tunnel) frpc.Tunnel {
	configured := cfg.FRP.Tunnel
	tunnel.Name, tunnel.HealthPath = cfg.Agent.ID+"."+cfg.Agent.Instance, agentapi.TunnelHealthPath
	tunnel.LocalIP, tunnel.LocalPort = configured.LocalIP, configured.LocalPort
	tunnel.Type = cmp.Or(tunnel.Type, configured.Type)
	if tunnel.Type == "tcp" { // frpc refuses keys that do not belong to the type
		tunnel.Subdomain, tunnel.CustomDomains = "", nil
		tunnel.RemotePort = cmp.Or(tunnel.RemotePort, configured.RemotePort)
	} else {
		tunnel.RemotePort = 0
		if tunnel.Subdomain == "" && len(tunnel.CustomDomains) == 0 {
			tunnel.Subdomain, tunnel.CustomDomains = configured.Subdomain, configured.CustomDomains
		}
	}
	return tunnel
}

// check returns what is wrong with the control plane's answer, as the predicate of a sentence. tunnel is its tunnel.
func check(cfg *config.Config, answer controlplane.Answer, tunnel frpc.Tunnel) error {
	for _, host := range slices.Concat([]string{answer.ServerAddr, tunnel.Subdomain}, tunnel.CustomDomains) {
		if host != "" && (!config.IsHost(host) || host != answer.ServerAddr && net.ParseIP(host) != nil) {
			return fmt.Errorf("has the invalid host %.100q: contact the control plane's operator", host)
		}
	}
	for _, port := range []int{answer.ServerPort, tunnel.RemotePort} {
		if port < 0 || port > 65535 {
			return fmt.Errorf("has the invalid port %d: contact the control plane's operator", port)
		}
	}
	switch {
	case !slices.Contains([]string{"", "token", "oidc"}, answer.AuthMethod):
		return fmt.Errorf("has auth_method %.100q, which this version does not know: update the agent", answer.AuthMethod)
	case !slices.Contains([]string{"http", "https", "tcp"}, tunnel.Type):
		return fmt.Errorf("has a tunnel of type %.100q, which this version does not know: update the agent", tunnel.Type)
	case cfg.FRP.Tunnel.Type == "https" && tunnel.Type != "https" && cfg.FRP.TypeConfigured: // else write only warns
		return fmt.Errorf("has a tunnel of type %s, but %s is https: have the control plane give https, "+
			"or change the setting if others may read the traffic", tunnel.Type, config.Name("frp.tunnel.type"))
	case isLocal(answer.ServerAddr) && !strings.EqualFold(answer.ServerAddr, cfg.FRP.ServerAddr):
		return fmt.Errorf("names %q as frps, which is this host or a link-local address: contact the control plane's "+
			"operator, or set %s to the same if frps does run there", answer.ServerAddr, config.Name("frp.server_addr"))
	}
	return nil
}

// isLocal reports whether host is this host, or one that is not routed to, such as the cloud's metadata service.
func isLocal(host string) bool {
	ip := net.ParseIP(host)
	return strings.HasSuffix("."+strings.ToLower(host), ".localhost") ||
		ip != nil && (ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsUnspecified() || ip.IsMulticast())
}

// publicRoots returns the public authorities of this host, PEM. Source: crypto/x509/root_linux.go.
func publicRoots() ([]byte, error) {
	for _, file := range []string{
		os.Getenv("SSL_CERT_FILE"), "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt",
		"/etc/ssl/ca-bundle.pem", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/cert.pem",
	} {
		if roots, err := os.ReadFile(file); err == nil { //nolint:gosec // a file that Go trusts, too
			return roots, nil
		}
	}
	return nil, fmt.Errorf("this host has no list of public authorities to verify frps by: set %s, "+
		"or accept any certificate with %s", config.Name("frp.tls.ca_file"), config.Name("frp.tls.insecure_skip_verify"))
}

// lock locks the run directory until release is called or the process ends, because two processes that write there
// would replace each other's password of frpc. It locks the directory itself: a file in it could be removed.
func lock(runDir string) (release func(), err error) {
	dir, err := os.Open(runDir)
	if err != nil {
		return nil, fmt.Errorf("open the run directory: %w: check %s and its volume", err, config.Name("run_dir"))
	}
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = dir.Close()
		return nil, fmt.Errorf("lock the run directory %s: %w: another bootstrap uses it, stop that one first", runDir, err)
	}
	return func() { _ = dir.Close() }, nil
}

// Read returns the lease in the run directory. It fails unless all of the lease's files are there. The lease is nil if
// lease.json is missing or broken.
func Read(runDir string) (*frpc.Lease, error) {
	lease, err := frpc.ReadLease(runDir)
	if err != nil {
		return nil, err
	}
	lease.Frpc.Tunnel.HealthPath = agentapi.TunnelHealthPath // one of another version may lack it
	read := func(name string, needed bool) (data []byte) {
		if needed && err == nil {
			data, err = os.ReadFile(filepath.Join(runDir, name))
		}
		return data
	}
	https := lease.Frpc.Tunnel.Type == "https"
	read(frpc.ConfigFile, true)
	lease.Roots = read(frpc.RootsFile, lease.Frpc.TLS.CAFile == filepath.Join(runDir, frpc.RootsFile))
	lease.Certificate = read(frpc.CertFile, https)
	lease.Key = read(frpc.KeyFile, https)
	return lease, err
}

// markStale records in the lease that frpc may run with another frpc.toml: toml, which bootstrap found at its start.
func markStale(lease *frpc.Lease, toml []byte) {
	if now, err := lease.Frpc.TOML(); err == nil && lease.Stale == nil && len(toml) > 0 && !bytes.Equal(toml, now) {
		lease.Stale = &frpc.Stale{}
	}
}

// sameTOML reports whether two configurations have the same frpc.toml. Both must be valid for Config.TOML.
func sameTOML(a, b frpc.Config) bool {
	before, _ := a.TOML()
	after, _ := b.TOML()
	return bytes.Equal(before, after)
}

// write writes the lease's files into the run directory, and logs what the lease is.
func write(cfg *config.Config, lease frpc.Lease, log *slog.Logger) error {
	if _, err := lease.Write(cfg.RunDir); err != nil {
		return unwritable(err)
	}
	if lacks := lease.Frpc.Tunnel.GivesUp(); lacks != "" {
		log.Warn("the tunnel is not of type https", "tunnel_type", lease.Frpc.Tunnel.Type, "consequence", lacks,
			"next_step", "set "+config.Name("frp.tunnel.type")+" to https, which refuses other leases too")
	}
	if !lease.ExpiresAt.IsZero() {
		log = log.With("expires_at", lease.ExpiresAt)
	}
	log.Info("lease written", "run_dir", cfg.RunDir, "server_addr", lease.Frpc.ServerAddr,
		"server_port", lease.Frpc.ServerPort, "tunnel_type", lease.Frpc.Tunnel.Type)
	return nil
}

func unwritable(err error) error {
	return fmt.Errorf("write the run directory: %w: check %s, and that it is not full", err, config.Name("run_dir"))
}

// reportStuck writes StuckFile for the time stuckFor, so that frpc's liveness probe fails and the kubelet kills frpc.
func reportStuck(runDir string) error {
	file := filepath.Join(runDir, frpc.StuckFile)
	time.AfterFunc(stuckFor, func() { _ = os.Remove(file) })
	return os.WriteFile(file, nil, 0o600)
}
