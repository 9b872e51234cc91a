// Package lease gets leases for the tunnel, writes them for frpc and the proxy, and renews them.
package lease

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc"
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
	issue, err := newIssuer(cfg)
	if err != nil {
		return err
	}
	r := &renewer{cfg: cfg, issue: issue, login: frpc.Login, log: log, backoff: backoffMin}
	toml, _ := os.ReadFile(filepath.Join(cfg.RunDir, frpc.ConfigFile)) // empty: there is none
	if old, err := Read(cfg.RunDir); err == nil && !once {
		// This container was restarted. frpc may run with these files, so they stay until there is a new lease.
		r.lease, r.renewAt = *old, time.Now()
		markStale(&r.lease, toml)
		return r.run(ctx)
	}
	admin, noTunnel := previousAdmin(cfg, toml)
	if r.token, err = r.credential(); err != nil {
		return err
	}
	first, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	last := frpc.Lease{Frpc: frpc.Config{Admin: frpc.Admin{Password: admin.Password}}}
	lease, fail := requestLease(first, cfg, retryUntilLease(issue, log), last)
	if fail != nil && fail.Revoked && !errors.Is(noTunnel, fs.ErrNotExist) {
		return closeTunnel(ctx, cfg.RunDir, admin, fail)
	}
	if fail != nil {
		return fail
	}
	markStale(&lease, toml)
	if err := write(cfg, lease, log); err != nil || once {
		return err
	}
	r.adopt(lease, time.Now())
	return r.run(ctx)
}
