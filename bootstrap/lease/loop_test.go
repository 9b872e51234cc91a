package lease

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/controlplane"
	"github.com/pipeops/vm-agent/frpc"
)

// The loop runs on the clock of testing/synctest, against servers outside of it. The integration tests have a real
// frpc.

// pod is what shares a pod with bootstrap: frpc's admin API, and the proxy's count of requests.
type pod struct {
	admin   frpc.Admin
	metrics string // address of the proxy

	mu       sync.Mutex
	status   string // of frpc
	running  int    // requests
	stops    int    // asked for
	lastStop int    // which stop ends frpc; 0: none
	stuck    bool   // a connection to frpc does not end by a stop
}

const (
	up        = `{"https":[{"name":"a","type":"https","status":"running"}]}`
	loggedOut = `{}`
)

func newPod(t *testing.T) *pod {
	t.Helper()
	p := &pod{status: up}
	var api *httptest.Server
	api = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if r.URL.Path != "/api/stop" {
			_, _ = io.WriteString(w, p.status)
			return
		}
		p.stops++
		if p.stops == p.lastStop {
			_ = api.Listener.Close()
		}
		if !p.stuck {
			go api.CloseClientConnections()
		}
	}))
	t.Cleanup(api.Close)
	p.admin = frpc.Admin{Port: api.Listener.Addr().(*net.TCPAddr).Port, User: "pipeops", Password: "p"}
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		p.mu.Lock()
		defer p.mu.Unlock()
		_, _ = fmt.Fprintf(w, `{"requests_in_flight":%d}`, p.running)
	}))
	t.Cleanup(proxy.Close)
	p.metrics = strings.TrimPrefix(proxy.URL, "http://")
	return p
}

func (p *pod) set(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
}

func (p *pod) stopped() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stops
}

// renewing runs a renewer in the pod until the test's bubble ends. Its first lease is due for renewal.
func (p *pod) renewing(t *testing.T) *renewer {
	t.Helper()
	r := newRenewer(t, giving())
	r.cfg.Proxy.MetricsAddr = p.metrics
	r.lease.Frpc.Admin = p.admin
	if _, err := r.lease.Write(r.cfg.RunDir); err != nil {
		t.Fatal(err)
	}
	r.notYet, r.renewAt = time.Time{}, time.Now()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- r.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return r
}

// after lets the loop run for so long: an odd number of seconds, so that it is between two looks then.
func after(d time.Duration) {
	time.Sleep(d + time.Second)
	synctest.Wait()
}

func isStale(t *testing.T, runDir string) bool {
	t.Helper()
	l, err := frpc.ReadLease(runDir)
	if err != nil {
		t.Fatal(err)
	}
	return l.Stale != nil
}

// TestFrpcIsRestartedForANewLeaseWhenIdle: not while a request runs, and not while frpc is logged out for another
// reason. Meanwhile removed files come back.
func TestFrpcIsRestartedForANewLeaseWhenIdle(t *testing.T) {
	p := newPod(t)
	synctest.Test(t, func(t *testing.T) {
		p.running = 1
		r := p.renewing(t)
		if after(time.Minute); p.stopped() != 0 || !isStale(t, r.cfg.RunDir) {
			t.Fatalf("frpc was stopped %d times while a request ran", p.stopped())
		}
		file := filepath.Join(r.cfg.RunDir, frpc.ConfigFile)
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		after(2 * time.Second)
		if _, err := os.Stat(file); err != nil {
			t.Errorf("it was not restored: %v", err)
		}
		p.set(func() { p.running = 0 })
		if after(4 * time.Second); p.stopped() != 1 || isStale(t, r.cfg.RunDir) {
			t.Errorf("frpc was stopped %d times for the new lease, want once", p.stopped())
		}
		if after(time.Minute); p.stopped() != 1 {
			t.Errorf("frpc was stopped again: %d times", p.stopped())
		}
	})
}

func TestFrpcIsNotRestartedForANewLeaseWhileItIsLoggedOut(t *testing.T) {
	p := newPod(t)
	synctest.Test(t, func(t *testing.T) {
		p.status = loggedOut
		r := newRenewer(t, giving())
		r.login = lacking(errUnreachable)
		r.cfg.Proxy.MetricsAddr = p.metrics
		r.lease.Frpc.Admin = p.admin
		r.notYet, r.renewAt = time.Time{}, time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		if err := r.run(ctx); err != nil || p.stopped() != 0 || !isStale(t, r.cfg.RunDir) {
			t.Errorf("frpc was stopped %d times, %v", p.stopped(), err)
		}
	})
}

