package attack

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

// Limit is the memory limit of the proxy's container, in MB.
const Limit = 256 * 1024 * 1024 / 1e6

// These bound what may be left after an attack, because a process that was just used does not return to the byte.
const (
	leftMB         = 15
	leftGoroutines = 20
)

// Victim is a proxy that is attacked.
type Victim struct {
	Pid        int
	Operations Target        // its operations listener
	Honest     Target        // how honest callers reach it
	Slowest    time.Duration // bound of the honest calls' p99; 0: none
	Within     time.Duration // how long it may take to recover

	rss        float64 // MB, before
	goroutines int     // before
	ended      time.Time
}

// Wave is an attack by several attackers.
type Wave struct {
	Name   string
	N      int // as for Run, like Rate
	Rate   float64
	Attack Attack
}

// Attack runs all waves at once until ctx ends while an honest caller calls. It reports its observations to logf. It
// returns an error if the victim exceeds Limit or ends, if a call of the honest caller fails, or if this machine stops
// an attacker.
func (v *Victim) Attack(ctx context.Context, waves []Wave, logf func(string, ...any)) error {
	if err := v.warm(ctx); err != nil {
		return err
	}
	attacking, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	begin := time.Now()
	go func() { cancel(v.watch(attacking, begin)) }()
	var calls *Calls
	var callErr error
	counts := make([]*Counts, len(waves))
	var running sync.WaitGroup
	running.Go(func() { calls, callErr = Call(attacking, v.Honest, 100*time.Millisecond) })
	for i, wave := range waves {
		running.Go(func() { counts[i] = Run(attacking, wave.N, wave.Rate, wave.Attack) })
	}
	running.Wait()
	peak, _ := process.Memory(v.Pid, "VmHWM") // 0 if the process has ended
	logf("after %.1f s: RSS at most %.0f MB, before %.0f MB", time.Since(begin).Seconds(), peak, v.rss)
	for i, wave := range waves {
		logf("%s: %s", wave.Name, counts[i])
	}
	if callErr != nil {
		return callErr
	}
	logf("honest caller: %s", calls)
	if err := context.Cause(attacking); ctx.Err() == nil && err != nil {
		return err
	}
	var failed []error
	if peak > Limit {
		failed = append(failed, fmt.Errorf("RSS was %.0f MB: the pod's limit is %.0f", peak, Limit))
	}
	for i, wave := range waves {
		if err := counts[i].Broken(); err != nil {
			failed = append(failed, fmt.Errorf("%s: this machine stopped an attacker: %w", wave.Name, err))
		}
	}
	if len(calls.Failures) > 0 {
		failed = append(failed, fmt.Errorf("honest caller: %s", calls))
	}
	if p99 := calls.Percentile(99); v.Slowest > 0 && p99 >= v.Slowest {
		failed = append(failed, fmt.Errorf("honest caller: p99 is %s: %s", p99, calls))
	}
	v.ended = time.Now()
	return errors.Join(failed...)
}

// watch returns nil when ctx ends, or an error as soon as the victim exceeds Limit or has ended.
func (v *Victim) watch(ctx context.Context, begin time.Time) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		after := time.Since(begin).Seconds()
		if !process.Alive(v.Pid) {
			return fmt.Errorf("the proxy ended after %.1f s of attack", after)
		}
		// The next tick finds a process that ends between these two lines.
		if rss, err := process.Memory(v.Pid, "VmRSS"); err == nil && rss > Limit {
			return fmt.Errorf("the proxy has %.0f MB after %.1f s of attack: with the pod's limit of %.0f it would be killed",
				rss, after, Limit)
		}
	}
}

// warm calls the victim as an honest caller does, so that it has allocated what that needs, and records its memory
// and goroutines.
func (v *Victim) warm(ctx context.Context) (err error) {
	if err := v.use(ctx); err != nil {
		return err
	}
	if v.rss, err = process.Memory(v.Pid, "VmRSS"); err != nil {
		return err
	}
	v.goroutines, err = v.countGoroutines(ctx)
	return err
}

// Recover waits until the victim uses no more than before the attack. It calls the victim meanwhile, because an idle
// Go process collects its garbage only every two minutes.
func (v *Victim) Recover(ctx context.Context, logf func(string, ...any)) error {
	defer func() { logf("recovery: %.0f s", time.Since(v.ended).Seconds()) }()
	return process.Poll(ctx, v.Within, nil, func() error {
		if err := v.use(ctx); err != nil {
			return err
		}
		rss, err := process.Memory(v.Pid, "VmRSS")
		if err != nil {
			return err
		}
		goroutines, err := v.countGoroutines(ctx)
		if err == nil && (rss > v.rss+leftMB || goroutines > v.goroutines+leftGoroutines) {
			err = fmt.Errorf("after the attack the proxy has %.0f MB and %d goroutines; before it had %.0f and %d",
				rss, goroutines, v.rss, v.goroutines)
		}
		return err
	})
}

// use calls the victim for two seconds as an honest caller who does not pause.
func (v *Victim) use(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	calls, err := Call(ctx, v.Honest, 0)
	if err == nil && len(calls.Failures) > 0 {
		err = fmt.Errorf("without an attack: %s", calls)
	}
	return err
}

// countGoroutines reads the victim's metrics.
func (v *Victim) countGoroutines(ctx context.Context) (int, error) {
	transport := v.Operations.Transport(false)
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, v.Operations.URL("/metrics"), nil)
	if err != nil {
		return 0, err
	}
	resp, err := (&http.Client{Transport: transport, Timeout: 10 * time.Second}).Do(req)
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), "go_goroutines "); ok {
			return strconv.Atoi(value)
		}
	}
	return 0, fmt.Errorf("%s: no go_goroutines: %s, %w", req.URL, resp.Status, lines.Err())
}
