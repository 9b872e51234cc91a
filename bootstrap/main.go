// Command bootstrap authenticates the agent at the control plane and writes frpc.toml and lease.json to the
// volume that it shares with frpc and the proxy.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/version"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1 // no lease: the log's last line names the hop, the cause and the next step
	exitUsage  = 2 // the configuration or the command line is wrong
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("bootstrap", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		_, _ = fmt.Fprint(stderr, "bootstrap gets a tunnel lease from the control plane and writes frpc.toml and lease.json.\n\nUsage: bootstrap --once [flags]\n\n")
		flags.PrintDefaults()
	}
	configPath := flags.String("config", "", "YAML configuration `file` (default "+config.DefaultPath+", which may be absent)")
	once := flags.Bool("once", false, "write the files and exit")
	timeout := flags.Duration("timeout", 5*time.Minute, "how long to try to reach the control plane")
	showVersion := flags.Bool("version", false, "print the version as JSON and exit")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return exitOK
	} else if err != nil {
		return exitUsage
	}
	if flags.NArg() > 0 {
		_, _ = fmt.Fprintf(stderr, "bootstrap: unknown argument %q: see bootstrap --help\n", flags.Arg(0))
		return exitUsage
	}
	if *showVersion {
		_ = json.NewEncoder(stdout).Encode(version.Get())
		return exitOK
	}
	if !*once {
		_, _ = fmt.Fprintln(stderr, "bootstrap: renewing a lease is not built yet: run with --once")
		return exitUsage
	}

	if *timeout <= 0 {
		_, _ = fmt.Fprintln(stderr, "bootstrap: --timeout must be more than nothing: give one such as 5m")
		return exitUsage
	}
	cfg, err := config.Load(*configPath, getenv)
	if err != nil {
		_, _ = fmt.Fprintln(stderr, "bootstrap:", err)
		return exitUsage
	}
	log, _ := cfg.Logger(stderr)
	if err := writeLease(ctx, cfg, *timeout, log); err != nil {
		log.Error("no lease", "error", err)
		if mistakes := (*config.Error)(nil); errors.As(err, &mistakes) {
			return exitUsage
		}
		return exitFailed
	}
	return exitOK
}

// writeLease gets a lease and writes its files.
func writeLease(ctx context.Context, cfg *config.Config, timeout time.Duration, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if cfg.FRP.TLS.CAFile == "" {
		log.Warn("frpc will not verify frps: set frp.tls.ca_file (PIPEOPS_FRP_TLS_CA_FILE)")
	}
	var answer authAnswer
	if cfg.FRP.Token != "" {
		answer.FRPToken = cfg.FRP.Token // the operator's own frps: nobody to ask
	} else {
		client, err := newControlPlane(cfg)
		if err != nil {
			return err
		}
		if answer, err = client.authenticate(ctx, log); err != nil {
			return err
		}
	}
	lease, err := newLease(cfg, answer)
	if err != nil {
		return err
	}
	if err := lease.Write(cfg.RunDir); err != nil {
		return fmt.Errorf("the run directory cannot be written: %w: check run_dir (PIPEOPS_RUN_DIR) and the volume mounted there", err)
	}
	if !lease.ExpiresAt.IsZero() {
		log = log.With("expires_at", lease.ExpiresAt)
	}
	log.Info("lease written", "run_dir", cfg.RunDir, "server_addr", lease.Frpc.ServerAddr,
		"server_port", lease.Frpc.ServerPort, "tunnel_type", lease.Frpc.Tunnel.Type)
	return nil
}
