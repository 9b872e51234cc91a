// Command bootstrap authenticates the agent at the control plane, writes frpc.toml and lease.json to the volume
// that it shares with frpc and the proxy, and stays to renew the lease.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/version"
	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/secret"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1 // no lease, or something is not as it should be: the last line names the hop, the cause and the next step
	exitUsage  = 2 // the configuration or the command line is wrong
)

// terminationLog is where the kubelet looks for why a container has ended. It is there in a pod and nowhere else.
const terminationLog = "/dev/termination-log"

const usage = `bootstrap gets a tunnel lease from the control plane, writes frpc.toml and lease.json, and keeps the lease fresh.

Usage:
  bootstrap [flags]          get a lease, write the files, and renew it in time, until SIGTERM
  bootstrap --once [flags]   get a lease, write the files, and exit
  bootstrap --check          check the configuration and print it, each value with its origin
  bootstrap ready            exit with 0 if the files are written, for a startup probe
  bootstrap doctor [--json]  walk the way from the configuration to the API server, a line for each step

`

func main() {
	secret.ForbidCoreDumps()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], config.Environ(), os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, env map[string]string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("bootstrap", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		_, _ = fmt.Fprint(stderr, usage)
		flags.PrintDefaults()
	}
	configPath := flags.String("config", "", "YAML configuration `file` (default "+config.DefaultPath+", which may be absent)")
	once := flags.Bool("once", false, "write the files and exit")
	check := flags.Bool("check", false, "check the configuration, print it and exit")
	asJSON := flags.Bool("json", false, "doctor: print JSON")
	timeout := flags.Duration("timeout", 5*time.Minute, "how long to try to get the first lease")
	showVersion := flags.Bool("version", false, "print the version as JSON and exit")
	command := ""
	err := flags.Parse(args)
	if err == nil && flags.NArg() > 0 { // flags may stand on both sides of it
		command = flags.Arg(0)
		err = flags.Parse(flags.Args()[1:])
	}
	complain := func(format string, args ...any) int {
		_, _ = fmt.Fprintf(stderr, "bootstrap: "+format+"\n", args...)
		return exitUsage
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return exitUsage
	case !slices.Contains([]string{"", "ready", "doctor"}, command):
		return complain("unknown argument %q: see bootstrap --help", command)
	case flags.NArg() > 0:
		return complain("unknown argument %q: see bootstrap --help", flags.Arg(0))
	case (*once || *check) && command != "" || *asJSON && command != "doctor":
		return complain("these do not go together: see bootstrap --help")
	case *timeout <= 0:
		return complain("--timeout must be more than nothing: give one such as 5m")
	case *showVersion:
		_ = json.NewEncoder(stdout).Encode(version.Get())
		return exitOK
	case *check:
		if err := config.Describe(stdout, *configPath, env); err != nil {
			return complain("%v", err)
		}
		return exitOK
	case command == "doctor":
		return doctor(ctx, *configPath, env, stdout, *asJSON)
	}
	cfg, err := config.Load(*configPath, env)
	if err != nil {
		_ = os.WriteFile(terminationLog, []byte(err.Error()), 0) // does not create it
		return complain("%v", err)
	}
	if command == "ready" {
		if _, err := written(cfg); err != nil {
			_, _ = fmt.Fprintln(stderr, "bootstrap: not ready:", err)
			return exitFailed
		}
		return exitOK
	}
	log, _ := cfg.Logger(stderr)
	if err := serve(ctx, cfg, *timeout, *once, log); err != nil {
		_ = os.WriteFile(terminationLog, []byte(err.Error()), 0)
		log.Error("bootstrap ends", "error", err)
		if mistakes := (*config.Error)(nil); errors.As(err, &mistakes) {
			return exitUsage
		}
		return exitFailed
	}
	return exitOK
}

const tooShort = "agent.token (PIPEOPS_AGENT_TOKEN) has fewer than 16 characters and could be guessed: replace it by a random one"

// written reads the lease whose files are complete.
func written(cfg *config.Config) (*frpc.Lease, error) {
	lease, err := frpc.ReadLease(cfg.RunDir)
	if err == nil {
		lease.Frpc.Tunnel.HealthPath = agentapi.TunnelHealthPath // of another version it may lack it
		_, err = os.Stat(filepath.Join(cfg.RunDir, frpc.ConfigFile))
	}
	if err == nil && lease.Frpc.TLS.CAFile == filepath.Join(cfg.RunDir, frpc.RootsFile) {
		lease.Roots, err = os.ReadFile(lease.Frpc.TLS.CAFile)
	}
	if err == nil && lease.Frpc.Tunnel.Type == "https" {
		lease.Certificate, err = os.ReadFile(filepath.Join(cfg.RunDir, frpc.CertFile))
		if err == nil {
			lease.Key, err = os.ReadFile(filepath.Join(cfg.RunDir, frpc.KeyFile))
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

// lock takes the run directory for this process, until release is called or the process ends: two that write there
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

// serve gets a lease, writes its files, and unless once is set keeps it fresh until ctx ends.
func serve(ctx context.Context, cfg *config.Config, timeout time.Duration, once bool, log *slog.Logger) error {
	release, err := lock(cfg.RunDir)
	if err != nil {
		return err
	}
	defer release()
	stuck := filepath.Join(cfg.RunDir, frpc.StuckFile)
	_ = os.Remove(stuck) // of a bootstrap that was killed
	defer func() { _ = os.Remove(stuck) }()
	if cfg.Agent.WeakToken() {
		log.Warn(tooShort)
	}
	if cfg.FRP.TLS.InsecureSkipVerify {
		log.Warn("frpc does not verify frps, because frp.tls.insecure_skip_verify (PIPEOPS_FRP_TLS_INSECURE_SKIP_VERIFY) is set: whoever can redirect the connection gets its credential")
	}
	ask, err := newSource(cfg)
	if err != nil {
		return err
	}
	r := &renewer{cfg: cfg, ask: ask, login: frpc.Login, log: log, backoff: backoffMin}
	toml, _ := os.ReadFile(filepath.Join(cfg.RunDir, frpc.ConfigFile)) // empty: none from before
	if old, err := written(cfg); err == nil && !once {
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
	lease, fail := obtain(first, cfg, func(ctx context.Context, certificate []byte) (authAnswer, *failure) {
		return persist(ctx, ask, log, certificate)
	}, frpc.Lease{Frpc: frpc.Config{Admin: frpc.Admin{Password: admin.Password}}})
	if fail != nil && fail.revoked && !errors.Is(noTunnel, fs.ErrNotExist) {
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
