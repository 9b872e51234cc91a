// Package server serves the agent's HTTP API: to frpc on the tunnel listener, and probes and metrics to the kubelet
// and Prometheus on the operations listener.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/version"
	"github.com/pipeops/vm-agent/proxy/access"
	"github.com/pipeops/vm-agent/proxy/inbound"
	"github.com/pipeops/vm-agent/proxy/kube"
	"github.com/pipeops/vm-agent/proxy/runners"
)

// Server is the proxy's HTTP server. Its fields are what the handlers share.
type Server struct {
	config  *config.Config
	agent   agentStatus
	auth    *authenticator
	kube    *kube.Proxy
	owner   *access.Owner
	api     *kube.Client // with the agent's own credential
	runners *runners.Runners
	metrics *metrics
	checks  map[string]*check // of /ready, by name
	tunnel  *tunnelCheck
	gate    *gate
	limits  *limits
	log     *slog.Logger

	reviews map[right]*review // of what running streams need; used by reviewStreams alone

	heartbeats    atomic.Uint64             // received from the control plane
	lastHeartbeat atomic.Pointer[time.Time] // in UTC; nil: none since the start

	summaryMu sync.Mutex
	summaryAt time.Time
	summary   kube.Summary // of the cluster, as it was then
}

// New returns a server for the API server of api, with limits for memory in bytes. It starts and opens nothing.
func New(cfg *config.Config, api *rest.Config, memory int64, log *slog.Logger) (*Server, error) {
	m, limits := newMetrics(), newLimits(memory)
	client, err := kube.NewClient(api, m.answered)
	if err != nil {
		return nil, err
	}
	callers, own := client, cfg.Access.Identity == access.Own
	if own { // nothing of the agent's own credential, not even a kubeconfig's client certificate
		if callers, err = kube.NewClient(rest.AnonymousClientConfig(api), m.answered); err != nil {
			return nil, err
		}
	}
	refused := func(limit string) { m.refused.WithLabelValues(limit).Inc() }
	s := &Server{
		config: cfg, metrics: m, limits: limits, log: log, reviews: map[right]*review{},
		agent: agentStatus{
			ID: cfg.Agent.ID, Name: cfg.Agent.Name, Cluster: cfg.Agent.ClusterName, Instance: cfg.Agent.Instance,
			Version: version.Version, StartedAt: time.Now().UTC(),
		},
		auth:  newAuthenticator(cfg.Agent.Token, cfg.Agent.TokenOverlap, m, log),
		kube:  kube.NewProxy(callers, own, log),
		owner: access.NewOwner(client, cfg.Kubernetes.Namespace, cfg.Access, log),
		api:   client,
		gate: &gate{
			limits: limits, refused: refused, log: log,
			running: map[*scope]struct{}{}, callers: map[string]usage{},
		},
		runners: runners.New(client, cfg, func() { refused("commands") }, log),
	}
	s.addChecks()
	m.owner(s.owner)
	m.certificate("frp_client", cfg.FRP.TLS.CertFile, false)
	m.certificate("frp_ca", cfg.FRP.TLS.CAFile, true)
	m.certificate("callers", cfg.Proxy.CertFile, false)
	m.certificate("client_ca", cfg.Proxy.ClientCAFile, true)
	m.certificate("control_plane_ca", cfg.Agent.CAFile, true)
	m.access.WithLabelValues(cfg.Access.Identity, "forwarded") // 0 until there is one
	m.limit("requests", int64(limits.requests), func() int64 { return int64(s.gate.inUse().requests) })
	m.limit("request_memory_bytes", limits.requestMemory, func() int64 { return s.gate.inUse().memory })
	m.limit("commands", runners.MaxCommands, func() int64 { return int64(s.runners.Running()) })
	return s, nil
}

