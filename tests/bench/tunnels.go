package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

const (
	tunnelRounds  = 10 // of calls
	freshRounds   = 3  // with tunnels started anew, for memory and restarts
	farRounds     = 3
	farRTT        = 50 * time.Millisecond
	tunnelWatches = 500
	baseline      = "remotedialer, ReverseProxy"
	smallPath     = "/api/v1/small"
)

// column is a figure of each tunnel.
type column struct {
	title  string
	digits int
	more   bool // is better
}

// Columns are printed in two tables.
var (
	callColumns = []column{{callRate, 0, true}, {callP50, 1, false}, {callP99, 1, false}, {cpuAll, 0, false},
		{cpuAgent, 0, false}, {firstNear, 1, false}, {firstFar, 0, false}}
	otherColumns = []column{{bodyNear, 0, true}, {bodyFar, 0, true}, {watchAgent, 0, false}, {watchServer, 0, false},
		{back, 1, false}}
)

const (
	callRate    = "calls/s, 32 at a time"
	callP50     = "p50, ms"
	callP99     = "p99, ms"
	cpuAll      = "CPU of a call, all, µs"
	cpuAgent    = "CPU of a call, agent side, µs"
	firstNear   = "first call of a connection, ms"
	firstFar    = "first call, 50 ms away, ms"
	bodyNear    = "64 MiB, MB/s"
	bodyFar     = "64 MiB, 50 ms away, MB/s"
	watchAgent  = "idle watch, agent side, KB"
	watchServer = "idle watch, server side, KB"
	back        = "restart of the server, s"
)

// results are the values of a tunnel, by column and round.
type results struct {
	name, protocol string
	values         map[string][]float64
}

func (r *results) add(column string, value float64) {
	r.values[column] = append(r.values[column], value)
}

// tunnels measures ours beside others, in turns.
func tunnels(ctx context.Context) error {
	group, err := process.NewGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	addr, kubeconfig, err := startUpstream(group)
	if err != nil {
		return err
	}
	all := make([]results, len(contenders))
	for i, c := range contenders {
		all[i] = results{name: c.name, values: map[string][]float64{}}
	}
	at := site{ctx: ctx, upstream: addr, kubeconfig: kubeconfig}
	for range freshRounds {
		if err := sideBySide(at, all, 1, (*contender).measureFresh); err != nil {
			return err
		}
	}
	if err := sideBySide(at, all, tunnelRounds, (*contender).measureNear); err != nil {
		return err
	}
	at.rtt = farRTT
	if err := sideBySide(at, all, farRounds, (*contender).measureFar); err != nil {
		return err
	}
	printTunnels(all)
	return drawTunnels(all)
}

// sideBySide starts all tunnels and measures them in turns.
func sideBySide(at site, all []results, rounds int, measure func(*contender, context.Context, *results) error) error {
	ctx, cancel := context.WithCancel(at.ctx)
	at.ctx = ctx
	running := make([]contender, len(contenders))
	var closing sync.WaitGroup
	defer func() { cancel(); closing.Wait() }()
	for i, c := range contenders {
		group, err := process.NewGroup()
		if err != nil {
			return err
		}
		closing.Go(func() { <-ctx.Done(); group.Close() }) // all at once: each takes seconds
		s := at
		s.group, running[i].calls, running[i].http1 = group, c.calls, c.http1
		if err := c.start(&s, &running[i]); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		if all[i].protocol, err = running[i].ready(ctx); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	for round := range rounds {
		for i, c := range contenders {
			fmt.Fprintf(os.Stderr, "%s between agent and server: round %d of %d: %s\n", at.rtt, round+1, rounds, c.name)
			if err := measure(&running[i], ctx, &all[i]); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
		}
	}
	return nil
}

// client returns a client for up to n calls at a time. It speaks HTTP/2 where that is offered, as kubectl does.
func (t *contender) client(n int) *http.Client {
	c := client(n)
	transport := c.Transport.(*http.Transport)
	transport.Protocols.SetHTTP2(!t.http1)
	if t.dress != nil {
		t.dress(transport)
	}
	return c
}

// ready waits until a call succeeds, and returns the protocol that it used.
func (t *contender) ready(ctx context.Context) (protocol string, err error) {
	err = process.Poll(ctx, time.Minute, nil, func() error {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		c := t.client(1)
		defer c.CloseIdleConnections()
		req, err := t.request(ctx, http.MethodGet, smallPath, nil)
		if err != nil {
			return err
		}
		resp, err := c.Do(req)
		if err != nil {
			return err
		}
		if protocol = resp.Proto; resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s answers %s", req.URL, resp.Status)
		}
		return errors.Join(err, resp.Body.Close())
	})
	return protocol, err
}

