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
	"github.com/pipeops/vm-agent/bootstrap/controlplane"
	"github.com/pipeops/vm-agent/frpc"
)

// Run gets a lease, writes its files, and unless once is set renews it until ctx ends. It gives up after timeout if
// there is no lease by then.
func Run(ctx context.Context, cfg *config.Config, timeout time.Duration, once bool, log *slog.Logger) error {
	release, err := lock(cfg.RunDir)
	if err != nil {
		return err
	}
	defer release()
	stuck := filepath.Join(cfg.RunDir, frpc.StuckFile)
	_ = os.Remove(stuck) // of a bootstrap that was killed
	defer func() { _ = os.Remove(stuck) }()
	if warning := cfg.Agent.TokenWarning(); warning != "" {
		log.Warn(warning)
	}
	if cfg.FRP.TLS.InsecureSkipVerify {
		log.Warn("frpc does not verify frps, because frp.tls.insecure_skip_verify (PIPEOPS_FRP_TLS_INSECURE_SKIP_VERIFY) is set: whoever can redirect the connection gets its credential")
	}
	issue, err := newIssuer(cfg)
	if err != nil {
		return err
	}
	r := &renewer{cfg: cfg, issue: issue, login: frpc.Login, log: log, backoff: backoffMin}
	toml, _ := os.ReadFile(filepath.Join(cfg.RunDir, frpc.ConfigFile)) // empty: none from before
	if old, err := Read(cfg.RunDir); err == nil && !once {
		// This container was started again; frpc may run with what is there, so it stays until there is better.
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
	lease, fail := requestLease(first, cfg, func(ctx context.Context, certificate []byte) (controlplane.Answer, *controlplane.Failure) {
		return retryUntilLease(ctx, issue, log, certificate)
	}, frpc.Lease{Frpc: frpc.Config{Admin: frpc.Admin{Password: admin.Password}}})
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
