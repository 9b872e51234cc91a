package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/cert"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/link"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// way is a way over a distance. A field's zero value is the default of frp and Linux.
type way struct {
	name       string
	direct     bool   // neither frp nor the proxy: the caller connects to what stands in for the API server
	protocol   string // transport.protocol of frpc
	noMux      bool
	congestion string // TCP's congestion control at both ends: cubic or bbr
	http2      bool   // the caller speaks it, and not HTTP/1.1
}

var ways = []way{
	{name: "TCP without a tunnel", direct: true},
	{name: "tcp"},
	{name: "tcp, no tcpMux", noMux: true},
	{name: "quic", protocol: "quic"},
	{name: "kcp", protocol: "kcp"},
	{name: "tcp, BBR", congestion: "bbr"},
	{name: "tcp, callers of HTTP/2", http2: true},
}

var distances = []time.Duration{20 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond}

const (
	distanceRounds = 3
	patience       = 5 * time.Second // with a download: with loss it may need minutes
	smallUpload    = 8 << 20

	// Ports in the link's namespaces.
	frpsPort, quicPort, vhostPort = 7000, 7001, 8443
	apiPort, proxyPort            = 6443, 8080
)

// distanceFigures are what is measured of each way, MB/s and ms.
var distanceFigures = []string{"64 MiB down MB/s", "8 MiB up MB/s", "call ms", "call during the download ms",
	"first call of a connection ms"}

// distance measures stock frps and frpc, and the proxy behind them, over an IP link with delay and loss. It needs root.
func distance(ctx context.Context) error {
	type path struct {
		loss float64
		way  string
		rtt  time.Duration
	}
	measured := map[path][][]float64{} // by round
	losses := []float64{0, 0.001}
	for _, rtt := range distances {
		for _, loss := range losses {
			for round := range distanceRounds {
				fmt.Fprintf(os.Stderr, "distance: %s, loss %g: round %d of %d\n", rtt, loss, round+1, distanceRounds)
				results := make([][]float64, len(ways))
				var group errgroup.Group
				if loss == 0 { // else the path is the limit, not this machine, and one after the other would take long
					group.SetLimit(1)
				}
				for i, w := range ways {
					group.Go(func() (err error) {
						if results[i], err = measureWay(ctx, w, link.Options{RTT: rtt, Loss: loss}); err != nil {
							err = fmt.Errorf("%s, %s, loss %g: %w", w.name, rtt, loss, err)
						}
						return err
					})
				}
				if err := group.Wait(); err != nil {
					return err
				}
				for i, w := range ways {
					p := path{loss, w.name, rtt}
					measured[p] = append(measured[p], results[i])
				}
			}
		}
	}
	fmt.Printf("| loss %% | | %s |\n|%s\n", strings.Join(distanceFigures, " | "),
		strings.Repeat(" --- |", 2+len(distanceFigures)))
	for _, loss := range losses {
		for _, w := range ways {
			fmt.Printf("| %g | %s |", loss*100, w.name)
			for f := range distanceFigures {
				var cells []string
				for _, rtt := range distances {
					var values []float64
					for _, round := range measured[path{loss, w.name, rtt}] {
						values = append(values, round[f])
					}
					cells = append(cells, fmt.Sprintf("%.3g", median(values)))
				}
				fmt.Printf(" %s |", strings.Join(cells, ", "))
			}
			fmt.Println()
		}
	}
	return nil
}

// measureWay returns the distanceFigures of a way over a link of its own.
func measureWay(ctx context.Context, w way, options link.Options) ([]float64, error) {
	l, err := link.New(options)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	group, err := process.NewGroup()
	if err != nil {
		return nil, err
	}
	defer group.Close()
	for end, peer := range map[*link.End]*link.End{l.A: l.B, l.B: l.A} {
		if err := end.Do(func() error { return setTCP(peer.IP, cmp.Or(w.congestion, "cubic")) }); err != nil {
			return nil, err
		}
	}
	var proxy *process.Process
	err = l.B.Do(func() (err error) {
		proxy, err = startProxy(group)
		return err
	})
	if err != nil {
		return nil, err
	}
	defer proxy.Kill() // it would drain for 3 s
	p := peer{url: fmt.Sprintf("https://%s:%d", l.B.IP, apiPort)}
	if !w.direct {
		p = peer{url: fmt.Sprintf("https://%s:%d/api/k8s", l.A.IP, vhostPort),
			header: http.Header{"Authorization": {"Bearer callers"}}}
		if err := startFrpOver(ctx, group, l, w); err != nil {
			return nil, err
		}
	}
	return measureOver(ctx, l.A, p, w.http2)
}

