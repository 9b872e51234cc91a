// Command scale measures a stock frps with many agents on this machine; how they come back after an outage of frps, of
// the control plane and of both; and how they are divided between two frps, of which one is lost. Results are in
// tests/SCALE.md. Linux only.
//
// An agent is bootstrap's own code, with a lease, a run directory and a renewal of its own, and a client of the stock
// frpc, which runs many in one process. One server answers for all proxies. Beside these are some agents of which all
// parts are processes.
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/util/cert"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/lease"
	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/proxy/inbound"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// perProcess is how many clients one frpc runs. Its health checks of their proxies are checkEvery apart, not a second:
// they stay on the agent's machine, of which this one would be thousands.
const perProcess, checkEvery = 500, 15

func main() {
	agents := flag.Int("agents", 2000, "how many")
	trios := flag.Int("trios", 50, "how many more, each of bootstrap, frpc and the proxy as processes")
	outage := flag.Duration("outage", time.Minute, "how long frps and the control plane are away")
	idle := flag.Duration("idle", time.Minute, "how long the idle frps is measured")
	life := flag.Duration("life", 10*time.Minute, "of a lease")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *agents, *trios, *outage, *idle, *life); err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
}

// fleet is many agents of one control plane.
type fleet struct {
	group    *process.Group
	cp       *controlplane.ControlPlane
	address  string               // of the server that answers for the proxies
	admin    map[string]string    // by agent id: the address of frpc's admin API
	started  map[string]time.Time // by agent id: when frpc was started
	logged   atomic.Int64
	requests requests
}

func run(ctx context.Context, n, trios int, outage, idle, life time.Duration) error {
	group, err := process.NewGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	f := &fleet{group: group, admin: map[string]string{}, started: map[string]time.Time{}}
	agents, tokens := make([]string, n+trios), map[string]string{}
	for i := range agents {
		agents[i] = fmt.Sprintf("agent-%05d", i)
		tokens[agents[i]] = token
	}
	light, whole := agents[:n], agents[n:]
	f.cp, err = controlplane.Start(ctx, controlplane.Options{Group: group, Agents: tokens,
		Log: slog.New(slog.DiscardHandler), Requested: f.requests.add})
	if err != nil {
		return err
	}
	defer f.cp.Close()
	f.cp.SetTerms(controlplane.Terms{Life: life})
	if f.address, err = answer(ctx); err != nil {
		return err
	}
	running, stop := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer func() { stop(); all.Wait() }()

	fmt.Printf("%d agents and %d trios, leases of %s\n\n| what | figure |\n| --- | --- |\n", n, trios, life)
	base, err := f.usage()
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := f.bootstrap(running, &all, light); err != nil {
		return err
	}
	row("all have a lease", "after %.0f s, %.0f leases a second at most", time.Since(begin).Seconds(),
		f.requests.peak(begin))
	begin = time.Now()
	for some := range slices.Chunk(light, perProcess) {
		if err := f.startFrpc(some); err != nil {
			return err
		}
	}
	all.Go(func() { f.restartFrpc(running, light) })
	back, err := f.back(ctx, begin, light)
	if err != nil {
		return err
	}
	row("all have logged in", "after %s; %.0f logins a second", back, float64(n)/back.all.Seconds())
	row("cost of the logins for frps", "%.1f ms of a core each", f.cost(base)/float64(n)*1000)
	for _, what := range []string{"idle", "with a watch each"} {
		if what != "idle" {
			_, end, err := f.watch(ctx, light)
			if err != nil {
				return err
			}
			defer end()
		}
		before, err := f.usage()
		if err != nil {
			return err
		}
		wait(ctx, idle)
		after, err := f.usage()
		if err != nil {
			return err
		}
		row("frps, "+what, "%.0f KiB an agent, %.2f%% of a core for 1,000 agents", (after.rss-base.rss)/float64(n)/1024,
			(after.cpu-before.cpu)/idle.Seconds()*100/float64(n)*1000)
	}
	if err := f.startTrios(running, whole); err != nil {
		return err
	}
	if err := f.outages(ctx, agents, outage, life); err != nil {
		return err
	}
	return f.shards(ctx, agents, n)
}

func row(what, format string, args ...any) {
	fmt.Printf("| %s | %s |\n", what, fmt.Sprintf(format, args...))
}

