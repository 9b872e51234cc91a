package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/proxy/access"
	"github.com/pipeops/vm-agent/proxy/answer"
	"github.com/pipeops/vm-agent/proxy/kube"
)

const (
	// checkAge is how long a check of another process is reused: frequent probes cost nothing more.
	checkAge = time.Second
	// statusAge is how long a summary of the cluster is reused: frequent requests cost the API server nothing more.
	statusAge = 5 * time.Second
	// loginAge is how long a login check is reused: when a frps restarts, all of its agents log in at once.
	loginAge = 15 * time.Second
)

func (s *Server) addChecks() {
	s.tunnel = &tunnelCheck{config: s.config, metrics: s.metrics}
	if lease, err := frpc.ReadLease(s.config.RunDir); err == nil {
		s.tunnel.https.Store(lease.Frpc.Tunnel.Type == "https")
	}
	s.checks = map[string]*check{
		agentapi.CheckKubernetes: {age: checkAge, run: s.api.CheckReady},
		agentapi.CheckTunnel:     {age: checkAge, run: s.tunnel.run},
		agentapi.CheckShutdown: {run: func(context.Context) error {
			if s.gate.draining.Load() {
				return errors.New("the agent is shutting down")
			}
			return nil
		}},
	}
	for name, c := range s.checks {
		c.passed = s.metrics.checks.WithLabelValues(name)
	}
}

// check is a condition of readiness.
type check struct {
	age    time.Duration // how long a result is reused
	run    func(context.Context) error
	passed prometheus.Gauge

	running sync.Mutex
	last    atomic.Pointer[result]
}

type result struct {
	at  time.Time
	err error
}

// refresh runs the check unless its last result is fresh, and returns the result. While it runs, other callers get the
// previous result, because those that wait would hold memory. A caller that leaves does not end the run.
func (c *check) refresh(ctx context.Context) error {
	last := cmp.Or(c.last.Load(), &result{err: errors.New("not checked yet: try again")})
	if time.Since(last.at) < c.age || !c.running.TryLock() {
		return last.err
	}
	defer c.running.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 8*time.Second)
	defer cancel()
	err := c.run(ctx)
	c.last.Store(&result{time.Now(), err})
	c.passed.Set(boolValue[err == nil])
	return err
}

// boolValue is the value of a metric that says yes or no.
var boolValue = map[bool]float64{true: 1, false: 0}

// getReady answers GET /ready: with the checks that ?only= names, or all, without those that ?exclude= names. It says
// why a check fails on the operations listener, and on the tunnel listener to callers with the agent's token.
func (s *Server) getReady(l listener) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		query, err := url.ParseQuery(r.URL.RawQuery)
		if err != nil {
			answer.WriteProblem(w, http.StatusBadRequest, "invalid query: give ?only=NAME or ?exclude=NAME, several joined by &")
			return
		}
		only, excluded := query["only"], query["exclude"]
		for _, name := range slices.Concat(only, excluded) {
			if s.checks[name] == nil {
				answer.WriteProblem(w, http.StatusBadRequest,
					fmt.Sprintf("unknown check %.50q: give kubernetes, tunnel or shutdown", name))
				return
			}
		}
		refused := s.auth.check(r.Header, "Authorization")
		detailed := l == operations || refused == nil
		if !detailed && refused.reason != "none" && s.throttle(w, r, refused) {
			return
		}
		code, ready := http.StatusOK, agentapi.Ready{Status: "ready", Checks: map[string]agentapi.Check{}}
		for name, c := range s.checks {
			if len(only) > 0 && !slices.Contains(only, name) || slices.Contains(excluded, name) {
				continue
			}
			err := c.refresh(r.Context())
			if err != nil {
				code, ready.Status = http.StatusServiceUnavailable, "not ready"
			}
			check := agentapi.Check{OK: err == nil}
			switch {
			case !detailed:
			case err != nil:
				check.Detail = err.Error()
			case name == agentapi.CheckTunnel:
				check.Detail = s.tunnel.status().LeaseProblem
			}
			ready.Checks[name] = check
		}
		answer.WriteJSON(w, code, ready)
	}
}

// tunnelCheck checks the tunnel to frps, and records its state.
type tunnelCheck struct {
	config  *config.Config
	metrics *metrics

	loginAt time.Time // of the last login check
	login   error     // its result

	frpcSeen bool // frpc has answered once
	frpcDown bool // and had ended at the last check

	https atomic.Bool // frpc's tunnel is of type https
	last  atomic.Pointer[tunnelStatus]
}

func (t *tunnelCheck) status() tunnelStatus { return *cmp.Or(t.last.Load(), &tunnelStatus{}) }

// run returns why the tunnel is not connected, nil if it is. Calls must not overlap.
func (t *tunnelCheck) run(ctx context.Context) error {
	lease, err := frpc.ReadLease(t.config.RunDir)
	var proxies []frpc.ProxyStatus
	if err == nil {
		proxies, err = lease.Frpc.Admin.Status(ctx)
		err = t.explain(ctx, lease, proxies, err)
		if problem := leaseProblem(lease); problem != "" && err != nil {
			err = fmt.Errorf("%w; %s", err, problem)
		}
	}
	t.record(lease, proxies, err)
	return err
}

