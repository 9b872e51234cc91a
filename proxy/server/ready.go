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

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/proxy/answer"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// checkAge is how long the result of a check of another process is reused: frequent probes cost nothing more.
const checkAge = time.Second

// readiness holds the checks of /ready by their names.
type readiness struct {
	checks map[string]*check
	tunnel *tunnelCheck
}

func newReadiness(api *kube.Client, runDir string, g *gate, m *metrics) *readiness {
	t := &tunnelCheck{runDir: runDir, metrics: m}
	if lease, err := frpc.ReadLease(runDir); err == nil {
		t.https.Store(lease.Frpc.Tunnel.Type == "https")
	}
	r := &readiness{tunnel: t, checks: map[string]*check{
		"kubernetes": {age: checkAge, run: api.CheckReady},
		"tunnel":     {age: checkAge, run: t.run, note: func() string { return t.status().LeaseProblem }},
		"shutdown": {run: func(context.Context) error {
			if _, _, closed := g.state(); closed {
				return errors.New("the agent is shutting down and accepts no new requests")
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
	age    time.Duration // how long a result is reused
	run    func(context.Context) error
	note   func() string // the detail of a check that passes; may be nil
	passed prometheus.Gauge

	running sync.Mutex
	last    atomic.Pointer[result]
}

// result is what a check has found.
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
	c.passed.Set(boolValue(err == nil))
	return err
}

// boolValue returns the value of a metric that says yes or no.
func boolValue(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// refresh refreshes all checks. Called regularly, it keeps their metrics, and since when the tunnel is up, current
// without any request.
func (r *readiness) refresh(ctx context.Context) {
	for _, c := range r.checks {
		_ = c.refresh(ctx)
	}
}

// getReady answers GET /ready, without the checks named by ?exclude=. It says why a check fails on the operations
// listener, and on the tunnel listener to callers with the agent's token.
func (s *Server) getReady(l listener) http.HandlerFunc {
	type checkResult struct {
		OK     bool   `json:"ok"`
		Detail string `json:"detail,omitempty"`
	}
	return func(w http.ResponseWriter, r *http.Request) {
		query, err := url.ParseQuery(r.URL.RawQuery)
		if err != nil {
			answer.WriteProblem(w, http.StatusBadRequest, "invalid query: give ?exclude=NAME, several joined by &")
			return
		}
		excluded := query["exclude"]
		for _, name := range excluded {
			if s.ready.checks[name] == nil {
				answer.WriteProblem(w, http.StatusBadRequest,
					fmt.Sprintf("unknown check %.50q: give kubernetes, tunnel or shutdown", name))
				return
			}
		}
		refused := s.auth.check(r)
		detailed := l == operations || refused == nil
		if !detailed && refused.reason != "none" && s.throttle(w, r, refused) {
			return
		}
		code, status := http.StatusOK, "ready"
		checks := map[string]checkResult{}
		for name, c := range s.ready.checks {
			if slices.Contains(excluded, name) {
				continue
			}
			err := c.refresh(r.Context())
			if err != nil {
				code, status = http.StatusServiceUnavailable, "not ready"
			}
			o := checkResult{OK: err == nil}
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
