package server

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

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