// Run serves both listeners until ctx ends, then drains. It returns an error if a listener fails, and nil after a
// drain. All goroutines that last longer than a request start here, in inbound.New or in main, except those that wait
// for a credential plugin (kube.Client).
func (s *Server) Run(ctx context.Context) error {
	// Requests, and what watches over them, outlive ctx: they end by themselves, or with the drain timeout.
	requests, cut := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cut(nil)
	proxy := s.config.Proxy
	certificates := &certificates{runDir: s.config.RunDir, clientCAFile: proxy.ClientCAFile, log: s.log}
	if err := certificates.reload(); err != nil {
		return fmt.Errorf("%s: %w: correct the path, or mount the file", config.Name("proxy.tls.client_ca_file"), err)
	}
	var servers []*http.Server
	failed := make(chan error, 2)
	for _, l := range []struct {
		listener
		key, addr string
	}{
		{operations, config.Name("proxy.metrics_addr"), proxy.MetricsAddr},
		{tunnel, config.Name("proxy.listen_addr"), proxy.ListenAddr},
	} {
		socket, err := (&net.ListenConfig{}).Listen(ctx, "tcp", l.addr)
		if err != nil {
			return fmt.Errorf("%s: %w: correct the address, or free the port", l.key, err)
		}
		bounded := s.bound(l.listener, socket.(*net.TCPListener), certificates.config())
		server := newHTTPServer(requests, l.listener, s.handler(l.listener), s.log)
		server.ConnState = bounded.ConnState
		if l.listener == tunnel && proxy.ClientCAFile != "" {
			go wait.UntilWithContext(requests, func(context.Context) {
				closed := certificates.follow(bounded)
				s.metrics.streamsEnded.WithLabelValues("certificate").Add(float64(closed))
			}, access.OwnerInterval)
		}
		servers = append(servers, server)
		defer func() { _ = server.Close() }()
		go func() {
			if err := server.Serve(bounded); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("%s: %w", l.key, err)
			}
		}()
	}
	// Keeps the checks' metrics, and since when the tunnel is up, current without any request.
	go wait.UntilWithContext(ctx, func(ctx context.Context) {
		for _, c := range s.checks {
			_ = c.refresh(ctx)
		}
	}, 5*time.Second)
	go wait.UntilWithContext(requests, func(context.Context) {
		s.gate.endStalled(time.Now())
		s.endForbidden()
	}, stallInterval)
	go wait.UntilWithContext(requests, s.owner.Follow, access.OwnerInterval)
	go wait.UntilWithContext(requests, s.reviewStreams, reviewInterval)
	if s.config.Agent.TokenFile != "" {
		go s.auth.follow(requests, s.config.Agent.CurrentToken)
	}
	s.log.Info("serving", "listen_addr", proxy.ListenAddr, "metrics_addr", proxy.MetricsAddr,
		"agent_id", s.agent.ID, "version", version.Version)

	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	// Calls are still answered, but each answer ends its connection, and frpc withdraws the tunnel: when the last
	// connections are closed, their callers have gone to another instance.
	s.log.Info("draining", "drain_timeout", proxy.DrainTimeout.String())
	time.AfterFunc(proxy.DrainTimeout, func() {
		s.log.Warn("drain timeout reached: cutting the remaining requests", "requests", s.gate.inUse().requests)
		cut(kube.ErrShutdown)
	})
	s.gate.draining.Store(true)
	time.Sleep(2 * time.Second) // frpc asks once a second
	s.gate.closed.Store(true)
	s.kube.Drain()
	time.Sleep(3 * time.Second) // whoever was refused tries again after 1 s
	idle := func(context.Context) (bool, error) { return s.gate.inUse().requests == 0, nil }
	if _ = wait.PollUntilContextCancel(requests, 100*time.Millisecond, true, idle); requests.Err() == nil {
		s.log.Info("drained")
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	for _, server := range servers {
		_ = server.Shutdown(last)
	}
	return nil
}

// headerTime is how long the headers of a request may take to arrive.
const headerTime = 32 * time.Second

// bound returns a listener on socket that keeps to its limits, and shows them as metrics.
func (s *Server) bound(l listener, socket *net.TCPListener, tlsConfig *tls.Config) *inbound.Listener {
	config := inbound.Config{
		Connections: s.limits.connections, HeaderMemory: s.limits.headerMemory, HelloTimeout: headerTime,
		Window: maxStreams * kube.UploadWindow, TLS: tlsConfig,
		Closed: func(limit string, caller net.Addr, err error) {
			s.metrics.refused.WithLabelValues(limit).Inc()
			s.log.Debug("connection closed", "listener", string(l), "limit", limit, "caller", caller.String(), "error", err)
		},
	}
	prefix := ""
	if l == operations {
		config.Connections, config.HeaderMemory, config.TLS = opsConnections, s.limits.headerMemory/4, nil
		prefix = "operations_"
	}
	bounded := inbound.New(socket, config)
	connections := func() int64 { n, _ := bounded.InUse(); return int64(n) }
	headers := func() int64 { _, n := bounded.InUse(); return n }
	s.metrics.limit(prefix+"connections", int64(config.Connections), connections)
	s.metrics.limit(prefix+"header_memory_bytes", config.HeaderMemory, headers)
	return bounded
}

// newHTTPServer returns the server of one listener. Its requests' contexts end with ctx.
func newHTTPServer(ctx context.Context, l listener, handler http.Handler, log *slog.Logger) *http.Server {
	server := &http.Server{
		Handler: handler, ConnContext: inbound.ConnContext,
		MaxHeaderBytes: maxHeaderBytes, ReadHeaderTimeout: headerTime,
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelError), // panics, above all
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	if l == tunnel {
		server.Protocols = new(http.Protocols)
		server.Protocols.SetHTTP1(true)
		server.Protocols.SetUnencryptedHTTP2(true) // TLS has ended in the listener, which alone lets HTTP/2 in
		server.HTTP2 = &http.HTTP2Config{
			MaxConcurrentStreams:          maxStreams,
			MaxReceiveBufferPerStream:     kube.UploadWindow,
			MaxReceiveBufferPerConnection: maxStreams * kube.UploadWindow, // streams that nobody reads must not stall the others
			MaxReadFrameSize:              16 << 10,                       // a connection keeps a buffer of this size
			SendPingTimeout:               headerTime,                     // unfinished headers too end without an answer
		}
	} else { // on the tunnel listener these timeouts would cut watches, logs and exec
		server.ReadTimeout, server.WriteTimeout, server.IdleTimeout = time.Minute, time.Minute, 2*time.Minute
		server.MaxHeaderBytes = opsHeaderBytes
	}
	return server
}