// outages stops frps, the control plane and both for a while.
func (f *fleet) outages(ctx context.Context, agents []string, outage, life time.Duration) error {
	for _, o := range []struct {
		name               string
		frps, controlPlane bool
		lasts              time.Duration
	}{
		{"frps restarted", true, false, 0},
		{fmt.Sprintf("frps away for %s", outage), true, false, outage},
		{fmt.Sprintf("control plane away for %s", life), false, true, life},
		{fmt.Sprintf("both away for %s", outage), true, true, outage},
	} {
		struck, failed := time.Now(), f.logged.Load()
		if o.frps {
			f.cp.StopFrps()
		}
		if o.controlPlane {
			f.cp.API.Stop()
		}
		wait(ctx, o.lasts)
		begin := time.Now()
		if o.controlPlane {
			if err := f.cp.API.Start(ctx); err != nil {
				return err
			}
		}
		var back times
		if o.frps {
			err := f.cp.StartFrps(ctx)
			if err != nil {
				return err
			}
			if back, err = f.back(ctx, begin, agents); err != nil {
				return err
			}
		} else {
			wait(ctx, time.Minute) // for what is overdue
		}
		row(o.name, "back: %s; leases a second: %.0f at most; warnings: %d", back, f.requests.peak(struck),
			f.logged.Load()-failed)
		if err := f.answering(ctx, agents); err != nil {
			return fmt.Errorf("after %s: %w", o.name, err)
		}
	}
	return ctx.Err()
}

// shards assigns half of the agents to a second frps, which is then lost, so that they are assigned to the first again.
// The other half must not notice. The first n agents are light: those of the other half have a watch each.
func (f *fleet) shards(ctx context.Context, agents []string, n int) error {
	var stay, move []string
	for i, id := range agents {
		if i%2 == 0 {
			stay = append(stay, id)
		} else {
			move = append(move, id)
		}
	}
	cut, end, err := f.watch(ctx, stay[:n/2])
	if err != nil {
		return err
	}
	defer end()
	second, err := f.cp.AddFrps(ctx)
	if err != nil {
		return err
	}
	defer second.StopFrps()
	for _, to := range []*controlplane.Frps{second, f.cp.Frps} {
		what := "half assigned to a second frps"
		struck, failed := time.Now(), f.logged.Load()
		if to == f.cp.Frps {
			what = "the second frps lost, its half assigned to the first"
			second.StopFrps()
		}
		to.Assign(move)
		back, err := f.back(ctx, struck, move)
		if err != nil {
			return err
		}
		row(what, "moved: %s; leases a second: %.0f at most; warnings: %d; of the other half %d tunnels and %d watches cut",
			back, f.requests.peak(struck), f.logged.Load()-failed, f.cp.OpenedSince(struck, stay), cut.Load())
		if err := f.answering(ctx, agents); err != nil {
			return fmt.Errorf("after %s: %w", what, err)
		}
	}
	return ctx.Err()
}

// startTrios starts agents of which all parts are processes.
func (f *fleet) startTrios(ctx context.Context, agents []string) error {
	c, err := cluster.Start(ctx, f.group)
	if err != nil {
		return err
	}
	kubeconfig := filepath.Join(f.group.Dir(), "agent.kubeconfig")
	if _, err := c.WriteAgentKubeconfig(ctx, kubeconfig); err != nil {
		return err
	}
	var starts errgroup.Group
	starts.SetLimit(8)
	for _, id := range agents {
		a, err := agent.New(f.group, f.cp, id, token, kubeconfig)
		if err != nil {
			return err
		}
		starts.Go(func() error {
			if err := a.Start(); err != nil {
				return err
			}
			a.RestartFrpc(ctx)
			return a.WaitReady(ctx)
		})
	}
	return starts.Wait()
}

const token = "a-token-of-more-than-32-characters"

func (f *fleet) runDir(id string) string { return filepath.Join(f.group.Dir(), "run", id) }

// atOnce is how many of bootstrap start at the same time. In one process, all would wait for each other longer than a
// request for a lease may take.
const atOnce = 200

// bootstrap starts bootstrap for each agent, and waits until all have their files.
func (f *fleet) bootstrap(ctx context.Context, all *sync.WaitGroup, agents []string) error {
	// Renewals of one agent are too far apart to share a connection, and so many idle ones would be too many here.
	http.DefaultTransport.(*http.Transport).DisableKeepAlives = true
	log := slog.New(counter{slog.DiscardHandler, &f.logged})
	failed := make(chan error, len(agents))
	for some := range slices.Chunk(agents, atOnce) {
		for _, id := range some {
			cfg, err := f.configure(id)
			if err != nil {
				return err
			}
			all.Go(func() {
				if err := lease.Run(ctx, cfg, 5*time.Minute, false, log); err != nil && ctx.Err() == nil {
					failed <- fmt.Errorf("%s: %w", id, err)
				}
			})
		}
		for _, id := range some {
			if err := process.Poll(ctx, 5*time.Minute, nil, func() error {
				select {
				case err := <-failed:
					return err
				default:
					return lease.Ready(f.runDir(id))
				}
			}); err != nil {
				return err
			}
		}
	}
	return nil
}

