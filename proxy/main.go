// Command proxy serves the agent's HTTP API: see package server.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/version"
	"github.com/pipeops/vm-agent/frpc/secret"
	"github.com/pipeops/vm-agent/proxy/kube"
	"github.com/pipeops/vm-agent/proxy/server"
)

const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2   // the configuration or the command line is invalid
	exitKilled = 143 // a second signal came during the drain
)

func main() {
	secret.ForbidCoreDumps()
	ctx, drain := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-signals
		drain()
		<-signals
		exit(exitKilled)
	}()
	exit(run(ctx, os.Args[1:], config.Environ(), os.Stdout, os.Stderr))
}

// exit ends the process, and a credential plugin that still runs: client-go would leave it behind.
func exit(code int) {
	killChildren(os.Getpid())
	os.Exit(code)
}

// killChildren kills all descendants of a process.
func killChildren(pid int) {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		children, _ := os.ReadFile(list) // its thread may have ended
		for child := range strings.FieldsSeq(string(children)) {
			if pid, err := strconv.Atoi(child); err == nil {
				killChildren(pid)
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
}

func run(ctx context.Context, args []string, env map[string]string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("proxy", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		_, _ = fmt.Fprint(stderr, "proxy serves the agent's HTTP API and the Kubernetes API under /api/k8s/.\n\n"+
			"Usage: proxy [flags]\n\n"+
			"Settings come from the file and from PIPEOPS_ variables: bootstrap/README.md lists them.\n\n")
		flags.PrintDefaults()
	}
	configPath := flags.String("config", "", "YAML configuration `file` (default "+config.DefaultPath+", if it exists)")
	showVersion := flags.Bool("version", false, "print the version as JSON and exit")
	complain := func(err error) int {
		_, _ = fmt.Fprintln(stderr, "proxy:", err)
		return exitUsage
	}
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return exitUsage
	case flags.NArg() > 0:
		return complain(fmt.Errorf("unknown argument %q: see proxy --help", flags.Arg(0)))
	case *showVersion:
		_ = json.NewEncoder(stdout).Encode(version.Get())
		return exitOK
	}
	cfg, err := config.Load(*configPath, env)
	if err != nil {
		return complain(err)
	}
	restConfig, err := kube.RESTConfig(cfg.Kubernetes.Kubeconfig, cfg.Kubernetes.InCluster)
	if err != nil {
		return complain(fmt.Errorf("no way to the Kubernetes API server: %w", err))
	}
	log, level := cfg.Logger(stderr)
	go changeLevel(ctx, log, level)
	s, err := server.New(cfg, restConfig, limitMemory(), log)
	if err != nil {
		return complain(err)
	}
	if err := s.Run(ctx); err != nil {
		log.Error("stopped", "error", err)
		return exitFailed
	}
	return exitOK
}

// changeLevel sets the log level to debug on SIGUSR1, and back to the configured level on the next. It never returns.
func changeLevel(ctx context.Context, log *slog.Logger, level *slog.LevelVar) {
	configured := level.Level()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1)
	for range signals {
		next := slog.LevelDebug
		if level.Level() == slog.LevelDebug {
			next = configured
		}
		// At the higher level, which both settings log.
		log.Log(ctx, max(level.Level(), next), "log level changed", "level", next.String())
		level.Set(next)
	}
}

// limitMemory returns how many bytes of memory the proxy may use: GOMEMLIMIT if it is set, else four fifths of the
// container's limit, which it sets as Go's memory limit, else 1 GiB.
func limitMemory() int64 {
	if limit := debug.SetMemoryLimit(-1); limit != math.MaxInt64 {
		return limit
	}
	for _, file := range []string{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"} { // v2, v1
		data, _ := os.ReadFile(file) // only one of them exists
		if limit, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64); err == nil && limit < 1<<40 {
			debug.SetMemoryLimit(limit / 5 * 4)
			return limit / 5 * 4
		}
	}
	return 1 << 30
}
