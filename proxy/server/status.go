package server

import (
	"context"
	"net/http"
	"sync"
	"time"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// status is the answer of GET /api/agent/status.
type status struct {
	Agent        agentStatus        `json:"agent"`
	ControlPlane controlPlaneStatus `json:"control_plane"`
	Tunnel       tunnelStatus       `json:"tunnel"`
	Cluster      kube.Summary       `json:"cluster"`
	Timestamp    time.Time          `json:"timestamp"` // when the cluster was looked at
}

type agentStatus struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Cluster   string    `json:"cluster"`
	Instance  string    `json:"instance"`
	Version   string    `json:"version"`
	StartedAt time.Time `json:"started_at"`
}

// controlPlaneStatus is what is known of the control plane: its last heartbeat.
type controlPlaneStatus struct {
	Heartbeats    uint64     `json:"heartbeats"`     // since the start
	LastHeartbeat *time.Time `json:"last_heartbeat"` // null: none since the start
}

// tunnelStatus is what frpc and the lease say.
type tunnelStatus struct {
	Connected      bool               `json:"connected"`
	Since          *time.Time         `json:"since"`            // when Connected was first seen as it is
	Detail         string             `json:"detail,omitempty"` // why it is not connected
	FrpcRestarts   uint64             `json:"frpc_restarts"`    // seen since the start: frpc was away and came back
	Proxies        []frpc.ProxyStatus `json:"proxies"`
	LeaseIssuedAt  *time.Time         `json:"lease_issued_at"`
	LeaseExpiresAt *time.Time         `json:"lease_expires_at"`        // null: unknown, or no end
	LeaseProblem   string             `json:"lease_problem,omitempty"` // there is no next lease: since when, and why
}

// statusAge is how long an answer is good for: polling oftener costs the API server nothing more.
const statusAge = 5 * time.Second

// clusterSummary shares what was last read of the cluster.
type clusterSummary struct {
	api     *kube.Proxy
	metrics *metrics

	mu   sync.Mutex
	at   time.Time
	last kube.Summary
}

func (c *clusterSummary) get(ctx context.Context) (kube.Summary, time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.at) > statusAge {
		// No caller's leaving cuts short what others wait for.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		begin := time.Now()
		c.last = c.api.Summarize(ctx)
		c.at = time.Now()
		c.metrics.statusDuration.Observe(c.at.Sub(begin).Seconds())
		c.metrics.statusRequests.Add(float64(c.last.Requests))
	}
	return c.last, c.at
}

// timeOrNil makes null of a time that is not known.
func timeOrNil(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return new(t.UTC())
}

// getStatus answers GET /api/agent/status. What cannot be read is null, with a reason, and the rest is served.
func (s *Server) getStatus(w http.ResponseWriter, r *http.Request) {
	summary, at := s.cluster.get(r.Context())
	_ = s.ready.checks["tunnel"].result(r.Context()) // what is wrong stands in the status
	writeJSON(w, http.StatusOK, status{
		Agent: s.agent, ControlPlane: controlPlaneStatus{s.heartbeats.Load(), s.lastHeartbeat.Load()},
		Tunnel: s.ready.tunnel.status(), Cluster: summary, Timestamp: at.UTC(),
	})
}

// heartbeat answers POST /api/agent/heartbeat, the control plane's pulse. A body is not looked at.
func (s *Server) heartbeat(w http.ResponseWriter, _ *http.Request) {
	s.lastHeartbeat.Store(new(time.Now().UTC()))
	sequence := s.heartbeats.Add(1)
	s.metrics.lastHeartbeat.SetToCurrentTime()
	writeJSON(w, http.StatusOK, map[string]any{
		"status": "alive", "agent": s.agent, "uptime_seconds": int64(time.Since(s.agent.StartedAt).Seconds()), "sequence": sequence,
	})
}
