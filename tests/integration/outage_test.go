package integration

import (
	"cmp"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/elazarl/goproxy"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/relay"
)

// TestFrpsOutageRestartsNothing freezes or kills frps for a while. frpc is never restarted, few leases are requested,
// and the tunnel is back soon after frps. OUTAGES="1s 20s 2m 10m" sets the durations, by default the first two.
func TestFrpsOutageRestartsNothing(t *testing.T) {
	t.Parallel()
	for outage := range strings.FieldsSeq(cmp.Or(os.Getenv("OUTAGES"), "1s 20s")) {
		duration, err := time.ParseDuration(outage)
		if err != nil {
			t.Fatal(err)
		}
		for _, fault := range []string{"frozen", "killed"} {
			t.Run(fault+" for "+outage, func(t *testing.T) {
				t.Parallel()
				w := connectedWithLeases(t, controlplane.Terms{Life: time.Hour})
				leases := w.cp.LeasesGiven()
				pid := w.cp.FrpsPid()
				if fault == "frozen" {
					if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
						t.Fatal(err)
					}
				} else {
					w.cp.StopFrps()
				}
				select {
				case <-time.After(duration):
				case <-t.Context().Done():
				}
				if fault == "frozen" {
					err = syscall.Kill(pid, syscall.SIGCONT)
				} else {
					err = w.cp.StartFrps(t.Context())
				}
				if err != nil {
					t.Fatal(err)
				}
				back := time.Now()
				// frpc tries every 20 s, and each try may take 10.
				harness.Eventually(t, 45*time.Second, func() error {
					if resp, body := w.ask(http.MethodGet, "/version"); resp.StatusCode != http.StatusOK {
						return fmt.Errorf("%s: %s", resp.Status, body)
					}
					return nil
				})
				t.Logf("%s for %s: back after %.1f s; %d requests for leases", fault, outage, time.Since(back).Seconds(),
					w.cp.LeasesGiven()-leases)
				if n := w.agent.FrpcRestarts(); n > 0 {
					t.Errorf("frpc was restarted %d times:\n%s", n, w.agent.Bootstrap.Log())
				}
			})
		}
	}
}

// newRelay starts a relay in front of a server.
func newRelay(t *testing.T, server string, after int64) *relay.Relay {
	t.Helper()
	r, err := relay.Start(t.Context(), "127.0.0.1", server, after)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// TestFrpcRecoversFromASilentLogin has a hop before frps, or frps itself, fall silent during frpc's login, and answer
// again later. Where frpc would wait forever it is restarted, with the kubelet's help if it does not even stop.
func TestFrpcRecoversFromASilentLogin(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name     string
		protocol string
		proxy    bool  // an HTTP proxy falls silent
		after    int64 // bytes
		second   bool  // it is not the first login
		hangs    bool  // frpc waits forever
	}{
		{"HTTP proxy, before it connects", "tcp", true, 0, false, true},
		{"HTTP proxy, before it connects, at a second login", "tcp", true, 0, true, true},
		{"HTTP proxy, in the TLS handshake", "tcp", true, 200, false, false},
		{"WebSocket, before it opens", "websocket", false, 0, false, true},
		{"WebSocket, before it opens, at a second login", "websocket", false, 0, true, true},
		{"WebSocket, in the TLS handshake", "websocket", false, 300, false, false},
		{"frps, before the TLS handshake", "tcp", false, 0, false, false},
		{"frps, in the TLS handshake", "tcp", false, 100, false, false},
		{"frps, before it answers the login", "tcp", false, 1500, false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			server := newOwnServer(t, w, true, "")
			w.agent.Env = append(w.agent.Env, "PIPEOPS_FRP_TOKEN=the-right-token",
				"PIPEOPS_API_URL=https://"+harness.FreeAddr(t),
				"PIPEOPS_FRP_TUNNEL_CUSTOM_DOMAINS=agent.example.test", "PIPEOPS_FRP_PROTOCOL="+test.protocol)
			frps := fmt.Sprintf("127.0.0.1:%d", server.bind)
			var silent *relay.Relay
			if test.proxy {
				proxy := httptest.NewServer(goproxy.NewProxyHttpServer())
				t.Cleanup(proxy.Close)
				silent = newRelay(t, proxy.Listener.Addr().String(), test.after)
				w.agent.Env = append(w.agent.Env, fmt.Sprintf("PIPEOPS_FRP_SERVER_PORT=%d", server.bind),
					"PIPEOPS_FRP_PROXY_URL=http://"+silent.Addr)
			} else {
				silent = newRelay(t, frps, test.after)
				_, port, _ := net.SplitHostPort(silent.Addr)
				w.agent.Env = append(w.agent.Env, "PIPEOPS_FRP_SERVER_PORT="+port)
			}
			silent.Silent.Store(!test.second)
			if err := w.agent.Start(); err != nil {
				t.Fatal(err)
			}
			w.agent.RestartFrpc(t.Context())
			if test.second {
				w.waitReady()
				silent.Silent.Store(true)
				silent.Cut()
			}
			eventually(t, func() error {
				code, _, err := w.agent.Ready(t.Context())
				if err == nil && (silent.Held() == 0 || code == http.StatusOK) {
					err = fmt.Errorf("%d connections are held, /ready answers %d", silent.Held(), code)
				}
				return err
			})
			silent.Silent.Store(false)
			begin := time.Now()
			harness.Eventually(t, 5*time.Minute, func() error {
				code, answer, err := w.agent.Ready(t.Context())
				if err == nil && code != http.StatusOK {
					err = fmt.Errorf("/ready: %+v", answer)
				}
				return err
			})
			t.Logf("back after %.0f s, %d restarts of frpc", time.Since(begin).Seconds(), w.agent.FrpcRestarts())
			if want := map[bool]int{true: 1}[test.hangs]; w.agent.FrpcRestarts() != want {
				t.Errorf("frpc was restarted %d times, want %d:\n%s", w.agent.FrpcRestarts(), want, w.agent.Bootstrap.Log())
			}
		})
	}
}

// TestHeartbeatsKeepTheTunnelOpen uses a frps that drops agents without heartbeats.
func TestHeartbeatsKeepTheTunnelOpen(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	server := newOwnServer(t, w, true, "")
	w.agent.Env = append(w.agent.Env, "PIPEOPS_FRP_TOKEN=the-right-token", "PIPEOPS_API_URL=https://"+harness.FreeAddr(t),
		fmt.Sprintf("PIPEOPS_FRP_SERVER_PORT=%d", server.bind), "PIPEOPS_LOG_LEVEL=debug")
	w.startAgent()
	select {
	case <-time.After(80 * time.Second): // more than twice frps's timeout
	case <-w.agent.Frpc.Done():
	}
	if n := strings.Count(w.agent.Frpc.Log(), "login to server success"); n != 1 {
		t.Errorf("frpc logged in %d times:\n%s", n, w.agent.Frpc.Log())
	}
}
