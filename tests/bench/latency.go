package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

// setting is a setting of frpc's transport. The first of a list is frp's default, with which the others are compared.
type setting struct {
	mux             bool // must be the same in frps
	pool, keepalive int  // 0: frp's default
}

var (
	settings = []setting{{true, 1, 0}, {true, 5, 0}, {true, 10, 0}, {false, 1, 0}, {false, 5, 0}, {false, 10, 0}}
	rtts     = []time.Duration{time.Millisecond, 20 * time.Millisecond, 100 * time.Millisecond}
	repeats  = []int{10, 5, 3} // of a round, more where the delay is short and the machine's speed matters
	domains  = map[string]string{"http": "127.0.0.1", "https": "agent.internal"}
)

// workloads are small calls, and one of 64 MiB; a fresh one comes on a caller's connection of its own.
var workloads = []struct {
	name     string
	conns, n int
	fresh    bool
}{
	{"the first 8 after the login, at once, fresh", 8, 8, true},
	{"one after the other, fresh", 1, 8, true},
	{"8 at a time, fresh", 8, 64, true},
	{"one after the other, kept alive", 1, 8, false},
	{"8 at a time, kept alive", 8, 64, false},
	{"64 MiB", 1, 1, false},
}

// figure identifies a result by the indexes of workload, rtt and setting.
type figure struct {
	kind                   string
	workload, rtt, setting int
}

// latency measures calls through stock frps and frpc with a delay between them, alternating between all settings.
func latency(ctx context.Context) error {
	kinds := []string{"http", "https"}
	ms := map[figure][]float64{} // for a call, by round
	for _, kind := range kinds {
		for r, rtt := range rtts {
			for round := range repeats[r] {
				fmt.Fprintf(os.Stderr, "latency: %s, %s: round %d of %d\n", kind, rtt, round+1, repeats[r])
				for s, setting := range settings {
					took, err := measureTunnel(ctx, kind, setting, rtt)
					if err != nil {
						return fmt.Errorf("%s, %s, %+v: %w", kind, rtt, setting, err)
					}
					for w := range workloads {
						f := figure{kind, w, r, s}
						ms[f] = append(ms[f], took[w])
					}
				}
			}
		}
	}
	fmt.Print("| type | calls |")
	for _, s := range settings {
		fmt.Printf(" tcpMux %t, pool %d |", s.mux, s.pool)
	}
	fmt.Printf("\n|%s\n", strings.Repeat(" --- |", 2+len(settings)))
	for _, kind := range kinds {
		for w, workload := range workloads {
			fmt.Printf("| %s | %s |", kind, workload.name)
			for s := range settings {
				var cells []string
				for r := range rtts {
					cell := fmt.Sprintf("%.2f", ratio(ms[figure{kind, w, r, s}], ms[figure{kind, w, r, 0}]))
					if s == 0 {
						cell = fmt.Sprintf("%.1f", median(ms[figure{kind, w, r, s}]))
					}
					cells = append(cells, cell)
				}
				fmt.Printf(" %s |", strings.Join(cells, ", "))
			}
			fmt.Println()
		}
	}
	return nil
}

// measureTunnel returns the ms that a call took in each workload, through a tunnel of its own.
func measureTunnel(ctx context.Context, kind string, s setting, rtt time.Duration) ([]float64, error) {
	t, err := startTunnel(ctx, kind, s, rtt)
	if err != nil {
		return nil, err
	}
	defer t.close()
	time.Sleep(100*time.Millisecond + 5*rtt) // frps fills its pool
	var took []float64
	for _, workload := range workloads {
		c := client(workload.conns)
		defer c.CloseIdleConnections()
		transport := c.Transport.(*http.Transport)
		transport.DisableKeepAlives, transport.TLSClientConfig.ServerName = workload.fresh, domains[kind]
		if !workload.fresh {
			if _, _, err := loadBy(ctx, c, t.peer, "/api/v1/small", workload.conns, workload.conns); err != nil {
				return nil, err
			}
		}
		path := "/api/v1/small"
		if workload.n == 1 {
			path = "/api/v1/large"
		}
		latencies, _, err := loadBy(ctx, c, t.peer, path, workload.conns, workload.n)
		if err != nil {
			return nil, err
		}
		var sum float64
		for _, us := range latencies {
			sum += us
		}
		took = append(took, sum/float64(len(latencies))/1e3)
	}
	return took, nil
}

// frozen measures how long frpc takes to notice that frps is frozen while its connections stay open.
func frozen(ctx context.Context) error {
	fmt.Print("\n| a frozen frps is noticed after, s | least | median | most |\n| --- | --- | --- | --- |\n")
	for _, s := range []setting{{true, 0, 30}, {true, 0, 10}, {false, 0, 0}} {
		fmt.Fprintf(os.Stderr, "frozen: %+v\n", s)
		noticed := make([]float64, 8)
		var group errgroup.Group
		for i := range noticed {
			group.Go(func() error {
				t, err := startTunnel(ctx, "http", s, 0)
				if err != nil {
					return err
				}
				defer t.close()
				// Spread the starts between two keepalives or heartbeats.
				time.Sleep(time.Duration(i) * 30 * time.Second / time.Duration(len(noticed)))
				noticed[i], err = t.back(ctx, "try to connect to server",
					func() error { return syscall.Kill(t.frps.Pid(), syscall.SIGSTOP) })
				return err
			})
		}
		if err := group.Wait(); err != nil {
			return err
		}
		printSpread(fmt.Sprintf("%+v", s), noticed)
	}
	return nil
}