// measureOver returns the distanceFigures of callers at one end of a link.
func measureOver(ctx context.Context, end *link.End, p peer, http2 bool) ([]float64, error) {
	bulk, kept, fresh := callerAt(end, http2), callerAt(end, http2), callerAt(end, http2)
	defer bulk.CloseIdleConnections()
	defer kept.CloseIdleConnections()
	fresh.Transport.(*http.Transport).DisableKeepAlives = true
	for _, c := range []*http.Client{bulk, kept} { // connects, as soon as all processes listen
		err := process.Poll(ctx, 30*time.Second, nil, func() error { return call(ctx, c, p, "/api/v1/small") })
		if err != nil {
			return nil, err
		}
	}
	callMs := func(c *http.Client, n int) (float64, error) {
		us, _, err := loadBy(ctx, c, p, "/api/v1/small", 1, n)
		if err != nil {
			return 0, err
		}
		return median(us) / 1e3, nil
	}
	single, err := callMs(kept, 11)
	if err != nil {
		return nil, err
	}
	first, err := callMs(fresh, 11)
	if err != nil {
		return nil, err
	}
	var down float64
	downloaded := make(chan error, 1)
	go func() {
		var err error
		down, err = download(ctx, bulk, p)
		downloaded <- err
	}()
	var during []float64
	for len(downloaded) == 0 && err == nil {
		var ms float64
		ms, err = callMs(kept, 1)
		during = append(during, ms)
	}
	if err := errors.Join(err, <-downloaded); err != nil {
		return nil, err
	}
	begin := time.Now()
	err = upload(ctx, bulk, p, smallUpload)
	return []float64{down, smallUpload / 1e6 / time.Since(begin).Seconds(), single, median(during), first}, err
}

// setTCP gives a namespace the buffers that most kernels have, whatever this machine's are, and the route to peer a
// congestion control: unlike a namespace's default one, it need not be among those that the machine allows to all.
func setTCP(peer, congestion string) error {
	for name, value := range map[string]string{"tcp_rmem": "4096 131072 6291456", "tcp_wmem": "4096 16384 4194304"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0); err != nil {
			return err
		}
	}
	out, err := exec.Command("ip", "route", "change", peer, "dev", link.Device, "congctl", congestion).CombinedOutput()
	if err != nil {
		return fmt.Errorf("set TCP's congestion control to %s: %w: %s", congestion, err, out)
	}
	return nil
}

// startProxy starts our proxy for tunnels of type https, and what stands in for the API server.
func startProxy(group *process.Group) (*process.Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	binary, err := process.Binary("proxy")
	if err != nil {
		return nil, err
	}
	certificate, key, err := cert.GenerateSelfSignedCertKey(domains["https"], nil, nil)
	if err != nil {
		return nil, err
	}
	kubeconfig := filepath.Join(group.Dir(), "kubeconfig")
	if err := errors.Join(
		os.WriteFile(filepath.Join(group.Dir(), frpc.CertFile), certificate, 0o600),
		os.WriteFile(filepath.Join(group.Dir(), frpc.KeyFile), key, 0o600),
		cluster.WriteKubeconfig(kubeconfig, &rest.Config{Host: fmt.Sprintf("https://127.0.0.1:%d", apiPort),
			BearerToken: "t", TLSClientConfig: rest.TLSClientConfig{Insecure: true}}),
	); err != nil {
		return nil, err
	}
	if _, err := group.Start("upstream", nil, self, "upstream", fmt.Sprintf(":%d", apiPort)); err != nil {
		return nil, err
	}
	return group.Start("proxy", []string{
		"PIPEOPS_AGENT_ID=bench", "PIPEOPS_AGENT_TOKEN=callers", "KUBECONFIG=" + kubeconfig,
		"PIPEOPS_RUN_DIR=" + group.Dir(), fmt.Sprintf("PIPEOPS_LISTEN_ADDR=127.0.0.1:%d", proxyPort),
	}, binary)
}

// startFrpOver starts frps and frpc at the two ends of a link, with the settings that we recommend and write.
func startFrpOver(ctx context.Context, group *process.Group, l *link.Link, w way) error {
	err := l.A.Do(func() error {
		_, err := startFrp(ctx, group, "frps", "frps started successfully", map[string]any{
			"bindPort": frpsPort, "kcpBindPort": frpsPort, "quicBindPort": quicPort, "vhostHTTPSPort": vhostPort,
			"transport": map[string]any{"tcpMux": !w.noMux, "tcpMuxKeepaliveInterval": 10},
		})
		return err
	})
	if err != nil {
		return err
	}
	return l.B.Do(func() error {
		_, err := startFrp(ctx, group, "frpc", "start proxy success", map[string]any{
			"serverAddr": l.A.IP, "serverPort": cmp.Or(map[string]int{"quic": quicPort}[w.protocol], frpsPort),
			"transport": map[string]any{"protocol": w.protocol, "tcpMux": !w.noMux, "tcpMuxKeepaliveInterval": 10,
				"poolCount": 5},
			"proxies": []any{map[string]any{
				"name": "agent", "type": "https", "localPort": proxyPort, "customDomains": []string{domains["https"]},
				"transport": map[string]any{"proxyProtocolVersion": "v2"},
			}},
		})
		return err
	})
}

// callerAt returns a client that is at one end of a link.
func callerAt(end *link.End, http2 bool) *http.Client {
	c := client(1)
	t := c.Transport.(*http.Transport)
	t.TLSClientConfig.ServerName = domains["https"]
	t.Protocols.SetHTTP1(!http2)
	t.Protocols.SetHTTP2(http2)
	t.DialContext = func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
		err = end.Do(func() error {
			conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
			return err
		})
		return conn, err
	}
	return c
}

// download returns the MB/s of a large answer, as far as it has come when the patience ends.
func download(ctx context.Context, c *http.Client, p peer) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	req, err := p.request(ctx, http.MethodGet, "/api/v1/large", nil)
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	resp, err := c.Do(req)
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	n, err := io.Copy(io.Discard, resp.Body)
	if errors.Is(err, context.DeadlineExceeded) {
		err = nil
	}
	return float64(n) / 1e6 / time.Since(begin).Seconds(), err
}
