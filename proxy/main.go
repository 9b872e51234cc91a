// Command proxy serves the agent's HTTP API: to frpc on the tunnel listener, and probes and metrics to the
// kubelet and Prometheus on the operations listener.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/version"
	"github.com/pipeops/vm-agent/frpc/secret"
	"github.com/pipeops/vm-agent/proxy/inbound"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2   // the configuration or the command line is wrong
	exitKilled = 143 // a second signal came before the drain was over
)

func main() {
	secret.ForbidCoreDumps()
	ctx, drain := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-signals
		drain()
		<-signals // ends the process at once
		exit(exitKilled)
	}()
	exit(run(ctx, os.Args[1:], config.Environ(), os.Stdout, os.Stderr))
}

// exit ends the process, and with it a credential plugin that still runs: client-go would leave it behind.
func exit(code int) {
	killChildren(os.Getpid())
	os.Exit(code)
}

// killChildren kills the children of a process, and theirs.
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
		_, _ = fmt.Fprint(stderr, "proxy serves the agent's HTTP API and the Kubernetes API under /api/k8s/.\n\nUsage: proxy [flags]\n\n")
		flags.PrintDefaults()
	}
	configPath := flags.String("config", "", "YAML configuration `file` (default "+config.DefaultPath+", which may be absent)")
	showVersion := flags.Bool("version", false, "print the version as JSON and exit")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return exitOK
	} else if err != nil {
		return exitUsage
	}
	complain := func(err error) int {
		_, _ = fmt.Fprintln(stderr, "proxy:", err)
		return exitUsage
	}
	if flags.NArg() > 0 {
		return complain(fmt.Errorf("unknown argument %q: see proxy --help", flags.Arg(0)))
	}
	if *showVersion {
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
	if warning := cfg.Agent.TokenWarning(); warning != "" {
		log.Warn(warning)
	}
	limits := newLimits(memoryLimit())
	metrics := newMetrics()
	api, err := kube.New(restConfig, metrics.latency.Observe, log)
	if err != nil {
		return complain(err)
	}
	if err := serve(ctx, cfg, newServer(cfg, api, metrics, limits, log), log); err != nil {
		log.Error("stopped", "error", err)
		return exitFailed
	}
	return exitOK
}

// changeLevel sets the log level to debug at SIGUSR1, and back to what was configured at the next.
func changeLevel(ctx context.Context, log *slog.Logger, level *slog.LevelVar) {
	configured := level.Level()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1)
	for range signals {
		next := slog.LevelDebug
		if level.Level() == slog.LevelDebug {
			next = configured
		}
		// At the level that lets more through.
		log.Log(ctx, max(level.Level(), next), "the log level changes", "level", next.String())
		level.Set(next)
	}
}

// headerTime is how long the headers of a request may take to come.
const headerTime = 32 * time.Second

// newHTTPServer makes the server of one listener. Its requests end with ctx.
func newHTTPServer(ctx context.Context, l listener, handler http.Handler, log *slog.Logger) *http.Server {
	server := &http.Server{
		Handler:           handler,
		MaxHeaderBytes:    maxHeaderBytes,
		ConnContext:       inbound.ConnContext,
		ReadHeaderTimeout: headerTime,
		// frps keeps idle connections for 60 s: this end must not close first, or a request is lost.
		IdleTimeout: 120 * time.Second,
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelError), // panics, above all
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	if l == operations { // on the tunnel listener these timeouts would cut watches, logs and exec
		server.ReadTimeout, server.WriteTimeout, server.MaxHeaderBytes = time.Minute, time.Minute, opsHeaderBytes
	}
	return server
}

// serve runs both listeners until ctx ends, then drains.
func serve(ctx context.Context, cfg *config.Config, s *server, log *slog.Logger) error {
	// Streams outlive ctx: they end by themselves, or with the drain timeout.
	streams, cutStreams := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cutStreams(nil)
	var servers []*http.Server
	defer func() {
		for _, server := range servers {
			_ = server.Close()
		}
	}()
	failed := make(chan error, 2)
	for _, l := range []struct {
		listener
		key, addr string
	}{
		{operations, config.Name("proxy.metrics_addr"), cfg.Proxy.MetricsAddr},
		{tunnel, config.Name("proxy.listen_addr"), cfg.Proxy.ListenAddr},
	} {
		socket, err := (&net.ListenConfig{}).Listen(ctx, "tcp", l.addr)
		if err != nil {
			return fmt.Errorf("%s: %w: correct the address, or free the port", l.key, err)
		}
		listener := s.bound(l.listener, socket.(*net.TCPListener), cfg.RunDir)
		server := newHTTPServer(streams, l.listener, s.handler(l.listener), log)
		server.ConnState = listener.ConnState
		servers = append(servers, server)
		go func() {
			if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("%s: %w", l.key, err)
			}
		}()
	}
	go wait.UntilWithContext(ctx, s.ready.run, 5*time.Second)
	go wait.UntilWithContext(streams, func(context.Context) { s.gate.endStalled(time.Now()) }, stallInterval)
	log.Info("serving", "listen_addr", cfg.Proxy.ListenAddr, "metrics_addr", cfg.Proxy.MetricsAddr,
		"agent_id", cfg.Agent.ID, "version", version.Version)

	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	// Both listeners stay: new requests are told to come again, and probes that the agent is draining.
	log.Info("draining", "drain_timeout", cfg.Proxy.DrainTimeout.String())
	s.gate.close()
	s.kube.Drain()
	select {
	case <-s.gate.empty:
		log.Info("drained")
	case <-time.After(cfg.Proxy.DrainTimeout):
		log.Warn("the drain timeout is over: cutting the streams that still run")
		cutStreams(kube.ErrShutdown)
	}
	time.Sleep(3 * time.Second) // a caller told to retry after 1 s must meet an answer, not a closing connection
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	for _, server := range servers {
		_ = server.Shutdown(last)
	}
	return nil
}
