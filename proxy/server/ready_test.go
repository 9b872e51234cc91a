package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc"
)

// TestLeaseProblemsAreReported: bootstrap cannot always record that the renewal fails, because it has ended or the run
// directory is full. Then the lease's age shows it.
func TestLeaseProblemsAreReported(t *testing.T) {
	now := time.Now()
	lease := func(age, left time.Duration) *frpc.Lease {
		return &frpc.Lease{IssuedAt: now.Add(-age), ExpiresAt: now.Add(left)}
	}
	noted := lease(time.Minute, time.Hour)
	noted.Renewal = &frpc.FailedRenewal{FailingSince: now, Error: "it is away"}
	const overdue = "the renewal of the lease is overdue, and it expires at "
	for name, test := range map[string]struct {
		lease   *frpc.Lease
		failing float64
		problem string // its beginning
	}{
		"fresh":                {lease(time.Minute, time.Hour), 0, ""},
		"due":                  {lease(80*time.Minute, 20*time.Minute), 0, ""},
		"overdue":              {lease(86*time.Minute, 14*time.Minute), 1, overdue},
		"of two minutes":       {lease(110*time.Second, 10*time.Second), 1, overdue},
		"of less":              {lease(100*time.Second, 10*time.Second), 0, ""},
		"of a hundred years":   {lease(50*365*24*time.Hour, 50*365*24*time.Hour), 0, ""},
		"without an end":       {&frpc.Lease{IssuedAt: now.Add(-24 * time.Hour)}, 0, ""},
		"noted by bootstrap":   {noted, 1, "the renewal of the lease has failed since "},
		"ended":                {lease(time.Hour, -time.Second), 1, "the lease expired at "},
		"ended, of no minutes": {lease(time.Minute, -time.Second), 0, "the lease expired at "},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMetrics()
			check := &tunnelCheck{metrics: m}
			check.record(test.lease, nil, nil)
			if got := testutil.ToFloat64(m.renewalFailing); got != test.failing {
				t.Errorf("the metric is %v, want %v", got, test.failing)
			}
			if got := testutil.ToFloat64(m.leaseStart); got != float64(test.lease.IssuedAt.Unix()) {
				t.Errorf("it was issued at %v", got)
			}
			problem := check.status().LeaseProblem
			if !strings.HasPrefix(problem, test.problem) || (problem == "") != (test.problem == "") {
				t.Errorf("the problem is %q, want %q", problem, test.problem)
			}
			const hint = ": check the bootstrap container and its log, and that the run directory is not full"
			if test.problem == overdue && !strings.HasSuffix(problem, hint) {
				t.Errorf("the problem is %q", problem)
			}
		})
	}
}

// TestSlowCheckBlocksNoOtherCaller: while a check of /ready runs, other callers get its previous result.
func TestSlowCheckBlocksNoOtherCaller(t *testing.T) {
	begun, end := make(chan struct{}), make(chan struct{})
	c := &check{passed: prometheus.NewGauge(prometheus.GaugeOpts{}), run: func(context.Context) error {
		close(begun)
		<-end
		return nil
	}}
	done := make(chan error, 1)
	go func() { done <- c.refresh(t.Context()) }()
	<-begun
	if err := c.refresh(t.Context()); err == nil || !strings.Contains(err.Error(), "not checked yet") {
		t.Errorf("before the first outcome: %v", err)
	}
	close(end)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestChecksEndAfterEightSeconds: whoever asked for them, also if it has left.
func TestChecksEndAfterEightSeconds(t *testing.T) {
	left, leave := context.WithCancel(t.Context())
	leave()
	c := &check{passed: prometheus.NewGauge(prometheus.GaugeOpts{}), run: func(ctx context.Context) error {
		end, limited := ctx.Deadline()
		if wait := time.Until(end); !limited || wait > 8*time.Second || wait < 6*time.Second {
			t.Errorf("it ends after %s", wait)
		}
		return ctx.Err()
	}}
	if err := c.refresh(left); err != nil {
		t.Errorf("a caller that has left ends the check: %v", err)
	}
}

// TestReadingsAreShared: so that frequent probes cost nothing more, and what they tell is not old.
func TestReadingsAreShared(t *testing.T) {
	readings := 0
	api := newAPIServer(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/version" {
			readings++
		}
	})
	s := withIdentity(t, api, "agent")
	for name, age := range map[string]time.Duration{"kubernetes": time.Second, "tunnel": time.Second, "shutdown": 0} {
		if s.checks[name].age != age {
			t.Errorf("the check %s is reused for %s", name, s.checks[name].age)
		}
	}
	for _, test := range []struct {
		age  time.Duration
		want int
	}{{time.Hour, 1}, {0, 1}, {4 * time.Second, 1}, {6 * time.Second, 2}} {
		s.summaryAt = s.summaryAt.Add(-test.age)
		if test.age > 0 && test.age < time.Hour {
			s.summaryAt = time.Now().Add(-test.age)
		}
		if s.readCluster(t.Context()); readings != test.want {
			t.Errorf("%s later, the cluster was read %d times, want %d", test.age, readings, test.want)
		}
	}
}