// configure makes an agent's run directory, and returns bootstrap's configuration.
func (f *fleet) configure(id string) (*config.Config, error) {
	port, err := process.FreePort()
	if err != nil {
		return nil, err
	}
	f.admin[id] = fmt.Sprintf("127.0.0.1:%d", port)
	if err := os.MkdirAll(f.runDir(id), 0o700); err != nil {
		return nil, err
	}
	cfg, err := config.Load("", map[string]string{
		"PIPEOPS_AGENT_ID": id, "PIPEOPS_AGENT_TOKEN": token, "PIPEOPS_API_URL": f.cp.APIURL,
		"PIPEOPS_API_CA_FILE": f.cp.CAFile, "PIPEOPS_FRP_TLS_CA_FILE": f.cp.CAFile, "PIPEOPS_FRP_SERVER_ADDR": "127.0.0.1",
		"PIPEOPS_FRP_ADMIN_PORT": strconv.Itoa(port), "PIPEOPS_LISTEN_ADDR": f.address, "PIPEOPS_RUN_DIR": f.runDir(id),
	})
	if err == nil {
		cfg.Proxy.MetricsAddr = f.address // the one server answers there too, which the configuration does not allow
	}
	return cfg, err
}

// counter counts the warnings and errors that are logged.
type counter struct {
	slog.Handler
	n *atomic.Int64
}

func (c counter) Enabled(context.Context, slog.Level) bool { return true }

func (c counter) Handle(_ context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		c.n.Add(1)
	}
	return nil
}

func (c counter) WithAttrs([]slog.Attr) slog.Handler { return c }

func (c counter) WithGroup(string) slog.Handler { return c }

// startFrpc starts the stock frpc for agents, in one process that serves the files of a directory.
func (f *fleet) startFrpc(agents []string) error {
	binary, err := process.Binary("frpc")
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(f.group.Dir(), "frpc-")
	if err != nil {
		return err
	}
	often := fmt.Sprintf("healthCheck.intervalSeconds = %d", 1)
	for _, id := range agents {
		f.started[id] = time.Now()
		data, err := os.ReadFile(filepath.Join(f.runDir(id), frpc.ConfigFile))
		if err != nil {
			return err
		}
		if !strings.Contains(string(data), often) {
			return errors.New("frpc.toml has another health check than this program knows")
		}
		rarely := strings.Replace(string(data), often, fmt.Sprintf("healthCheck.intervalSeconds = %d", checkEvery), 1)
		if err := os.WriteFile(filepath.Join(dir, id+".toml"), []byte(rarely), 0o600); err != nil { //nolint:gosec // ours
			return err
		}
	}
	_, err = f.group.Start(filepath.Base(dir), nil, binary, "--config_dir", dir)
	return err
}

// restartFrpc does the kubelet's work for light agents, until ctx ends: each second it starts frpc again for those
// whose bootstrap has stopped it for a new frpc.toml.
func (f *fleet) restartFrpc(ctx context.Context, agents []string) {
	for wait(ctx, time.Second); ctx.Err() == nil; wait(ctx, time.Second) {
		var stopped []string
		for _, id := range agents {
			file, err := os.Stat(filepath.Join(f.runDir(id), frpc.ConfigFile))
			if err == nil && file.ModTime().After(f.started[id]) &&
				errors.Is(process.Listening(f.admin[id]), syscall.ECONNREFUSED) {
				stopped = append(stopped, id)
			}
		}
		if len(stopped) == 0 {
			continue
		}
		if err := f.startFrpc(stopped); err != nil {
			fmt.Fprintln(os.Stderr, "scale: restart frpc:", err)
		}
	}
}

// times are how long it took until shares of the agents had a tunnel.
type times struct{ half, most, all time.Duration }

func (t times) String() string {
	if t.all == 0 {
		return "no tunnel was away"
	}
	return fmt.Sprintf("half %.0f s, 99%% %.0f s, all %.0f s", t.half.Seconds(), t.most.Seconds(), t.all.Seconds())
}

