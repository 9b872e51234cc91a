package server

import (
	"context"
	"net/http"
	"sync"
	"time"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/proxy/answer"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// status is the answer of GET /api/agent/status.
type status struct {
	Agent        agentStatus        `json:"agent"`
	ControlPlane controlPlaneStatus `json:"control_plane"`
	Tunnel       tunnelStatus       `json:"tunnel"`
	Cluster      kube.Summary       `json:"cluster"`
	Timestamp    time.Time          `json:"timestamp"` // when the cluster was read
}

type agentStatus struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Cluster   string    `json:"cluster"`
	Instance  string    `json:"instance"`
	Version   string    `json:"version"`
	StartedAt time.Time `json:"started_at"`
}

// controlPlaneStatus says when the control plane last sent a heartbeat.
type controlPlaneStatus struct {
	Heartbeats    uint64     `json:"heartbeats"`     // since the start
	LastHeartbeat *time.Time `json:"last_heartbeat"` // null: none since the start
}

// tunnelStatus is the state of frpc and the lease.
type tunnelStatus struct {
	Connected      bool               `json:"connected"`
	Since          *time.Time         `json:"since"`            // when Connected last changed
	Detail         string             `json:"detail,omitempty"` // why it is not connected
	FrpcRestarts   uint64             `json:"frpc_restarts"`    // seen since the start: frpc had ended and answered again
	Proxies        []frpc.ProxyStatus `json:"proxies"`
	LeaseIssuedAt  *time.Time         `json:"lease_issued_at"`
	LeaseExpiresAt *time.Time         `json:"lease_expires_at"`        // null: unknown, or never
	LeaseProblem   string             `json:"lease_problem,omitempty"` // why the lease is not renewed, and since when
}

// statusAge is how long a summary is reused: frequent requests cost the API server nothing more.
const statusAge = 5 * time.Second

// clusterSummary reads the cluster, and shares the last summary. Safe for concurrent use.
type clusterSummary struct {
	api     *kube.Client
	metrics *metrics

	mu   sync.Mutex
	at   time.Time
	last kube.Summary
}

// get returns a summary that is at most statusAge old, and when it was read.
func (c *clusterSummary) get(ctx context.Context) (kube.Summary, time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.at) > statusAge {
		// Others wait for the result: a caller that leaves must not end the reading.
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

// getStatus answers GET /api/agent/status. What cannot be read is null, with a reason.
func (s *Server) getStatus(w http.ResponseWriter, r *http.Request) {
	summary, at := s.cluster.get(r.Context())
	_ = s.checks["tunnel"].refresh(r.Context()) // the error is in the status
	answer.WriteJSON(w, http.StatusOK, status{
		Agent: s.agent, ControlPlane: controlPlaneStatus{s.heartbeats.Load(), s.lastHeartbeat.Load()},
		Tunnel: s.tunnel.status(), Cluster: summary, Timestamp: at.UTC(),
	})
}

// postHeartbeat answers POST /api/agent/heartbeat. It ignores the body.
func (s *Server) postHeartbeat(w http.ResponseWriter, _ *http.Request) {
	s.lastHeartbeat.Store(new(time.Now().UTC()))
	sequence := s.heartbeats.Add(1)
	s.metrics.lastHeartbeat.SetToCurrentTime()
	answer.WriteJSON(w, http.StatusOK, map[string]any{
		"status": "alive", "agent": s.agent, "sequence": sequence,
		"uptime_seconds": int64(time.Since(s.agent.StartedAt).Seconds()),
	})
}