// TestWhyTheTunnelIsDownIsExplained: with a login only if frpc is logged out, and only every 15 s.
func TestWhyTheTunnelIsDownIsExplained(t *testing.T) {
	config := &config.Config{}
	config.FRP.Token = "t"
	check := &tunnelCheck{config: config, metrics: newMetrics()}
	lease := &frpc.Lease{Frpc: frpc.Config{ServerAddr: "127.0.0.1", ServerPort: 1, Protocol: "tcp"}}
	for status, want := range map[string]string{
		"running": "", "check failed": "has withdrawn the tunnel", "start error": "frps refuses the tunnel (start error: taken)",
	} {
		err := check.explain(t.Context(), lease, []frpc.ProxyStatus{{Status: status, Err: "taken"}}, nil)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v", status, err)
		}
	}
	before := errors.New("what the last login found")
	for age, again := range map[time.Duration]bool{14 * time.Second: false, 16 * time.Second: true} {
		check.login, check.loginAt = before, time.Now().Add(-age)
		if err := check.explain(t.Context(), lease, nil, nil); errors.Is(err, before) == again {
			t.Errorf("%s after the last login: %v", age, err)
		}
	}
}

// TestRestartsOfFrpcAreCounted: one that was seen to end and to come back; an answer that is late, or one of frpc's
// first start, is none. The time of the connection is that of its last change.
func TestRestartsOfFrpcAreCounted(t *testing.T) {
	check := &tunnelCheck{metrics: newMetrics()}
	ended, late := fmt.Errorf("frpc: %w", syscall.ECONNREFUSED), errors.New("timeout")
	proxies := []frpc.ProxyStatus{{Type: "https", Status: "running"}}
	lease := &frpc.Lease{}
	var since *time.Time
	for i, step := range []struct {
		proxies   []frpc.ProxyStatus
		err       error
		restarts  uint64
		unchanged bool // since when it is as it is
	}{
		{nil, ended, 0, false}, {proxies, nil, 0, false}, {proxies, nil, 0, true}, {nil, late, 0, false}, {proxies, nil, 0, false},
		{nil, ended, 0, false}, {nil, ended, 0, true}, {[]frpc.ProxyStatus{}, late, 1, true}, {proxies, nil, 1, false},
	} {
		check.record(lease, step.proxies, step.err)
		now := check.status()
		if now.FrpcRestarts != step.restarts || now.Connected != (step.err == nil) || (now.Since == since) != step.unchanged {
			t.Errorf("step %d: %+v", i, now)
		}
		since = now.Since
	}
	for kind, https := range map[string]bool{"https": true, "http": false} {
		proxies[0].Type = kind
		if check.record(lease, proxies, nil); check.https.Load() != https {
			t.Errorf("a tunnel of type %s is https: %v", kind, !https)
		}
	}
}
