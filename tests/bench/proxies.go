package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

const (
	rounds      = 20   // of calls: short and many, because the machine's speed changes within seconds
	transfers   = 3    // rounds with all the rest
	calls       = 4000 // with 32 connections
	singleCalls = 3000 // at one
	idleWatches = 2000
	settling    = 8 * time.Minute // an idle Go process collects its garbage every two minutes
)

// figures are the results of one peer. The median of the rounds is printed, and the mean of their ratios.
type figures struct {
	cpu, rate           []float64 // µs of the proxy's CPU for each call, calls a second; 32 connections
	p50, p99            []float64 // µs, 32 connections
	single50, single99  []float64 // µs, one connection
	download, upload    []float64 // MB/s, 64 MiB
	rss, downRSS, upRSS []float64 // MB: before, and the peak increase during each
	watchKB             float64   // for each idle watch
	idleRSS, afterRSS   float64   // MB before the watches, and long after
}

// proxies measures our proxy and its peers in turns, so that all of them see the same machine.
func proxies(ctx context.Context) error {
	group, err := process.NewGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	peers, err := startPeers(ctx, group, nil)
	if err != nil {
		return err
	}
	all := make([]figures, len(peers))
	for round := range rounds {
		for i, p := range peers {
			fmt.Fprintf(os.Stderr, "round %d of %d: %s\n", round+1, rounds, p.name)
			if err := measureCalls(ctx, p, &all[i]); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
			if round >= transfers {
				continue
			}
			if err := measureTransfers(ctx, p, &all[i]); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
		}
	}
	for i, p := range peers[:len(peers)-1] {
		fmt.Fprintf(os.Stderr, "idle watches: %s\n", p.name)
		if err := measureWatches(ctx, p, &all[i]); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	fmt.Fprintf(os.Stderr, "waiting for memory to go back: %s\n", settling)
	select {
	case <-time.After(settling):
	case <-ctx.Done():
		return ctx.Err()
	}
	for i, p := range peers {
		if all[i].afterRSS, err = memory(p.pid, "VmRSS"); err != nil {
			return err
		}
	}
	fmt.Println("| | CPU µs/call | ours / its | calls/s | p50, p99 ms (32) | p50, p99 ms (1) | 64 MiB down, up MB/s " +
		"| RSS MB | more during down, up | KB/idle watch | MB left after |")
	fmt.Println("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
	for i, p := range peers {
		f := &all[i]
		cpu, share, rss, more, watch, after := "–", "–", "–", "–", "–", "–"
		if p.pid != 0 {
			cpu, share = fmt.Sprintf("%.0f", median(f.cpu)), fmt.Sprintf("%.2f", ratio(all[0].cpu, f.cpu))
			rss, more = fmt.Sprintf("%.0f", f.rss[0]), fmt.Sprintf("%.1f, %.1f", median(f.downRSS), median(f.upRSS))
			watch, after = fmt.Sprintf("%.0f", f.watchKB), fmt.Sprintf("%.0f", f.afterRSS-f.idleRSS)
		}
		fmt.Printf("| %s | %s | %s | %.0f | %.2f, %.2f | %.2f, %.2f | %.0f, %.0f | %s | %s | %s | %s |\n",
			p.name, cpu, share, median(f.rate),
			median(f.p50)/1e3, median(f.p99)/1e3, median(f.single50)/1e3, median(f.single99)/1e3,
			median(f.download), median(f.upload), rss, more, watch, after)
	}
	return nil
}

// client returns a client that speaks HTTP/1.1 over up to n kept connections, as frps does.
func client(n int) *http.Client {
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	return &http.Client{Transport: &http.Transport{
		MaxIdleConnsPerHost: n, DisableCompression: true, Protocols: protocols,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}}
}

// request makes a request for a path of the API, with what the peer wants to see.
func (p peer) request(ctx context.Context, method, path string, body io.Reader) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, p.url+path, body)
	if err == nil {
		maps.Copy(req.Header, p.header)
	}
	return req, err
}

func call(ctx context.Context, c *http.Client, p peer, path string) error {
	req, err := p.request(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", req.URL, resp.Status)
	}
	return nil
}

// load makes n calls over conns connections. It returns their latencies in µs, sorted, and the duration in seconds.
func load(ctx context.Context, p peer, conns, n int) ([]float64, float64, error) {
	c := client(conns)
	defer c.CloseIdleConnections()
	return loadBy(ctx, c, p, "/api/v1/small", conns, n)
}

