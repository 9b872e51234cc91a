// Package lease gets leases for the tunnel, writes them for frpc and the proxy, and renews them.
package lease

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/controlplane"
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