// back waits until all of these agents have opened a tunnel since begin.
func (f *fleet) back(ctx context.Context, begin time.Time, agents []string) (t times, err error) {
	all := len(agents)
	err = process.Poll(ctx, 15*time.Minute, nil, func() error {
		n := f.cp.OpenedSince(begin, agents)
		for _, share := range []struct {
			n  int
			at *time.Duration
		}{{all / 2, &t.half}, {all * 99 / 100, &t.most}, {all, &t.all}} {
			if n >= share.n && *share.at == 0 {
				*share.at = time.Since(begin)
			}
		}
		if n < all {
			return fmt.Errorf("%d of %d agents have a tunnel", n, all)
		}
		return nil
	})
	return t, err
}

// answer serves for all proxies at one address, which it returns. Its listener is the proxy's: TLS behind a PROXY
// header for callers, plain HTTP for frpc and bootstrap.
func answer(ctx context.Context) (string, error) {
	certificatePEM, key, err := cert.GenerateSelfSignedCertKey("localhost", nil, nil)
	if err != nil {
		return "", err
	}
	certificate, err := tls.X509KeyPair(certificatePEM, key)
	if err != nil {
		return "", err
	}
	socket, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return "", err
	}
	listener := inbound.New(socket, inbound.Config{
		Connections: math.MaxInt, HeaderMemory: math.MaxInt64, HelloTimeout: time.Minute,
		TLS:    &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12},
		Closed: func(string, net.Addr, error) {},
	})
	mux := http.NewServeMux()
	mux.HandleFunc("/watch", func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil { // a watch with a bookmark a minute
			_, _ = io.WriteString(w, "{}\n")
			_ = http.NewResponseController(w).Flush()
			wait(r.Context(), time.Minute)
		}
	})
	mux.HandleFunc(agentapi.ActivityPath, func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(agentapi.Activity{}) // agents with a watch are never moved
	})
	mux.HandleFunc("/", func(http.ResponseWriter, *http.Request) {})
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: time.Minute, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0),
	}
	context.AfterFunc(ctx, func() { _ = server.Close() })
	go func() {
		_ = server.Serve(listener)
	}()
	return socket.Addr().String(), nil
}

func wait(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// call sends a request to an agent by frps, as a caller does. It tries for a minute: on a busy machine frps may close a
// connection for which there is no work connection in time.
func (f *fleet) call(ctx context.Context, id, path string) (*http.Response, error) {
	address, tlsConfig := f.cp.Direct(id)
	tlsConfig.VerifyConnection = nil // one server answers for all
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: tlsConfig,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, address)
		}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+tlsConfig.ServerName+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	var resp *http.Response
	err = process.Poll(ctx, time.Minute, nil, func() (err error) {
		resp, err = client.Do(req) //nolint:bodyclose // the caller closes it
		return err
	})
	return resp, err
}

// answering returns an error unless every one of these agents answers a call.
func (f *fleet) answering(ctx context.Context, agents []string) error {
	var calls errgroup.Group
	calls.SetLimit(50)
	for _, id := range agents {
		calls.Go(func() error {
			resp, err := f.call(ctx, id, "/version")
			if err == nil {
				_ = resp.Body.Close()
				if resp.StatusCode != http.StatusOK {
					err = fmt.Errorf("%s: %s", id, resp.Status)
				}
			}
			return err
		})
	}
	return calls.Wait()
}

// watch holds a watch of each of these agents open until end is called. It counts those that are cut.
func (f *fleet) watch(ctx context.Context, agents []string) (*atomic.Int64, func(), error) {
	ctx, end := context.WithCancel(ctx)
	var cut atomic.Int64
	var calls errgroup.Group
	calls.SetLimit(50)
	for _, id := range agents {
		calls.Go(func() error {
			resp, err := f.call(ctx, id, "/watch") //nolint:bodyclose // closed when the watch ends
			if err != nil {
				return err
			}
			go func() {
				_, _ = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
				cut.Add(1)
			}()
			return nil
		})
	}
	if err := calls.Wait(); err != nil {
		end()
		return nil, nil, err
	}
	return &cut, end, nil
}

// requests counts the requests for leases by the second.
type requests struct {
	mu       sync.Mutex
	bySecond map[int64]int
}

func (r *requests) add() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.bySecond == nil {
		r.bySecond = map[int64]int{}
	}
	r.bySecond[time.Now().Unix()]++
}

// peak returns the most requests in a second since then.
func (r *requests) peak(since time.Time) float64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	maps.DeleteFunc(r.bySecond, func(second int64, _ int) bool { return second < since.Unix() })
	if len(r.bySecond) == 0 {
		return 0
	}
	return float64(slices.Max(slices.Collect(maps.Values(r.bySecond))))
}
