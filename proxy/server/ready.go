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
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// checkAge is how long the outcome of a check of another process is good for: probing oftener costs nobody anything.
const checkAge = time.Second

// readiness holds the checks of /ready by their names.
type readiness struct {
	checks map[string]*check
	tunnel *tunnelCheck
}

func newReadiness(api *kube.Proxy, runDir string, g *gate, m *metrics) *readiness {
	t := &tunnelCheck{runDir: runDir, metrics: m}
	if lease, err := frpc.ReadLease(runDir); err == nil {
		t.https.Store(lease.Frpc.Tunnel.Type == "https")
	}
	r := &readiness{tunnel: t, checks: map[string]*check{
		"kubernetes": {age: checkAge, run: api.Check},
		"tunnel":     {age: checkAge, run: t.run, note: func() string { return t.status().LeaseProblem }},
		"shutdown": {run: func(context.Context) error {
			if _, _, closed := g.state(); closed {
				return errors.New("the agent is shutting down and takes nothing new")
			}
			return nil
		}},
	}}
	for name, c := range r.checks {
		c.passed = m.checks.WithLabelValues(name)
	}
	return r
}

// check is a condition of readiness.
type check struct {
	age    time.Duration // how long an outcome is good for
	run    func(context.Context) error
	note   func() string // what to say though it passes; may be nil
	passed prometheus.Gauge

	running sync.Mutex
	last    atomic.Pointer[outcome]
}

// outcome is what a check has found.
type outcome struct {
	at  time.Time
	err error
}

// result runs the check unless its last outcome is fresh. While it runs, other callers get the outcome before: many
// who wait would be many to hold. No caller's leaving cuts a run short.
func (c *check) result(ctx context.Context) error {
	last := cmp.Or(c.last.Load(), &outcome{err: errors.New("this was not checked yet: ask again")})
	if time.Since(last.at) < c.age || !c.running.TryLock() {
		return last.err
	}
	defer c.running.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 8*time.Second)
	defer cancel()
	err := c.run(ctx)
	c.last.Store(&outcome{time.Now(), err})
	c.passed.Set(boolValue(err == nil))
	return err
}

// boolValue is how a metric says yes or no.
func boolValue(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// run runs all checks. If that is done now and then, metrics, and since when the tunnel is up, hold without anyone
// asking.
func (r *readiness) run(ctx context.Context) {
	for _, c := range r.checks {
		_ = c.result(ctx)
	}
}

// tunnelCheck looks at the way to frps, and remembers what it has seen.
type tunnelCheck struct {
	runDir  string
	metrics *metrics

	loginAt time.Time
	login   error

	https atomic.Bool // the tunnel in force is of type https

	mu       sync.Mutex
	last     tunnelStatus
	frpcUp   bool // frpc has answered once
	frpcAway bool // and was gone at the last look
}

// run looks at the tunnel and says what is wrong with it. Calls must not overlap.
func (t *tunnelCheck) run(ctx context.Context) error {
	lease, err := frpc.ReadLease(t.runDir)
	var proxies []frpc.ProxyStatus
	if err == nil {
		proxies, err = lease.Frpc.Admin.Status(ctx)
		if err == nil {
			err = t.judge(ctx, lease, proxies)
		} else {
			err = fmt.Errorf("%w: check that the frpc container runs, and its log", err)
		}
		if problem := leaseProblem(lease); problem != "" && err != nil {
			err = fmt.Errorf("%w; %s", err, problem)
		}
	}
	t.remember(lease, proxies, err)
	return err
}

func (t *tunnelCheck) remember(lease *frpc.Lease, proxies []frpc.ProxyStatus, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if proxies != nil { // frpc answers
		if t.frpcAway {
			t.last.FrpcRestarts++
			t.metrics.frpcRestarts.Inc()
		}
		t.frpcUp, t.frpcAway = true, false
	} else if t.frpcUp && errors.Is(err, syscall.ECONNREFUSED) { // nobody listens: it has ended
		t.frpcAway = true
	}
	now := tunnelStatus{Connected: err == nil, Since: t.last.Since, FrpcRestarts: t.last.FrpcRestarts, Proxies: proxies}
	if now.Since == nil || now.Connected != t.last.Connected {
		now.Since = timeOrNil(time.Now())
	}
	if err != nil {
		now.Detail = err.Error()
	}
	if len(proxies) > 0 { // what frpc has, which is not what the lease says while it has yet to be restarted
		t.https.Store(!slices.ContainsFunc(proxies, func(p frpc.ProxyStatus) bool { return p.Type != "https" }))
	} else if lease != nil {
		t.https.Store(lease.Frpc.Tunnel.Type == "https")
	}
	failing, leaseEnd := false, 0.0
	if lease != nil {
		now.LeaseProblem, failing = leaseProblem(lease), lease.Renewal != nil || overdue(lease)
		now.LeaseIssuedAt, now.LeaseExpiresAt = timeOrNil(lease.IssuedAt), timeOrNil(lease.ExpiresAt)
		if !lease.ExpiresAt.IsZero() {
			leaseEnd = float64(lease.ExpiresAt.Unix())
		}
	}
	t.last = now
	t.metrics.tunnelUp.Set(boolValue(now.Connected))
	t.metrics.renewalFailing.Set(boolValue(failing))
	t.metrics.leaseEnd.Set(leaseEnd)
}

// leaseProblem says that there is no next lease, since when, and why; empty if all is well.
func leaseProblem(lease *frpc.Lease) string {
	switch ended := !lease.ExpiresAt.IsZero() && time.Now().After(lease.ExpiresAt); {
	case lease.Renewal != nil:
		return fmt.Sprintf("the lease cannot be renewed since %s: %s", lease.Renewal.FailingSince.Format(time.RFC3339), lease.Renewal.Error)
	case ended:
		return fmt.Sprintf("the lease ended at %s, and frps will refuse the next login: check the bootstrap container and its log, and that the run directory is not full", lease.ExpiresAt.Format(time.RFC3339))
	case overdue(lease):
		return fmt.Sprintf("the lease should have been renewed by now, and ends at %s: check the bootstrap container and its log, and that the run directory is not full", lease.ExpiresAt.Format(time.RFC3339))
	default:
		return ""
	}
}

// overdue reports whether most of the lease's life is over. bootstrap renews it after 65 to 75%, and notes in it if
// that fails: unless bootstrap has ended, or the run directory is full. Very short leases are never overdue.
func overdue(lease *frpc.Lease) bool {
	life := lease.ExpiresAt.Sub(lease.IssuedAt) // negative for a lease without an end
	return life >= 2*time.Minute && time.Since(lease.IssuedAt) > life/100*85
}

func (t *tunnelCheck) status() tunnelStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.last
}