// loadBy does the same for any path and with an existing client.
func loadBy(ctx context.Context, c *http.Client, p peer, path string, conns, n int) ([]float64, float64, error) {
	latencies := make([]float64, n)
	var next atomic.Int64
	var failed atomic.Value
	begin := time.Now()
	var wg sync.WaitGroup
	for range conns {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n || failed.Load() != nil {
					return
				}
				start := time.Now()
				if err := call(ctx, c, p, path); err != nil {
					failed.Store(err)
					return
				}
				latencies[i] = float64(time.Since(start).Microseconds())
			}
		})
	}
	wg.Wait()
	took := time.Since(begin).Seconds()
	if err, ok := failed.Load().(error); ok {
		return nil, 0, err
	}
	slices.Sort(latencies)
	return latencies, took, nil
}

func measureCalls(ctx context.Context, p peer, f *figures) error {
	if _, _, err := load(ctx, p, 32, 200); err != nil { // to warm up
		return err
	}
	before, err := cpuSeconds(p.pid)
	if err != nil {
		return err
	}
	latencies, took, err := load(ctx, p, 32, calls)
	if err != nil {
		return err
	}
	after, err := cpuSeconds(p.pid)
	if err != nil {
		return err
	}
	f.cpu = append(f.cpu, (after-before)/calls*1e6)
	f.rate = append(f.rate, calls/took)
	f.p50, f.p99 = append(f.p50, latencies[calls/2]), append(f.p99, latencies[calls*99/100])
	return nil
}

func measureTransfers(ctx context.Context, p peer, f *figures) error {
	latencies, _, err := load(ctx, p, 1, singleCalls)
	if err != nil {
		return err
	}
	f.single50 = append(f.single50, latencies[singleCalls/2])
	f.single99 = append(f.single99, latencies[singleCalls*99/100])

	rss, err := memory(p.pid, "VmRSS")
	if err != nil {
		return err
	}
	f.rss = append(f.rss, rss)
	c := client(1)
	defer c.CloseIdleConnections()
	for _, direction := range []struct {
		rate, rss *[]float64
		transfer  func() error
	}{
		{&f.download, &f.downRSS, func() error { return call(ctx, c, p, "/api/v1/large") }},
		{&f.upload, &f.upRSS, func() error { return upload(ctx, c, p, large) }},
	} {
		if err := resetPeak(p.pid); err != nil {
			return err
		}
		rss, err := memory(p.pid, "VmRSS")
		if err != nil {
			return err
		}
		begin := time.Now()
		if err := direction.transfer(); err != nil {
			return err
		}
		*direction.rate = append(*direction.rate, large/1e6/time.Since(begin).Seconds())
		peak, err := memory(p.pid, "VmHWM")
		if err != nil {
			return err
		}
		*direction.rss = append(*direction.rss, peak-rss)
	}
	return nil
}

func upload(ctx context.Context, c *http.Client, p peer, size int64) error {
	body := io.LimitReader(zeros{}, size)
	req, err := p.request(ctx, http.MethodPost, "/api/v1/large", body)
	if err != nil {
		return err
	}
	req.ContentLength = size
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s to an upload", req.URL, resp.Status)
	}
	return nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// measureWatches holds idle watches open and then closes them.
func measureWatches(ctx context.Context, p peer, f *figures) error {
	before, err := memory(p.pid, "VmRSS")
	if err != nil {
		return err
	}
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := watch(watching, client(idleWatches), p, idleWatches); err != nil {
		return err
	}
	during, err := memory(p.pid, "VmRSS")
	if err != nil {
		return err
	}
	f.idleRSS, f.watchKB = before, (during-before)*1e3/idleWatches
	return nil
}

// watch opens n watches and reads the one event of each. They stay open until ctx ends.
func watch(ctx context.Context, c *http.Client, p peer, n int) error {
	for range n {
		req, err := p.request(ctx, http.MethodGet, "/api/v1/pods?watch=true", nil)
		if err != nil {
			return err
		}
		resp, err := c.Do(req) //nolint:bodyclose // the end of ctx closes it
		if err != nil {
			return err
		}
		if _, err := io.ReadFull(resp.Body, make([]byte, 3)); err != nil {
			return err
		}
	}
	return nil
}

// ratio returns the mean of the ratios of two peers in each round.
func ratio(a, b []float64) float64 {
	var sum float64
	for i := range a {
		sum += a[i] / b[i]
	}
	return sum / float64(len(a))
}

// cpuSeconds returns the CPU time of a process. Source: proc(5), /proc/pid/stat.
func cpuSeconds(pid int) (float64, error) {
	if pid == 0 {
		return 0, nil
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	var ticks float64
	for _, field := range fields[11:13] { // utime, stime
		n, err := strconv.ParseFloat(field, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return ticks / 100, nil // USER_HZ
}

// memory returns process.Memory for a peer, or 0 if there is no process.
func memory(pid int, line string) (float64, error) {
	if pid == 0 {
		return 0, nil
	}
	return process.Memory(pid, line)
}

// resetPeak resets VmHWM. Source: proc(5), /proc/pid/clear_refs.
func resetPeak(pid int) error {
	if pid == 0 {
		return nil
	}
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
}
