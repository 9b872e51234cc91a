package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// checkAge is how long the outcome of a check of another process is good for: probing oftener costs nobody
// anything.
const checkAge = time.Second

// readiness holds the named checks of /ready.
type readiness struct{ checks []*check }

func newReadiness(api *kube.Proxy, runDir string, g *gate, m *metrics) *readiness {
	r := &readiness{checks: []*check{
		{name: "kubernetes", age: checkAge, run: api.Check},
		{name: "tunnel", age: checkAge, run: (&tunnelCheck{runDir: runDir}).run},
		{name: "shutdown", run: func(context.Context) error {
			if g.isClosed() {
				return errors.New("the agent is shutting down and takes nothing new")
			}
			return nil
		}},
	}}
	for _, c := range r.checks {
		c.passed = m.checks.WithLabelValues(c.name)
	}
	return r
}

// check is one named condition of readiness.
type check struct {
	name   string
	age    time.Duration // how long an outcome is good for
	run    func(context.Context) error
	passed interface{ Set(float64) }

	mu   sync.Mutex
	at   time.Time
	last error
}

// result runs the check unless its last outcome is fresh. Callers at the same time share one run, which no
// caller's leaving cuts short.
func (c *check) result(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.at) < c.age {
		return c.last
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 8*time.Second)
	defer cancel()
	c.last = c.run(ctx)
	c.at = time.Now()
	if c.last == nil {
		c.passed.Set(1)
	} else {
		c.passed.Set(0)
	}
	return c.last
}

// tunnelCheck looks at the way to frps.
type tunnelCheck struct {
	runDir string

	loginAt time.Time
	login   error
}

// loginAge is how long the outcome of a trial login is good for. When a frps goes down, all of its agents
// come back at once: their checks must not double that.
const loginAge = 15 * time.Second

// run asks frpc whether its proxy is running. If not, it finds out why. Calls must not overlap.
func (t *tunnelCheck) run(ctx context.Context) error {
	lease, err := frpc.ReadLease(t.runDir)
	if err != nil {
		return err
	}
	proxies, err := frpc.NewAdminClient(lease.Frpc.Admin).Status(ctx)
	if err != nil {
		return fmt.Errorf("%w: check that the frpc container runs, and its log", err)
	}
	for _, p := range proxies {
		if p.Status == "running" {
			t.loginAt = time.Time{}
			return nil
		}
		if p.Err != "" {
			return fmt.Errorf("frps refuses the tunnel (%s: %s): check the agent's id, and that no other agent has the same", p.Status, p.Err)
		}
	}
	if time.Since(t.loginAt) > loginAge {
		t.login = frpc.Login(ctx, lease.Frpc)
		t.loginAt = time.Now()
	}
	if t.login != nil {
		return t.login
	}
	return errors.New("frps accepts the login, but frpc has no tunnel yet: it connects within 20 s; if not, see frpc's log")
}

// getReady answers GET /ready. Checks named by ?exclude= are left out. Why a check fails is told on the
// operations listener, and on the tunnel listener to those who show the agent's token.
func (s *server) getReady(l listener) http.HandlerFunc {
	type outcome struct {
		OK     bool   `json:"ok"`
		Detail string `json:"detail,omitempty"`
	}
	return func(w http.ResponseWriter, r *http.Request) {
		excluded := r.URL.Query()["exclude"]
		for _, name := range excluded {
			if names := s.ready.names(); !slices.Contains(names, name) {
				writeProblem(w, http.StatusBadRequest, fmt.Sprintf("no check is named %.50q: there are %s", name, strings.Join(names, ", ")))
				return
			}
		}
		detailed := l == operations || s.auth.check(r) == ""
		code, status := http.StatusOK, "ready"
		checks := map[string]outcome{}
		for _, c := range s.ready.checks {
			if slices.Contains(excluded, c.name) {
				continue
			}
			err := c.result(r.Context())
			o := outcome{OK: err == nil}
			if err != nil {
				code, status = http.StatusServiceUnavailable, "not ready"
				if detailed {
					o.Detail = err.Error()
				}
			}
			checks[c.name] = o
		}
		writeJSON(w, code, map[string]any{"status": status, "checks": checks})
	}
}

func (r *readiness) names() []string {
	var names []string
	for _, c := range r.checks {
		names = append(names, c.name)
	}
	return names
}
