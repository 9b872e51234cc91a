package lease

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc"
)

// Read returns the lease in the run directory. It fails unless all of the lease's files are there.
func Read(runDir string) (*frpc.Lease, error) {
	lease, err := frpc.ReadLease(runDir)
	if err == nil {
		lease.Frpc.Tunnel.HealthPath = agentapi.TunnelHealthPath // one of another version may lack it
		_, err = os.Stat(filepath.Join(runDir, frpc.ConfigFile))
	}
	if err == nil && lease.Frpc.TLS.CAFile == filepath.Join(runDir, frpc.RootsFile) {
		lease.Roots, err = os.ReadFile(lease.Frpc.TLS.CAFile)
	}
	if err == nil && lease.Frpc.Tunnel.Type == "https" {
		lease.Certificate, err = os.ReadFile(filepath.Join(runDir, frpc.CertFile))
		if err == nil {
			lease.Key, err = os.ReadFile(filepath.Join(runDir, frpc.KeyFile))
		}
	}
	return lease, err
}

// previousAdmin returns the admin API of the frpc that may still run with older files: from lease.json, or if that is
// unreadable, from frpc.toml. The error is fs.ErrNotExist if there are no such files.
func previousAdmin(cfg *config.Config, toml []byte) (frpc.Admin, error) {
	lease, err := frpc.ReadLease(cfg.RunDir)
	if err == nil {
		return lease.Frpc.Admin, nil
	}
	admin := frpc.Admin{Port: cfg.FRP.AdminPort, User: adminUser, Password: frpc.AdminPassword(toml)}
	if admin.Password != "" {
		err = nil
	}
	return admin, err
}

// markStale records in the lease that frpc may run with another frpc.toml: toml, which bootstrap found at its start.
func markStale(lease *frpc.Lease, toml []byte) {
	if now, err := lease.Frpc.TOML(); err == nil && lease.Stale == nil && len(toml) > 0 && !bytes.Equal(toml, now) {
		lease.Stale = &frpc.Stale{}
	}
}

// lock locks the run directory until release is called or the process ends, because two processes that write there
// would replace each other's password of frpc. It locks the directory itself: a file in it could be removed.
func lock(runDir string) (release func(), err error) {
	dir, err := os.Open(runDir)
	if err != nil {
		return nil, fmt.Errorf("open the run directory: %w: check %s and the volume mounted there",
			err, config.Name("run_dir"))
	}
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = dir.Close()
		return nil, fmt.Errorf("lock the run directory %s: %w: another bootstrap uses it, stop that one first", runDir, err)
	}
	return func() { _ = dir.Close() }, nil
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
	return fmt.Errorf("write the run directory: %w: check %s, and that the volume mounted there is not full",
		err, config.Name("run_dir"))
}

// sameTOML reports whether two configurations have the same frpc.toml. Both must be valid for Config.TOML.
func sameTOML(a, b frpc.Config) bool {
	before, _ := a.TOML()
	after, _ := b.TOML()
	return bytes.Equal(before, after)
}

// reportStuck writes StuckFile for the time stuckFor, so that frpc's liveness probe fails and the kubelet kills frpc.
func reportStuck(runDir string) error {
	file := filepath.Join(runDir, frpc.StuckFile)
	time.AfterFunc(stuckFor, func() { _ = os.Remove(file) })
	return os.WriteFile(file, nil, 0o600)
}