// loginAge is how long the outcome of a trial login is good for. When a frps goes down, all of its agents
// come back at once: their checks must not double that.
const loginAge = 15 * time.Second

// judge looks for a running proxy among those that frpc has. If there is none, it finds out why.
func (t *tunnelCheck) judge(ctx context.Context, lease *frpc.Lease, proxies []frpc.ProxyStatus) error {
	for _, p := range proxies {
		if p.Status == "running" {
			t.loginAt = time.Time{}
			return nil
		}
		if p.Err != "" {
			return fmt.Errorf("frps refuses the tunnel (%s: %s): check what frps.toml allows (vhostHTTPSPort, subDomainHost, allowPorts), the agent's id, and that no other agent has the same", p.Status, p.Err)
		}
		if p.Status == "check failed" {
			return errors.New("frpc has withdrawn the tunnel, because the proxy drains or does not answer it: check proxy.listen_addr (PIPEOPS_LISTEN_ADDR), the same for bootstrap and the proxy")
		}
	}
	if time.Since(t.loginAt) > loginAge {
		_, t.login = frpc.Login(ctx, lease.Frpc)
		t.loginAt = time.Now()
	}
	if t.login != nil {
		return t.login
	}
	return errors.New("frps accepts the login, but frpc has no tunnel yet: it connects within 20 s; if not, see frpc's log")
}

// getReady answers GET /ready. Checks named by ?exclude= are left out. Why a check fails is told on the
// operations listener, and on the tunnel listener to those who show the agent's token.
func (s *Server) getReady(l listener) http.HandlerFunc {
	type answer struct {
		OK     bool   `json:"ok"`
		Detail string `json:"detail,omitempty"`
	}
	return func(w http.ResponseWriter, r *http.Request) {
		query, err := url.ParseQuery(r.URL.RawQuery)
		if err != nil {
			writeProblem(w, http.StatusBadRequest, "the query cannot be read: give ?exclude=NAME, joined by &")
			return
		}
		excluded := query["exclude"]
		for _, name := range excluded {
			if s.ready.checks[name] == nil {
				writeProblem(w, http.StatusBadRequest, fmt.Sprintf("no check is named %.50q: there are kubernetes, tunnel and shutdown", name))
				return
			}
		}
		refused := s.auth.check(r)
		detailed := l == operations || refused == nil
		if !detailed && refused.reason != "none" && s.throttled(w, r, refused) {
			return
		}
		code, status := http.StatusOK, "ready"
		checks := map[string]answer{}
		for name, c := range s.ready.checks {
			if slices.Contains(excluded, name) {
				continue
			}
			err := c.result(r.Context())
			if err != nil {
				code, status = http.StatusServiceUnavailable, "not ready"
			}
			o := answer{OK: err == nil}
			switch {
			case !detailed:
			case err != nil:
				o.Detail = err.Error()
			case c.note != nil:
				o.Detail = c.note()
			}
			checks[name] = o
		}
		writeJSON(w, code, map[string]any{"status": status, "checks": checks})
	}
}
