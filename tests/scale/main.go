// Command scale measures a stock frps with many agents on this machine, and how they come back after an outage of frps,
// of the control plane and of both. Results are in tests/SCALE.md. Linux only.
//
// An agent is bootstrap's own code, with a lease, a run directory and a renewal of its own, and a client of the stock
// frpc, which runs many in one process. One server answers for all proxies. Beside these are some agents of which all
// parts are processes.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
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

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/lease"
	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// perProcess is how many clients one frpc runs. Its health checks of their proxies are checkEvery apart, not a second:
// they stay on the agent's machine, of which this one would be thousands.
const perProcess, checkEvery = 500, 60

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
	n        int
	address  string // of the server that answers for the proxies
	logged   atomic.Int64
	requests requests
}

func run(ctx context.Context, n, trios int, outage, idle, life time.Duration) error {
	group, err := process.NewGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	f := &fleet{group: group, n: n}
	agents := map[string]string{}
	for i := range n + trios {
		agents[id(i)] = token
	}
	f.cp, err = controlplane.Start(ctx, controlplane.Options{Group: group, Agents: agents,
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
	row := func(what, format string, args ...any) {
		fmt.Printf("| %s | %s |\n", what, fmt.Sprintf(format, args...))
	}
	base, err := f.usage()
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := f.bootstrap(running, &all); err != nil {
		return err
	}
	row("all have a lease", "after %.0f s, %.0f leases a second at most", time.Since(begin).Seconds(),
		f.requests.peak(begin))
	begin = time.Now()
	if err := f.connect(); err != nil {
		return err
	}
	back, err := f.back(ctx, begin)
	if err != nil {
		return err
	}
	row("all have logged in", "after %s; %.0f logins a second", back, float64(n)/back.all.Seconds())
	row("cost of the logins for frps", "%.1f ms of a core each", f.cost(base)/float64(n)*1000)
	for _, what := range []string{"idle", "with a watch each"} {
		if what != "idle" {
			watches, err := f.watch(ctx)
			if err != nil {
				return err
			}
			defer watches()
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
	if err := f.startTrios(running, trios); err != nil {
		return err
	}
	for _, o := range []struct {
		name            string
		frps, authentic bool
		lasts           time.Duration
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
		if o.authentic {
			f.cp.API.Stop()
		}
		wait(ctx, o.lasts)
		begin := time.Now()
		if o.authentic {
			if err := f.cp.API.Start(ctx); err != nil {
				return err
			}
		}
		var back times
		if o.frps {
			if err := f.cp.StartFrps(ctx); err != nil {
				return err
			}
			if back, err = f.back(ctx, begin); err != nil {
				return err
			}
		} else {
			wait(ctx, time.Minute) // for what is overdue
		}
		row(o.name, "back: %s; leases a second: %.0f at most; warnings: %d", back, f.requests.peak(struck),
			f.logged.Load()-failed)
		if err := f.answering(ctx); err != nil {
			return fmt.Errorf("after %s: %w", o.name, err)
		}
	}
	return ctx.Err()
}

// startTrios starts agents of which all parts are processes. From then on they count among the others.
func (f *fleet) startTrios(ctx context.Context, trios int) error {
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
	for i := range trios {
		a, err := agent.New(f.group, f.cp, id(f.n+i), token, kubeconfig)
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
	err = starts.Wait()
	f.n += trios
	return err
}

const token = "a-token-of-more-than-32-characters"

func id(i int) string { return fmt.Sprintf("agent-%05d", i) }

func (f *fleet) runDir(i int) string { return filepath.Join(f.group.Dir(), "run", id(i)) }

// bootstrap starts bootstrap for each agent, and waits until all have their files.
func (f *fleet) bootstrap(ctx context.Context, all *sync.WaitGroup) error {
	log := slog.New(counter{slog.DiscardHandler, &f.logged})
	failed := make(chan error, f.n)
	for i := range f.n {
		port, err := process.FreePort()
		if err != nil {
			return err
		}
		if err := os.MkdirAll(f.runDir(i), 0o700); err != nil {
			return err
		}
		cfg, err := config.Load("", map[string]string{
			"PIPEOPS_AGENT_ID": id(i), "PIPEOPS_AGENT_TOKEN": token, "PIPEOPS_API_URL": f.cp.APIURL,
			"PIPEOPS_API_CA_FILE": f.cp.CAFile, "PIPEOPS_FRP_TLS_CA_FILE": f.cp.CAFile, "PIPEOPS_FRP_SERVER_ADDR": "127.0.0.1",
			"PIPEOPS_FRP_ADMIN_PORT": strconv.Itoa(port), "PIPEOPS_LISTEN_ADDR": f.address, "PIPEOPS_RUN_DIR": f.runDir(i),
		})
		if err != nil {
			return err
		}
		all.Go(func() {
			if err := lease.Run(ctx, cfg, 5*time.Minute, false, log); err != nil && ctx.Err() == nil {
				failed <- fmt.Errorf("%s: %w", cfg.Agent.ID, err)
			}
		})
	}
	for i := range f.n {
		if err := process.Poll(ctx, 5*time.Minute, nil, func() error {
			select {
			case err := <-failed:
				return err
			default:
				return lease.Ready(f.runDir(i))
			}
		}); err != nil {
			return err
		}
	}
	return nil
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

// connect starts the stock frpc for all agents. Each process serves the files of a directory.
func (f *fleet) connect() error {
	binary, err := process.Binary("frpc")
	if err != nil {
		return err
	}
	often := fmt.Sprintf("healthCheck.intervalSeconds = %d", 1)
	for from := 0; from < f.n; from += perProcess {
		dir := filepath.Join(f.group.Dir(), fmt.Sprintf("frpc-%d", from))
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		for i := from; i < min(f.n, from+perProcess); i++ {
			data, err := os.ReadFile(filepath.Join(f.runDir(i), frpc.ConfigFile))
			if err != nil {
				return err
			}
			if !strings.Contains(string(data), often) {
				return errors.New("frpc.toml has another health check than this program knows")
			}
			rarely := strings.Replace(string(data), often, fmt.Sprintf("healthCheck.intervalSeconds = %d", checkEvery), 1)
			if err := os.WriteFile(filepath.Join(dir, id(i)+".toml"), []byte(rarely), 0o600); err != nil { //nolint:gosec // ours
				return err
			}
		}
		if _, err := f.group.Start(filepath.Base(dir), nil, binary, "--config_dir", dir); err != nil {
			return err
		}
	}
	return nil
}

// times are how long it took until shares of the agents had a tunnel.
type times struct{ half, most, all time.Duration }

func (t times) String() string {
	if t.all == 0 {
		return "no tunnel was away"
	}
	return fmt.Sprintf("half %.0f s, 99%% %.0f s, all %.0f s", t.half.Seconds(), t.most.Seconds(), t.all.Seconds())
}

// back waits until all agents have opened a tunnel since begin.
func (f *fleet) back(ctx context.Context, begin time.Time) (t times, err error) {
	err = process.Poll(ctx, 15*time.Minute, nil, func() error {
		n := f.cp.OpenedSince(begin)
		for _, share := range []struct {
			n  int
			at *time.Duration
		}{{f.n / 2, &t.half}, {f.n * 99 / 100, &t.most}, {f.n, &t.all}} {
			if n >= share.n && *share.at == 0 {
				*share.at = time.Since(begin)
			}
		}
		if n < f.n {
			return fmt.Errorf("%d of %d agents have a tunnel", n, f.n)
		}
		return nil
	})
	return t, err
}

// answer serves for all proxies: TLS behind a PROXY header for callers, and HTTP for frpc's health checks. It returns
// its address.
func answer(ctx context.Context) (string, error) {
	certificatePEM, key, err := cert.GenerateSelfSignedCertKey("localhost", nil, nil)
	if err != nil {
		return "", err
	}
	certificate, err := tls.X509KeyPair(certificatePEM, key)
	if err != nil {
		return "", err
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/watch", func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil { // a watch with a bookmark a minute
			_, _ = io.WriteString(w, "{}\n")
			_ = http.NewResponseController(w).Flush()
			wait(r.Context(), time.Minute)
		}
	})
	mux.HandleFunc("/", func(http.ResponseWriter, *http.Request) {})
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: time.Minute, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0),
	}
	tlsConfig := &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12}
	context.AfterFunc(ctx, func() { _ = server.Close() })
	go func() {
		_ = server.Serve(&either{listener, tlsConfig})
	}()
	return listener.Addr().String(), nil
}

func wait(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// call sends a request to an agent by frps, as a caller does.
func (f *fleet) call(ctx context.Context, i int, path string) (*http.Response, error) {
	address, tlsConfig := f.cp.Direct(id(i))
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
	return client.Do(req)
}

// answering returns an error unless every agent answers a call.
func (f *fleet) answering(ctx context.Context) error {
	var calls errgroup.Group
	calls.SetLimit(50)
	for i := range f.n {
		calls.Go(func() error {
			resp, err := f.call(ctx, i, "/version")
			if err == nil {
				_ = resp.Body.Close()
				if resp.StatusCode != http.StatusOK {
					err = fmt.Errorf("%s: %s", id(i), resp.Status)
				}
			}
			return err
		})
	}
	return calls.Wait()
}

// watch holds a watch of each agent open, until stop.
func (f *fleet) watch(ctx context.Context) (stop func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	var calls errgroup.Group
	calls.SetLimit(50)
	for i := range f.n {
		calls.Go(func() error {
			resp, err := f.call(ctx, i, "/watch") //nolint:bodyclose // closed when the watch ends
			if err != nil {
				return err
			}
			go func() {
				_, _ = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
			}()
			return nil
		})
	}
	if err := calls.Wait(); err != nil {
		cancel()
		return nil, err
	}
	return cancel, nil
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