// restarted measures how long callers cannot reach the agent when frps is killed and restarted at once.
func restarted(ctx context.Context) error {
	fmt.Print("\n| frps killed and started at once, frpc is back after, s | least | median | most |\n" +
		"| --- | --- | --- | --- |\n")
	var took [4][]float64
	for try := range 6 {
		fmt.Fprintf(os.Stderr, "restarted: %d of 6\n", try+1)
		t, err := startTunnel(ctx, "http", setting{mux: true}, 0)
		if err != nil {
			return err
		}
		for kill := range took {
			var seconds float64
			if err == nil {
				seconds, err = t.back(ctx, "start proxy success", func() error { t.frps.Kill(); return t.startFrps() })
			}
			took[kill] = append(took[kill], seconds)
		}
		if t.close(); err != nil {
			return err
		}
	}
	for kill, seconds := range took {
		printSpread(fmt.Sprintf("time %d of one frpc", kill+1), seconds)
	}
	return nil
}

// back is how many seconds after a fault frpc logs the words once more.
func (t *tunnel) back(ctx context.Context, words string, fault func() error) (float64, error) {
	times := strings.Count(t.frpc.Log(), words) + 1
	begin := time.Now()
	if err := fault(); err != nil {
		return 0, err
	}
	err := says(ctx, t.frpc, words, times)
	return time.Since(begin).Seconds(), err
}

func printSpread(what string, values []float64) {
	fmt.Printf("| %s | %.1f | %.1f | %.1f |\n", what, slices.Min(values), median(values), slices.Max(values))
}

// tunnel is a stock frps and frpc.
type tunnel struct {
	peer       peer
	frps, frpc *process.Process
	startFrps  func() error
	close      func()
}

// startTunnel returns when frpc's proxy is up. The tunnel leads to an agent in this process.
func startTunnel(ctx context.Context, kind string, s setting, rtt time.Duration) (_ *tunnel, err error) {
	group, err := process.NewGroup()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	agent := httptest.NewUnstartedServer(api())
	map[string]func(){"http": agent.Start, "https": agent.StartTLS}[kind]()
	t := &tunnel{}
	t.close = func() {
		cancel()
		for _, p := range []*process.Process{t.frpc, t.frps} {
			if p != nil {
				p.Kill() // a frozen process reacts to no other signal
			}
		}
		agent.Close()
		group.Close()
	}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	var ports [2]int // of frps, and of its vhost
	for i := range ports {
		if ports[i], err = process.FreePort(); err != nil {
			return nil, err
		}
	}
	t.peer.url = fmt.Sprintf("%s://127.0.0.1:%d", kind, ports[1])
	relay, err := startDelay(ctx, fmt.Sprintf("127.0.0.1:%d", ports[0]), rtt)
	if err != nil {
		return nil, err
	}
	t.startFrps = func() (err error) {
		t.frps, err = startFrp(ctx, group, "frps", "frps started successfully", map[string]any{
			"bindAddr": "127.0.0.1", "bindPort": ports[0], "vhost" + strings.ToUpper(kind) + "Port": ports[1],
			"transport": map[string]any{"tcpMux": s.mux, "maxPoolCount": 10}, // frp's default is 5
		})
		return err
	}
	if err := t.startFrps(); err != nil {
		return nil, err
	}
	t.frpc, err = startFrp(ctx, group, "frpc", "start proxy success", map[string]any{
		"serverAddr": "127.0.0.1", "serverPort": relay.(*net.TCPAddr).Port,
		"transport": map[string]any{"tcpMux": s.mux, "poolCount": s.pool, "tcpMuxKeepaliveInterval": s.keepalive},
		"proxies": []any{map[string]any{
			"name": "agent", "type": kind, "localPort": agent.Listener.Addr().(*net.TCPAddr).Port,
			"customDomains": []string{domains[kind]},
		}},
	})
	return t, err
}

// startFrp starts frps or frpc, and returns when its log contains words.
func startFrp(ctx context.Context, group *process.Group, name, words string,
	config map[string]any) (*process.Process, error) {
	binary, err := process.Binary(name)
	if err != nil {
		return nil, err
	}
	config["log"] = map[string]any{"disablePrintColor": true}
	data, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(group.Dir(), name+".json")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		return nil, err
	}
	p, err := group.Start(name, nil, binary, "-c", file)
	if err != nil {
		return nil, err
	}
	return p, says(ctx, p, words, 1)
}

// says waits until a process has logged words the given number of times.
func says(ctx context.Context, p *process.Process, words string, times int) error {
	return process.Poll(ctx, 2*time.Minute, p.Done(), func() error {
		if log := p.Log(); strings.Count(log, words) < times {
			return fmt.Errorf("waiting for %q in: %s", words, log)
		}
		return nil
	})
}
