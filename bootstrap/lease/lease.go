// Package lease gets leases for the tunnel, writes them for frpc and the proxy, and renews them.
package lease

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
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
	waiting := filepath.Join(cfg.RunDir, waitingFile)
	if warning := cfg.Agent.TokenWarning(); warning != "" {
		log.Warn("weak agent token", "reason", warning)
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
	if r.token, err = cfg.Credential(); err != nil {
		return err
	}
	first, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r.lease.Frpc.Admin.Password = admin.Password
	lease, fail := requestLease(first, cfg, retryUntilLease(r.issue, waiting, log), r.lease)
	if fail != nil {
		noTunnel := old == nil && admin.Password == "" && errors.Is(readErr, fs.ErrNotExist)
		if fail.Revoked && !noTunnel {
			return closeTunnel(ctx, cfg.RunDir, admin, fail)
		}
		return fail
	}
	markStale(&lease, toml)
	_ = os.Remove(waiting)
	if err := write(cfg, lease, log); err != nil || once {
		return err
	}
	r.adopt(lease, time.Now())
	return r.run(ctx)
}

// waitingFile holds why there is no lease yet.
const waitingFile = "waiting"

// Ready returns an error unless the lease's files are in the run directory, with why bootstrap has no lease yet. The
// kubelet shows it as an event of the pod.
func Ready(runDir string) error {
	_, err := Read(runDir)
	if why, _ := os.ReadFile(filepath.Join(runDir, waitingFile)); err != nil && len(why) > 0 {
		err = fmt.Errorf("no lease yet: %s", why)
	}
	return err
}

const adminUser = "pipeops" // the user name for frpc's admin API

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
	read(frpc.TokenFile, lease.Frpc.AuthMethod == "oidc")
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
		return err
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

// issuer is [controlplane.Client.RequestLease], or one that retries it.
type issuer func(ctx context.Context, certificate []byte) (controlplane.Answer, *controlplane.Failure)

// Try requests a lease and writes nothing. It shows the certificate in use: the control plane would otherwise trust the
// new one instead.
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

// requestLease returns a new lease. For a tunnel of type https the request shows a certificate, whose names and end
// depend on the lease that comes back. So the first request shows one that fits the last lease, and up to two more
// follow until it fits the new one. A configured certificate fits any lease; while its files cannot be used, the last
// one goes on.
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
	given, givenKey, problem := Configured(cfg)
	if given == nil && problem != "" {
		if last.IssuedAt.IsZero() {
			return fail(errors.New(problem))
		}
		given, givenKey = last.Certificate, last.Key
	}
	for range 3 {
		shown, key := given, givenKey
		names := certificateNames(cfg.Agent.ID, tunnel)
		if tunnel.Type == "https" && given == nil {
			shown, key = newCertificate(names, end, nil)
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
		ends := slices.MaxFunc([]time.Time{answer.Ends, answer.ExpiresAt}, time.Time.Compare) // by any caller's clock
		if given != nil || shown != nil && sameNames && sameEnd(end, ends) {
			lease.Certificate, lease.Key = shown, key
			return lease, nil
		}
		end = ends
	}
	return fail(errors.New("the control plane's lease has another tunnel or another end each time: contact its operator"))
}

// retryUntilLease returns an issuer that retries until there is a lease, the failure is final, or ctx ends. Meanwhile
// the file waiting says why there is none, for Ready.
func retryUntilLease(issue issuer, waiting string, log *slog.Logger) issuer {
	return func(ctx context.Context, certificate []byte) (controlplane.Answer, *controlplane.Failure) {
		var last *controlplane.Failure
		for delay := time.Second; ; delay = min(2*delay, 30*time.Second) {
			answer, fail := issue(ctx, certificate)
			if fail == nil || fail.Final {
				return answer, fail
			}
			if ctx.Err() != nil && last != nil {
				fail = last // the deadline has cut this attempt short: the one before says why there is no lease
			}
			last = fail
			wait := max(jitter(delay), fail.RetryAfter)
			if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < wait {
				return answer, &controlplane.Failure{Err: fmt.Errorf("%w (gave up after --timeout)", fail)}
			}
			log.Warn("no lease yet", "error", fail, "next_attempt_in", wait.String())
			_ = os.WriteFile(waiting, []byte(fail.Error()), 0o600)
			if sleep(ctx, wait) != nil { // a signal: the deadline is later
				return answer, &controlplane.Failure{Err: errors.New("stopped by a signal before there was a lease")}
			}
		}
	}
}

// sleep waits for d, or returns the error of ctx if that ends before.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// jitter returns a random duration around d, so that agents which failed together do not retry together.
func jitter(d time.Duration) time.Duration {
	return d/2 + mathrand.N(max(d, 1)) //nolint:gosec // no secret
}

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
		IssuedAt: time.Now().UTC().Truncate(time.Second), ExpiresAt: answer.Ends,
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
	tunnel.SubdomainHost = cmp.Or(tunnel.SubdomainHost, configured.SubdomainHost)
	if tunnel.Group == "" {
		tunnel.Group, tunnel.GroupKey = configured.Group, configured.GroupKey
	}
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
	hosts := append([]string{answer.ServerAddr, tunnel.Subdomain, tunnel.SubdomainHost}, tunnel.CustomDomains...)
	for _, host := range hosts {
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
	case cfg.FRP.Tunnel.Type == "https" && tunnel.Type != "https" && cfg.FRP.TypeConfigured:
		// Without an explicit setting, write warns instead.
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
