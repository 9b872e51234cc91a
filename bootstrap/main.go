// Command bootstrap authenticates the agent at the control plane, writes frpc.toml and lease.json to the volume
// that it shares with frpc and the proxy, and renews the lease.
package main

import (
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/doctor"
	"github.com/pipeops/vm-agent/bootstrap/kubeconfig"
	"github.com/pipeops/vm-agent/bootstrap/lease"
	"github.com/pipeops/vm-agent/bootstrap/version"
	"github.com/pipeops/vm-agent/frpc/secret"
)

const (
	exitOK     = 0
	exitFailed = 1 // no lease, or a step of doctor failed: the last line names the hop, the cause and the next step
	exitUsage  = 2 // the configuration or the command line is wrong
)

// terminationLog is where the kubelet reads why a container has terminated. It exists only in a pod.
const terminationLog = "/dev/termination-log"

//go:embed usage.txt
var usage string

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
	const configUsage = "YAML configuration `file` (default " + config.DefaultPath + ", which may be absent)"
	configPath := flags.String("config", "", configUsage)
	once := flags.Bool("once", false, "write the files and exit")
	check := flags.Bool("check", false, "check the configuration, print it and exit")
	asJSON := flags.Bool("json", false, "doctor: print JSON")
	server := flags.String("server", "", "kubeconfig: `URL` of the agent, as callers reach it")
	embed := flags.Bool("embed-token", false, "kubeconfig: print the agent's token too")
	dir := flags.String("dir", ".", "certificate: `directory` for its files")
	timeout := flags.Duration("timeout", 5*time.Minute, "how long to try to get the first lease")
	showVersion := flags.Bool("version", false, "print the version as JSON and exit")
	words := []string{} // the command and its names: flags may stand between them
	err := flags.Parse(args)
	for err == nil && flags.NArg() > 0 {
		words = append(words, flags.Arg(0))
		err = flags.Parse(flags.Args()[1:])
	}
	command, names := cmp.Or(words...), words[min(len(words), 1):]
	end := func(err error, failed int) int {
		if err == nil {
			return exitOK
		}
		_, _ = fmt.Fprintln(stderr, "bootstrap:", err)
		return failed
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return exitUsage
	case !slices.Contains([]string{"", "ready", "doctor", "kubeconfig", "certificate"}, command) ||
		len(names) > 0 && command != "certificate":
		return end(fmt.Errorf("unknown argument %q: see bootstrap --help", words[len(words)-1]), exitUsage)
	case (*once || *check) && command != "" || *asJSON && command != "doctor":
		return end(errors.New("these arguments exclude each other: see bootstrap --help"), exitUsage)
	case *timeout <= 0:
		return end(errors.New("--timeout must be positive: give one such as 5m"), exitUsage)
	case *showVersion:
		_ = json.NewEncoder(stdout).Encode(version.Get())
		return exitOK
	case command == "doctor":
		return map[bool]int{true: exitOK, false: exitFailed}[doctor.Run(ctx, *configPath, env, stdout, *asJSON)]
	case command == "certificate":
		return end(lease.MakeCertificate(*dir, names), exitFailed)
	}
	cfg, err := config.Load(*configPath, env)
	if err != nil {
		_ = os.WriteFile(terminationLog, []byte(err.Error()), 0) // does not create it
		return end(err, exitUsage)
	}
	switch {
	case *check:
		if _, _, problem := lease.Configured(cfg); problem != "" {
			_, _ = fmt.Fprintln(stderr, "bootstrap: warning:", problem)
		}
		return end(config.Describe(stdout, *configPath, env), exitFailed)
	case command == "kubeconfig":
		return end(kubeconfig.Write(stdout, cfg, *server, *embed), exitFailed)
	case command == "ready":
		return end(lease.Ready(cfg.RunDir), exitFailed)
	}
	log, _ := cfg.Logger(stderr)
	if err := lease.Run(ctx, cfg, *timeout, *once, log); err != nil {
		_ = os.WriteFile(terminationLog, []byte(err.Error()), 0)
		log.Error("bootstrap ends", "error", err)
		if _, invalid := errors.AsType[*config.Error](err); invalid {
			return exitUsage
		}
		return exitFailed
	}
	return exitOK
}
