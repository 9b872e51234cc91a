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

// Read returns the lease in the run directory. It fails unless all files of the lease are there.
func Read(runDir string) (*frpc.Lease, error) {
	lease, err := frpc.ReadLease(runDir)
	if err == nil {
		lease.Frpc.Tunnel.HealthPath = agentapi.TunnelHealthPath // of another version it may lack it
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

// previousAdmin finds the admin API of the frpc that may still run with files from before: in lease.json, or where
// that cannot be read, in frpc.toml. Its error is fs.ErrNotExist if there are none.
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

// markStale notes in the lease that frpc may run with another frpc.toml, which stood there when bootstrap started.
func markStale(lease *frpc.Lease, toml []byte) {
	if now, err := lease.Frpc.TOML(); err == nil && lease.Stale == nil && len(toml) > 0 && !bytes.Equal(toml, now) {
		lease.Stale = &frpc.Stale{}
	}
}

// lock takes the run directory for this process, until release is called or the process Ends: two that write there
// would change frpc's password for each other. It locks the directory itself: a file in it could be removed.
func lock(runDir string) (release func(), err error) {
	dir, err := os.Open(runDir)
	if err != nil {
		return nil, fmt.Errorf("the run directory cannot be opened: %w: check run_dir (PIPEOPS_RUN_DIR) and the volume mounted there", err)
	}
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = dir.Close()
		return nil, fmt.Errorf("another bootstrap already uses the run directory %s (%w): leave the lease to that one, or stop it first", runDir, err)
	}
	return func() { _ = dir.Close() }, nil
}

// write puts the lease's files into the run directory.
func write(cfg *config.Config, lease frpc.Lease, log *slog.Logger) error {
	if _, err := lease.Write(cfg.RunDir); err != nil {
		return unwritable(err)
	}
	if lacks := lease.Frpc.Tunnel.GivesUp(); lacks != "" {
		log.Warn("the tunnel is not of type https", "tunnel_type", lease.Frpc.Tunnel.Type, "consequence", lacks,
			"next_step", "set frp.tunnel.type (PIPEOPS_FRP_TUNNEL_TYPE) to https, which refuses other leases too")
	}
	if !lease.ExpiresAt.IsZero() {
		log = log.With("expires_at", lease.ExpiresAt)
	}
	log.Info("lease written", "run_dir", cfg.RunDir, "server_addr", lease.Frpc.ServerAddr,
		"server_port", lease.Frpc.ServerPort, "tunnel_type", lease.Frpc.Tunnel.Type)
	return nil
}

func unwritable(err error) error {
	return fmt.Errorf("the run directory cannot be written: %w: check run_dir (PIPEOPS_RUN_DIR), and that the volume mounted there is not full", err)
}

// sameTOML reports whether two configurations, which can be written, are the same frpc.toml.
func sameTOML(a, b frpc.Config) bool {
	before, _ := a.TOML()
	after, _ := b.TOML()
	return bytes.Equal(before, after)
}

// reportStuck writes StuckFile, for a while: frpc's liveness probe has the kubelet kill it.
func reportStuck(runDir string) error {
	file := filepath.Join(runDir, frpc.StuckFile)
	time.AfterFunc(stuckFor, func() { _ = os.Remove(file) })
	return os.WriteFile(file, nil, 0o600)
}