// record updates the status and the metrics. lease and proxies are nil if they could not be read.
func (t *tunnelCheck) record(lease *frpc.Lease, proxies []frpc.ProxyStatus, err error) {
	last := t.status()
	now := tunnelStatus{Connected: err == nil, Since: last.Since, FrpcRestarts: last.FrpcRestarts, Proxies: proxies}
	if proxies != nil { // frpc answers
		if t.frpcDown {
			now.FrpcRestarts++
			t.metrics.frpcRestarts.Inc()
		}
		t.frpcSeen, t.frpcDown = true, false
	} else if t.frpcSeen && frpc.StateOf(nil, err) == frpc.Down {
		t.frpcDown = true
	}
	if now.Since == nil || now.Connected != last.Connected {
		now.Since = new(time.Now().UTC())
	}
	if err != nil {
		now.Detail = err.Error()
	}
	if len(proxies) > 0 { // not the lease's type: frpc may not have been restarted since
		t.https.Store(!slices.ContainsFunc(proxies, func(p frpc.ProxyStatus) bool { return p.Type != "https" }))
	} else if lease != nil {
		t.https.Store(lease.Frpc.Tunnel.Type == "https")
	}
	failing, leaseStart, leaseEnd := false, 0.0, 0.0
	if lease != nil {
		now.LeaseProblem, failing = leaseProblem(lease), lease.Renewal != nil || overdue(lease)
		now.LeaseIssuedAt, leaseStart = new(lease.IssuedAt.UTC()), float64(lease.IssuedAt.Unix())
		if !lease.ExpiresAt.IsZero() {
			now.LeaseExpiresAt, leaseEnd = new(lease.ExpiresAt.UTC()), float64(lease.ExpiresAt.Unix())
		}
	}
	t.last.Store(&now)
	t.metrics.tunnelUp.Set(boolValue[now.Connected])
	t.metrics.renewalFailing.Set(boolValue[failing])
	t.metrics.leaseStart.Set(leaseStart)
	t.metrics.leaseEnd.Set(leaseEnd)
}

// leaseProblem returns why the lease is not renewed, and since when; empty if the renewal works.
func leaseProblem(lease *frpc.Lease) string {
	const check = ": check the bootstrap container and its log, and that the run directory is not full"
	end := lease.ExpiresAt.Format(time.RFC3339)
	switch expired := !lease.ExpiresAt.IsZero() && time.Now().After(lease.ExpiresAt); {
	case lease.Renewal != nil:
		return fmt.Sprintf("the renewal of the lease has failed since %s: %s",
			lease.Renewal.FailingSince.Format(time.RFC3339), lease.Renewal.Error)
	case expired:
		return "the lease expired at " + end + ", and frps will refuse the next login" + check
	case overdue(lease):
		return "the renewal of the lease is overdue, and it expires at " + end + check
	}
	return ""
}

// overdue reports whether more than 85% of a life of two minutes or more is over. bootstrap renews a lease after 65 to
// 75% and records a failure in it, but cannot if it has ended or the run directory is full.
func overdue(lease *frpc.Lease) bool {
	life := lease.ExpiresAt.Sub(lease.IssuedAt) // negative for a lease without an end
	return life >= 2*time.Minute && time.Since(lease.IssuedAt) > life/100*85
}

// explain returns nil if frpc's proxy is running, else why not, by frpc's answer or err. To find out, it may log in to
// frps.
func (t *tunnelCheck) explain(ctx context.Context, lease *frpc.Lease, proxies []frpc.ProxyStatus, err error) error {
	switch frpc.StateOf(proxies, err) {
	case frpc.Running:
		t.loginAt = time.Time{}
	case frpc.LoggedOut, frpc.Starting:
		if time.Since(t.loginAt) > loginAge {
			_, t.login = frpc.Login(ctx, lease.Frpc)
			t.loginAt = time.Now()
		}
		if t.login != nil {
			return t.config.FRP.ExplainLogin(t.login)
		}
		return errors.New("frps accepts the login, but frpc has no tunnel yet: check frpc's log if it has none after 20 s")
	}
	return frpc.Explain(proxies, err)
}

// status is the answer of GET /api/agent/status.
type status struct {
	Agent        agentStatus        `json:"agent"`
	ControlPlane controlPlaneStatus `json:"control_plane"`
	Tunnel       tunnelStatus       `json:"tunnel"`
	Access       accessStatus       `json:"access"`
	Cluster      kube.Summary       `json:"cluster"`
	Timestamp    time.Time          `json:"timestamp"` // when the cluster was read
}

// accessStatus is as whom callers act, and what limits them.
type accessStatus struct {
	Identity string `json:"identity"`
	access.State

	OwnNamespace string `json:"own_namespace"`
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

// readCluster returns a summary that is at most statusAge old, and when it was read.
func (s *Server) readCluster(ctx context.Context) (kube.Summary, time.Time) {
	s.summaryMu.Lock()
	defer s.summaryMu.Unlock()
	if time.Since(s.summaryAt) > statusAge {
		// Others wait for the result: a caller that leaves must not end the reading.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		begin := time.Now()
		s.summary = s.api.Summarize(ctx)
		s.summaryAt = time.Now()
		s.metrics.statusDuration.Observe(s.summaryAt.Sub(begin).Seconds())
	}
	return s.summary, s.summaryAt
}

// getStatus answers GET /api/agent/status. What cannot be read is null, with a reason.
func (s *Server) getStatus(w http.ResponseWriter, r *http.Request) {
	summary, at := s.readCluster(r.Context())
	_ = s.checks[agentapi.CheckTunnel].refresh(r.Context()) // the error is in the status
	owner, settings := s.owner.State(), s.config.Access
	owner.Detail = cmp.Or(owner.Detail, owner.Held)
	answer.WriteJSON(w, http.StatusOK, status{
		Access: accessStatus{settings.Identity, owner, settings.OwnNamespace},
		Agent:  s.agent, ControlPlane: controlPlaneStatus{s.heartbeats.Load(), s.lastHeartbeat.Load()},
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