// measureFresh measures memory and a restart, of processes that have done nothing else.
func (t *contender) measureFresh(ctx context.Context, r *results) error {
	c := t.client(tunnelWatches)
	defer c.CloseIdleConnections()
	if _, _, err := loadBy(ctx, c, t.peer, smallPath, 32, 200); err != nil { // to warm up
		return err
	}
	agent, server, err := t.sum(memoryKB)
	if err != nil {
		return err
	}
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := watch(watching, c, t.peer, tunnelWatches); err != nil {
		return err
	}
	agentAfter, serverAfter, err := t.sum(memoryKB)
	if err != nil {
		return err
	}
	r.add(watchAgent, (agentAfter-agent)/tunnelWatches)
	r.add(watchServer, (serverAfter-server)/tunnelWatches)
	cancel()

	begin := time.Now()
	if err := t.restart(); err != nil {
		return err
	}
	_, err = t.ready(ctx)
	r.add(back, time.Since(begin).Seconds())
	return err
}

// measureNear measures without a delay.
func (t *contender) measureNear(ctx context.Context, r *results) error {
	c := t.client(32)
	defer c.CloseIdleConnections()
	if _, _, err := loadBy(ctx, c, t.peer, smallPath, 32, 200); err != nil { // to warm up
		return err
	}
	agent, server, err := t.sum(cpuSeconds)
	if err != nil {
		return err
	}
	n := t.calls
	latencies, took, err := loadBy(ctx, c, t.peer, smallPath, 32, n)
	if err != nil {
		return err
	}
	agentAfter, serverAfter, err := t.sum(cpuSeconds)
	if err != nil {
		return err
	}
	r.add(callRate, float64(n)/took)
	r.add(callP50, latencies[n/2]/1e3)
	r.add(callP99, latencies[n*99/100]/1e3)
	r.add(cpuAgent, (agentAfter-agent)/float64(n)*1e6)
	r.add(cpuAll, (agentAfter-agent+serverAfter-server)/float64(n)*1e6)
	return t.measureLinks(ctx, r, firstNear, bodyNear)
}

// measureFar measures with the delay.
func (t *contender) measureFar(ctx context.Context, r *results) error {
	return t.measureLinks(ctx, r, firstFar, bodyFar)
}

// measureLinks measures new connections and a large body.
func (t *contender) measureLinks(ctx context.Context, r *results, first, body string) error {
	var took []float64
	for range 3 {
		time.Sleep(100 * time.Millisecond) // what the connection before has left is over
		c := t.client(1)
		begin := time.Now()
		err := call(ctx, c, t.peer, smallPath)
		took = append(took, time.Since(begin).Seconds()*1e3)
		c.CloseIdleConnections()
		if err != nil {
			return err
		}
	}
	r.add(first, median(took))
	c := t.client(1)
	defer c.CloseIdleConnections()
	if err := call(ctx, c, t.peer, smallPath); err != nil { // connects
		return err
	}
	begin := time.Now()
	err := call(ctx, c, t.peer, "/api/v1/large")
	r.add(body, large/1e6/time.Since(begin).Seconds())
	return err
}

// sum adds up what measure says of all processes on each side.
func (t *contender) sum(measure func(pid int) (float64, error)) (agent, server float64, err error) {
	for sum, processes := range map[*float64][]*process.Process{&agent: t.agent, &server: t.server} {
		for _, pid := range family(processes...) {
			value, err := measure(pid)
			if err != nil {
				return 0, 0, err
			}
			*sum += value
		}
	}
	return agent, server, nil
}

func memoryKB(pid int) (float64, error) {
	rss, err := memory(pid, "VmRSS")
	return rss * 1e3, err
}

// cell returns the median of a tunnel's values, and the mean of the rounds' ratios to the baseline.
func cell(all []results, r results, column string) (value, share float64) {
	base := slices.IndexFunc(all, func(r results) bool { return r.name == baseline })
	return median(slices.Clone(r.values[column])), ratio(r.values[column], all[base].values[column])
}

func printTunnels(all []results) {
	for _, columns := range [][]column{callColumns, otherColumns} {
		fmt.Print("| | callers speak |")
		for _, c := range columns {
			fmt.Printf(" %s |", c.title)
		}
		fmt.Printf("\n|%s\n", strings.Repeat(" --- |", 2+len(columns)))
		for _, r := range all {
			fmt.Printf("| %s | %s |", r.name, r.protocol)
			for _, c := range columns {
				value, share := cell(all, r, c.title)
				fmt.Printf(" %.*f (%.2f) |", c.digits, value, share)
			}
			fmt.Println()
		}
		fmt.Println()
	}
}