// TestStuckFrpcFailsItsLivenessProbe: for 25 s, which is three probes, and not for ever.
func TestStuckFrpcFailsItsLivenessProbe(t *testing.T) {
	t.Parallel() // its stop takes five seconds by the real clock
	p := newPod(t)
	synctest.Test(t, func(t *testing.T) {
		p.stuck = true
		dir := t.TempDir()
		if err := stopFrpc(t.Context(), dir, p.admin); !errors.Is(err, frpc.ErrStuck) {
			t.Fatal(err)
		}
		for _, at := range []struct {
			wait  time.Duration
			stuck bool
		}{{0, true}, {20 * time.Second, true}, {10 * time.Second, false}} {
			time.Sleep(at.wait)
			synctest.Wait()
			if _, err := os.Stat(filepath.Join(dir, frpc.StuckFile)); (err == nil) != at.stuck {
				t.Errorf("%s later: %v", at.wait, err)
			}
		}
	})
}

// TestTunnelIsClosedOnceFrpcHasEnded: it counts as closed no sooner, and bootstrap does not wait for ever.
func TestTunnelIsClosedOnceFrpcHasEnded(t *testing.T) {
	refusal := &controlplane.Failure{Err: errors.New("revoked")}
	for last, want := range map[int]string{3: "revoked; the tunnel is closed", 0: "it still runs): delete the pod"} {
		p := newPod(t)
		p.lastStop = last
		synctest.Test(t, func(t *testing.T) {
			dir := t.TempDir()
			for _, name := range []string{frpc.ConfigFile, frpc.TokenFile} {
				if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			begin := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			err := closeTunnel(ctx, dir, p.admin, refusal)
			if !strings.HasSuffix(err.Error(), want) || last > 0 && p.stopped() != last {
				t.Errorf("after %d stops: %v, want %s", p.stopped(), err, want)
			}
			if took := time.Since(begin); took > 10*time.Second {
				t.Errorf("it took %s", took)
			}
			if left, _ := os.ReadDir(dir); len(left) > 0 {
				t.Errorf("frpc finds %v", left)
			}
		})
	}
}

// TestLeasesAreTenSecondsApart: however short they are, and whatever else asks for one.
func TestLeasesAreTenSecondsApart(t *testing.T) {
	r := newRenewer(t, giving())
	now := time.Now()
	lease := r.lease
	lease.ExpiresAt = now.Add(2 * time.Second)
	r.adopt(lease, now)
	if r.renewalDue(now.Add(9*time.Second)) || !r.renewalDue(now.Add(10*time.Second)) {
		t.Errorf("a lease of two seconds is renewed after %s", r.renewAt.Sub(now))
	}
	r.renewAt, r.notYet = now, now.Add(time.Minute) // the control plane asks for more
	if r.renewalDue(now.Add(59*time.Second)) || !r.renewalDue(now.Add(time.Minute)) {
		t.Error("a lease is requested before the control plane wants")
	}
	r.recordState(frpc.LoggedOut, now)
	r.outage.request = now
	if r.renewalDue(now.Add(59 * time.Second)) {
		t.Error("in an outage, a lease is requested before the control plane wants")
	}
}

// TestOutageEndsWithALogin: also if frpc has withdrawn the tunnel since, because the proxy drains: a new lease would
// improve nothing.
func TestOutageEndsWithALogin(t *testing.T) {
	r := newRenewer(t, giving())
	for state, ends := range map[frpc.State]bool{
		frpc.Withdrawn: true, frpc.Starting: true, frpc.Running: true, frpc.Down: true,
		frpc.Unknown: false, frpc.LoggedOut: false, frpc.Rejected: false,
	} {
		begin := time.Now()
		r.outage = outage{}
		r.recordState(frpc.LoggedOut, begin)
		if r.recordState(state, begin.Add(time.Minute)); r.outage.since.IsZero() != ends ||
			!ends && !r.outage.since.Equal(begin) {
			t.Errorf("state %d: an outage since %s", state, r.outage.since)
		}
	}
}

// TestRunDirectoryIsLocked: for one bootstrap, until it ends.
func TestRunDirectoryIsLocked(t *testing.T) {
	dir := t.TempDir()
	release, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(dir); err == nil {
		t.Error("it is locked twice")
	}
	release()
	if release, err = lock(dir); err != nil {
		t.Fatal(err)
	}
	release()
}

// TestCertificateHasTheNamesOfItsLease: not those of the lease before.
func TestCertificateHasTheNamesOfItsLease(t *testing.T) {
	env := environment(t, "https://control.example")
	env["PIPEOPS_FRP_TUNNEL_TYPE"] = "https"
	end := time.Now().Add(24 * time.Hour)
	issue := func(context.Context, []byte) (controlplane.Answer, *controlplane.Failure) {
		tunnel := frpc.Tunnel{CustomDomains: []string{"a.agents.example"}}
		return controlplane.Answer{FRPToken: "f", ExpiresAt: end, Ends: end, Tunnel: tunnel}, nil
	}
	lease, fail := requestLease(t.Context(), configuration(t, env), issue, frpc.Lease{})
	if fail != nil {
		t.Fatal(fail)
	}
	block, _ := pem.Decode(lease.Certificate)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil || c.VerifyHostname("a.agents.example") != nil || c.VerifyHostname("agent-001") != nil {
		t.Errorf("the certificate is for %v, %v", c.DNSNames, err)
	}
}

// TestUnreadableTokenIsNoNewOne: the lease that is renewed meanwhile was not requested with an empty one.
func TestUnreadableTokenIsNoNewOne(t *testing.T) {
	r := newRenewer(t, giving())
	file := filepath.Join(t.TempDir(), "token")
	r.cfg.Agent.TokenFile = file
	if fail := r.renew(t.Context()); fail != nil || r.token != token {
		t.Errorf("requested with %q, %v", r.token.Reveal(), fail)
	}
}

// away configures an agent of a control plane that cannot be reached, beside a pod.
func away(t *testing.T, p *pod, port int) *config.Config {
	t.Helper()
	env := environment(t, "http://127.0.0.1:"+strconv.Itoa(port))
	env["PIPEOPS_METRICS_ADDR"], env["PIPEOPS_FRP_ADMIN_PORT"] = p.metrics, strconv.Itoa(p.admin.Port)
	env["PIPEOPS_FRP_SERVER_ADDR"], env["PIPEOPS_FRP_SERVER_PORT"] = "127.0.0.1", strconv.Itoa(port) // no DNS in a bubble
	return configuration(t, env)
}

// TestRestartedBootstrapKeepsTheLease: while there is no other. If frpc may run with another frpc.toml, it says so.
func TestRestartedBootstrapKeepsTheLease(t *testing.T) {
	port := unusedPort(t)
	for _, foreign := range []bool{false, true} {
		p := newPod(t)
		p.running = 1
		synctest.Test(t, func(t *testing.T) {
			cfg := away(t, p, port)
			lease, err := newLease(cfg, controlplane.Answer{FRPToken: "f", Ends: time.Now().Add(time.Hour)}, p.admin)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := lease.Write(cfg.RunDir); err != nil {
				t.Fatal(err)
			}
			stuck := filepath.Join(cfg.RunDir, frpc.StuckFile)
			files := map[string]string{stuck: ""}
			if foreign {
				files[filepath.Join(cfg.RunDir, frpc.ConfigFile)] = "another"
			}
			for file, content := range files {
				if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			ended := make(chan error)
			go func() { ended <- Run(ctx, cfg, 5*time.Second, false, slog.New(slog.DiscardHandler)) }()
			after(10 * time.Second)
			if _, err := os.Stat(stuck); err == nil {
				t.Error("frpc fails its liveness probe for what a killed bootstrap has left")
			}
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			if now, err := Read(cfg.RunDir); err != nil || now.Frpc.Token != "f" || now.Renewal == nil ||
				(now.Stale != nil) != foreign || p.stopped() != 0 {
				t.Errorf("the lease is %+v, %v; frpc was stopped %d times", now, err, p.stopped())
			}
		})
	}
}

// TestRevokedAgentLosesTheTunnelOfBefore: bootstrap was restarted, and the files of its last lease are not whole.
func TestRevokedAgentLosesTheTunnelOfBefore(t *testing.T) {
	p := newPod(t)
	p.lastStop = 1
	server := httptest.NewServer(answer(403, "application/json", `{"revoked":true}`))
	defer server.Close()
	env := environment(t, server.URL)
	env["PIPEOPS_FRP_ADMIN_PORT"] = strconv.Itoa(p.admin.Port)
	cfg := configuration(t, env)
	file := filepath.Join(cfg.RunDir, frpc.ConfigFile)
	if err := os.WriteFile(file, []byte("\nwebServer.password = \"p\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := Run(t.Context(), cfg, time.Minute, false, slog.New(slog.DiscardHandler))
	if err == nil || !strings.HasSuffix(err.Error(), "the tunnel is closed") || p.stopped() != 1 {
		t.Errorf("frpc was stopped %d times, %v", p.stopped(), err)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("frpc finds its frpc.toml")
	}
}

// TestFirstLeaseIsWaitedForAsAsked: as long as the control plane asks for, but a final failure is not repeated.
func TestFirstLeaseIsWaitedForAsAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, final := range []bool{false, true} {
			var attempts []time.Time
			issue := retryUntilLease(func(context.Context, []byte) (controlplane.Answer, *controlplane.Failure) {
				if attempts = append(attempts, time.Now()); len(attempts) > 1 {
					return controlplane.Answer{}, nil
				}
				return controlplane.Answer{}, &controlplane.Failure{
					Err: errors.New("not now"), RetryAfter: 40 * time.Second, Final: final,
				}
			}, filepath.Join(t.TempDir(), waitingFile), slog.New(slog.DiscardHandler))
			_, fail := issue(t.Context(), nil)
			if final && (len(attempts) != 1 || fail == nil) {
				t.Errorf("a final failure: %d attempts, %v", len(attempts), fail)
			}
			if !final && (fail != nil || len(attempts) != 2 || attempts[1].Sub(attempts[0]) != 40*time.Second) {
				t.Errorf("attempts at %v, %v", attempts, fail)
			}
		}
	})
}

// TestCertificateOutlivesItsLease: by five and a half minutes, and is valid for hosts whose clocks are slow. It is not
// used for a lease with another end.
func TestCertificateOutlivesItsLease(t *testing.T) {
	end := time.Now().Add(3 * time.Hour).Truncate(time.Second)
	der, _ := newCertificate([]string{"agent-001"}, end, nil)
	block, _ := pem.Decode(der)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if grace := c.NotAfter.Sub(end); grace != 330*time.Second {
		t.Errorf("it outlives the lease by %s", grace)
	}
	if before := time.Since(c.NotBefore); before < 23*time.Hour || before > 25*time.Hour {
		t.Errorf("it is valid since %s", before)
	}
	for other, same := range map[time.Duration]bool{
		0: true, 270 * time.Second: true, -270 * time.Second: true, 271 * time.Second: false, -271 * time.Second: false,
	} {
		if sameEnd(end, end.Add(other)) != same {
			t.Errorf("an end %s later is the same: %v", other, !same)
		}
	}
	cfg := configuration(t, environment(t, "https://control.example"))
	asked := 0
	issue := func(context.Context, []byte) (controlplane.Answer, *controlplane.Failure) {
		answer := controlplane.Answer{FRPToken: "f", ExpiresAt: end, Tunnel: frpc.Tunnel{Type: "https"}}
		if asked++; asked == 1 { // this request shows no certificate, and the next one for this end
			answer.ExpiresAt = end.Add(-time.Hour)
		}
		return answer, nil
	}
	lease, fail := requestLease(t.Context(), cfg, issue, frpc.Lease{})
	if fail != nil || asked != 3 {
		t.Fatalf("asked %d times: %v", asked, fail)
	}
	if block, _ = pem.Decode(lease.Certificate); block == nil {
		t.Fatal("no certificate")
	}
	if c, err = x509.ParseCertificate(block.Bytes); err != nil || !c.NotAfter.Equal(end.Add(330*time.Second)) {
		t.Errorf("the certificate ends %s, the lease %s; %v", c.NotAfter, end, err)
	}
}
