package integration

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// connectedWithLeases returns a world whose agent is ready and has leases with these terms. frpc is restarted as by a
// kubelet.
func connectedWithLeases(t *testing.T, terms controlplane.Terms, options ...func(*controlplane.Options)) *world {
	t.Helper()
	w := newWorld(t, options...)
	w.cp.SetTerms(terms)
	w.startAgent()
	w.agent.RestartFrpc(t.Context())
	return w
}

func (w *world) lease() *frpc.Lease {
	w.t.Helper()
	lease, err := frpc.ReadLease(w.agent.RunDir)
	if err != nil {
		w.t.Fatal(err)
	}
	return lease
}

// waitRenewed waits until there is another lease than before.
func (w *world) waitRenewed(before *frpc.Lease) *frpc.Lease {
	w.t.Helper()
	var now *frpc.Lease
	harness.Eventually(w.t, time.Minute, func() error {
		if now = w.lease(); now.ExpiresAt.Equal(before.ExpiresAt) {
			return fmt.Errorf("the lease until %s is not renewed", before.ExpiresAt)
		}
		return nil
	})
	return now
}

// waitAnswering waits until a request through the tunnel succeeds.
func (w *world) waitAnswering() {
	w.t.Helper()
	eventually(w.t, func() error {
		if resp, body := w.ask(http.MethodGet, "/version"); resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", resp.Status, body)
		}
		return nil
	})
}

// stream opens a watch through the tunnel, and returns a channel that is closed when the watch ends.
func (w *world) stream() <-chan struct{} {
	w.t.Helper()
	ended := make(chan struct{})
	watch := w.openStream("/api/k8s/api/v1/namespaces/default/configmaps?watch=true")
	go func() {
		defer close(ended)
		buffer := make([]byte, 4096)
		for {
			if _, err := watch.Body.Read(buffer); err != nil {
				return
			}
		}
	}()
	w.t.Cleanup(func() { _ = watch.Body.Close(); <-ended })
	return ended
}

func runs(ended <-chan struct{}) bool {
	select {
	case <-ended:
		return false
	default:
		return true
	}
}

// sharedToken has the control plane give leases with frp's shared token.
func sharedToken(o *controlplane.Options) { o.Token = true }

// eachMethod runs test with both authentication methods of frp.
func eachMethod(t *testing.T, test func(t *testing.T, method func(*controlplane.Options))) {
	t.Helper()
	for name, method := range map[string]func(*controlplane.Options){"oidc": func(*controlplane.Options) {},
		"token": sharedToken} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, method)
		})
	}
}

// TestTokenRenewalWaitsForStreams uses method token. frpc reads its credential once, so it is restarted with the new
// one: when no stream runs through the tunnel, or else just before the old credential expires.
func TestTokenRenewalWaitsForStreams(t *testing.T) {
	t.Parallel()
	w := connectedWithLeases(t, controlplane.Terms{Life: 40 * time.Second}, sharedToken)
	first := w.lease()
	watch := w.stream()
	second := w.waitRenewed(first)
	if !runs(watch) || w.agent.FrpcRestarts() != 0 || time.Now().After(first.ExpiresAt) {
		t.Fatalf("the watch was cut by the renewal; frpc was restarted %d times", w.agent.FrpcRestarts())
	}
	if first.Frpc.Admin.Password != second.Frpc.Admin.Password {
		t.Error("frpc, which still runs, has another password than lease.json says")
	}
	<-watch
	if left := time.Until(first.ExpiresAt); left > 10*time.Second {
		t.Errorf("the watch was cut %s before the old credential ends", left)
	}
	w.waitAnswering()
	// Without a stream frpc is restarted at once.
	third := w.waitRenewed(second)
	eventually(t, func() error {
		if w.agent.FrpcRestarts() < 2 {
			return fmt.Errorf("frpc was restarted %d times", w.agent.FrpcRestarts())
		}
		return nil
	})
	if time.Now().After(second.ExpiresAt.Add(-6*time.Second)) || third.Renewal != nil {
		t.Errorf("frpc was restarted late: the lease before ends at %s", second.ExpiresAt)
	}
	w.waitAnswering()
}

// TestOIDCRenewalCutsNothing uses method oidc. frpc reads the token at every login, so nothing is ever cut. The
// tunnel is of type https, and its certificate changes too.
func TestOIDCRenewalCutsNothing(t *testing.T) {
	t.Parallel()
	w := connectedWithLeases(t, controlplane.Terms{Life: 20 * time.Second, TunnelType: "https"})
	first := w.lease()
	certificate := w.file(frpc.CertFile)
	token := w.file(frpc.TokenFile)
	watch := w.stream()
	second := w.waitRenewed(w.waitRenewed(first))
	if !runs(watch) || w.agent.FrpcRestarts() != 0 || time.Now().Before(first.ExpiresAt) {
		t.Fatalf("the watch was cut, frpc was restarted %d times", w.agent.FrpcRestarts())
	}
	if w.file(frpc.CertFile) == certificate || w.file(frpc.TokenFile) == token {
		t.Error("the certificate or the token is still the first")
	}
	if code, results, details := w.doctor(); code != 0 {
		t.Errorf("doctor: %v %v", results, details)
	}
	// The first token has expired, and doctor has requested a lease. frpc logs in again by itself, with the token that is
	// in the file now.
	w.cp.StopFrps()
	if err := w.cp.StartFrps(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.waitAnswering()
	if w.agent.FrpcRestarts() != 0 || second.Frpc.AuthMethod != "oidc" {
		t.Errorf("frpc was restarted %d times", w.agent.FrpcRestarts())
	}
}

// TestManyRenewalsCutNothing renews the lease and certificate of one instance many times, while callers list over
// kept and over new connections, and a watch, an exec and a log stream run from the first lease to the last. No call
// fails, no stream ends, and frpc is never restarted. RENEWALS sets the number, about 14 s each.
func TestManyRenewalsCutNothing(t *testing.T) {
	t.Parallel()
	renewals, err := strconv.Atoi(cmp.Or(os.Getenv("RENEWALS"), "3"))
	if err != nil {
		t.Fatal(err)
	}
	w := connectedWithLeases(t, controlplane.Terms{Life: 20 * time.Second, TunnelType: "https"})
	ns := w.namespace()
	lines := make(chan string)
	loggingPod(t, lines, ns)
	t.Cleanup(func() { close(lines) }) // ends the log stream, or the kubelet's server would wait for it
	watch, exec := w.stream(), startSession(t, w, ns)
	follow := w.startKubectl("follow", "logs", "-f", "pod", "-n", ns)
	wantLog := "first line\n"
	logged := func() error {
		if got := follow.Log(); got != wantLog {
			return fmt.Errorf("logs -f: got %q, want %q", got, wantLog)
		}
		return nil
	}
	eventually(t, logged)

	gateway, base := w.client()
	addr, config := w.cp.Direct(agentID)
	direct := &http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		}}}
	var calls, failures atomic.Int32
	stop := make(chan struct{})
	var callers sync.WaitGroup
	call := func(client *http.Client, base string) {
		pace := time.NewTicker(25 * time.Millisecond) // other tests run at the same time
		defer pace.Stop()
		for {
			select {
			case <-pace.C:
			case <-stop:
				return
			}
			calls.Add(1)
			if err := list(t.Context(), client, base+"/api/k8s/api/v1/namespaces"); err != nil {
				failures.Add(1)
				t.Errorf("%s: call %d: %v", time.Now().Format(time.TimeOnly), calls.Load(), err)
			}
		}
	}
	for range 2 {
		callers.Go(func() { call(gateway, base) })
		callers.Go(func() { call(direct, "https://"+config.ServerName) })
	}
	started := time.Now()
	first := w.lease()
	for last, i := first, 1; i <= renewals; i++ {
		last = w.waitRenewed(last)
		line := fmt.Sprintf("renewal %d", i)
		wantLog += line + "\n"
		select {
		case lines <- line:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: the log stream was cut", line)
		}
		eventually(t, logged)
		if !runs(watch) || !runs(w.agent.Frpc.Done()) {
			t.Fatalf("%s: the watch runs: %v, frpc runs: %v", line, runs(watch), runs(w.agent.Frpc.Done()))
		}
	}
	took := time.Since(started)
	close(stop)
	callers.Wait()
	if _, err := io.WriteString(exec.stdin, "hello\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := exec.out.ReadString('\n'); err != nil || line != "got hello\n" {
		t.Errorf("exec: got %q, %v", line, err)
	}
	if w.agent.FrpcRestarts() != 0 || time.Now().Before(first.ExpiresAt) {
		t.Errorf("frpc was restarted %d times; the first lease ends at %s", w.agent.FrpcRestarts(), first.ExpiresAt)
	}
	t.Logf("%d renewals in %s: %d calls, %d failed; watch, exec and log stream uncut; frpc's pid is still %d",
		renewals, took.Round(time.Second), calls.Load(), failures.Load(), w.agent.Frpc.Pid())
}

// list requests a list, and reads all of it.
func list(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+agentToken)
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, body)
	}
	return err
}

func (w *world) file(name string) string {
	w.t.Helper()
	data, err := os.ReadFile(filepath.Join(w.agent.RunDir, name))
	if err != nil {
		w.t.Fatal(err)
	}
	return string(data)
}

// TestRunDirectoryIsRepaired checks that bootstrap restores each of its files within seconds, and that frpc, which
// still runs, keeps its admin password. A second bootstrap on the same directory is refused, because it would change
// both.
func TestRunDirectoryIsRepaired(t *testing.T) {
	t.Parallel()
	w := connectedWithLeases(t, controlplane.Terms{Life: time.Hour, TunnelType: "https"})
	for _, args := range [][]string{{"--once"}, nil} {
		second, err := w.agent.Command(args...)
		if err != nil {
			t.Fatal(err)
		}
		const want = "another bootstrap uses it, stop that one first"
		select {
		case <-second.Done():
			if code := second.ExitCode(); code != 1 || !strings.Contains(second.Log(), want) {
				t.Errorf("bootstrap %v beside a running one: exit code %d, want 1 and %q:\n%s", args, code, want, second.Log())
			}
		case <-time.After(10 * time.Second):
			second.Stop()
			t.Errorf("bootstrap %v runs beside another", args)
		}
	}
	harms := map[string]func(path string) error{
		"removed": os.Remove,
		"broken":  func(path string) error { return os.WriteFile(path, []byte("{"), 0o600) },
	}
	for _, name := range []string{frpc.ConfigFile, frpc.TokenFile, frpc.CertFile, frpc.KeyFile, frpc.LeaseFile} {
		before := w.file(name)
		for harm, do := range harms {
			if err := do(filepath.Join(w.agent.RunDir, name)); err != nil {
				t.Fatal(err)
			}
			err := process.Poll(t.Context(), 10*time.Second, nil, func() error {
				if now, err := os.ReadFile(filepath.Join(w.agent.RunDir, name)); err != nil || string(now) != before {
					return fmt.Errorf("%s was %s and is not restored: %w", name, harm, err)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		}
	}
	if err := w.agent.WaitReady(t.Context()); err != nil {
		t.Error(err)
	}
	// bootstrap restarts with a broken lease.json, and frpc still runs with the previous password.
	w.agent.Bootstrap.Stop()
	if err := os.WriteFile(filepath.Join(w.agent.RunDir, frpc.LeaseFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.agent.StartBootstrap(); err != nil {
		t.Fatal(err)
	}
	if err := w.agent.WaitReady(t.Context()); err != nil {
		t.Error(err)
	}
	if w.agent.FrpcRestarts() != 0 {
		t.Errorf("frpc was restarted %d times", w.agent.FrpcRestarts())
	}
}

// TestChangedTunnelIsReloadedWithoutARestart changes only the tunnel of the lease, here its type. The stock frpc
// reloads it, and streams go on.
func TestChangedTunnelIsReloadedWithoutARestart(t *testing.T) {
	t.Parallel()
	w := connectedWithLeases(t, controlplane.Terms{Life: 30 * time.Second})
	watch := w.stream()
	pid := w.agent.FrpcPid()
	w.cp.SetTerms(controlplane.Terms{Life: time.Hour, TunnelType: "http"})
	harness.Eventually(t, time.Minute, func() error {
		proxies, err := w.lease().Frpc.Admin.Status(t.Context())
		if err == nil && (len(proxies) != 1 || proxies[0].Type != "http" || proxies[0].Status != "running") {
			err = fmt.Errorf("frpc's proxies are %+v", proxies)
		}
		return err
	})
	w.waitAnswering()
	if !runs(watch) || w.agent.FrpcRestarts() != 0 || w.agent.FrpcPid() != pid {
		t.Errorf("the watch runs: %v; frpc was restarted %d times:\n%s", runs(watch), w.agent.FrpcRestarts(),
			w.agent.Bootstrap.Log())
	}
	if !strings.Contains(w.agent.Bootstrap.Log(), "frpc reloaded its configuration") {
		t.Errorf("bootstrap's log:\n%s", w.agent.Bootstrap.Log())
	}
}

// TestTunnelSurvivesAControlPlaneOutage checks that the tunnel stays up, that /ready and the status say why the lease
// is not renewed, and that the renewal recovers by itself.
func TestTunnelSurvivesAControlPlaneOutage(t *testing.T) {
	t.Parallel()
	w := connectedWithLeases(t, controlplane.Terms{Life: 40 * time.Second})
	w.cp.Fail(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	watch := w.stream()
	first := w.lease()
	want := "the renewal of the lease has failed since "
	harness.Eventually(t, time.Minute, func() error {
		code, ready, err := w.agent.Ready(t.Context())
		if err == nil && (code != http.StatusOK || !strings.HasPrefix(ready.Checks["tunnel"].Detail, want) ||
			time.Now().Before(first.ExpiresAt)) {
			err = fmt.Errorf("/ready answers %d %+v", code, ready)
		}
		return err
	})
	if status := w.status(); !strings.HasPrefix(status.Tunnel.LeaseProblem, want) ||
		!strings.Contains(status.Tunnel.LeaseProblem, "503 Service Unavailable") {
		t.Errorf("status: %+v", status.Tunnel)
	}
	wantMetric(t, w.agent, "pipeops_agent_tunnel_lease_renewal_failing 1")
	if !runs(watch) {
		t.Error("the watch was cut")
	}
	w.cp.Fail(nil)
	w.waitRenewed(first)
	eventually(t, func() error {
		if _, ready, err := w.agent.Ready(t.Context()); err != nil || strings.HasPrefix(ready.Checks["tunnel"].Detail, want) {
			return fmt.Errorf("%+v, %w", ready, err)
		}
		return nil
	})
	w.waitAnswering()
}

// TestMiddlebox403ClosesNoTunnel has a middlebox answer 403 with a page of its own. The tunnel stays open until the
// lease expires.
func TestMiddlebox403ClosesNoTunnel(t *testing.T) {
	t.Parallel()
	w := connectedWithLeases(t, controlplane.Terms{Life: 20 * time.Second})
	blocked := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, `<html>{"revoked":true}</html>`)
	})
	wantProblem := func() {
		t.Helper()
		eventually(t, func() error {
			const want = "or something on the way to it, refuses the request (403 Forbidden, text/html): " +
				"check agent.api_url (PIPEOPS_API_URL), and the proxies and firewalls on the way; " +
				"unless a retry succeeds, the tunnel is closed when the lease expires"
			if code, ready, err := w.agent.Ready(t.Context()); err != nil || code != http.StatusOK ||
				!strings.Contains(ready.Checks["tunnel"].Detail, want) {
				return fmt.Errorf("/ready answers %d %+v, %w", code, ready, err)
			}
			return nil
		})
	}
	w.cp.Fail(blocked)
	watch := w.stream()
	first := w.lease()
	wantProblem()
	if !runs(watch) {
		t.Error("the watch was cut")
	}
	w.cp.Fail(nil)
	second := w.waitRenewed(first)
	w.cp.Fail(blocked)
	wantProblem()
	if code := w.agent.Bootstrap.ExitCode(); code != 1 ||
		!strings.Contains(w.agent.Bootstrap.Log(), "on the way; the tunnel is closed") {
		t.Errorf("bootstrap ends with %d:\n%s", code, w.agent.Bootstrap.Log())
	}
	if early := time.Until(second.ExpiresAt); early > 0 {
		t.Errorf("the tunnel was closed %s before the lease ended", early)
	}
	if _, err := os.Stat(filepath.Join(w.agent.RunDir, frpc.ConfigFile)); err == nil {
		t.Error("frpc.toml is still there")
	}
	w.cp.Fail(nil)
	if err := w.agent.StartBootstrap(); err != nil {
		t.Fatal(err)
	}
	w.waitAnswering()
}

// TestRevokedAgentLosesItsTunnel checks that the tunnel is closed after the control plane has said twice that the
// agent is revoked, that bootstrap ends with the reason, and that the agent connects again when it is no longer
// revoked.
func TestRevokedAgentLosesItsTunnel(t *testing.T) {
	t.Parallel()
	w := connectedWithLeases(t, controlplane.Terms{Life: time.Hour})
	watch := w.stream()
	w.cp.Revoke(agentID, true)
	w.agent.Bootstrap.Stop()
	if err := w.agent.StartBootstrap(); err != nil { // it requests a lease at once
		t.Fatal(err)
	}
	wantMetric(t, w.agent, "pipeops_agent_tunnel_lease_renewal_failing 1")
	first := w.lease().Renewal
	if !runs(watch) || first == nil || !strings.HasSuffix(first.Error,
		"; the tunnel is closed if the next answer is the same") {
		t.Errorf("after the first answer: the watch runs: %v, lease.json says %+v", runs(watch), first)
	}
	if code := w.agent.Bootstrap.ExitCode(); code != 1 {
		t.Errorf("bootstrap ends with %d", code)
	}
	const want = `accepts the token but does not let agent \"agent-001\" connect ` +
		`(403 Forbidden: the agent was revoked): check agent.id (PIPEOPS_AGENT_ID), ` +
		`and whether the agent was revoked; the tunnel is closed`
	if took := time.Since(first.FailingSince); took < 30*time.Second || took > 45*time.Second {
		t.Errorf("the tunnel was closed after %s", took)
	}
	lines := strings.Split(strings.TrimSpace(w.agent.Bootstrap.Log()), "\n")
	if last := lines[len(lines)-1]; !strings.Contains(last, want) {
		t.Errorf("its last line is %s\nwant %s", last, want)
	}
	eventually(t, func() error {
		if resp, _ := w.ask(http.MethodGet, "/version"); resp.StatusCode != http.StatusServiceUnavailable {
			return fmt.Errorf("the tunnel answers %s", resp.Status)
		}
		return nil
	})
	wantReady(t, w.agent, "tunnel", "frpc's admin API at ")
	if _, err := os.Stat(filepath.Join(w.agent.RunDir, frpc.ConfigFile)); err == nil {
		t.Error("frpc.toml is still there")
	}
	w.cp.Revoke(agentID, false)
	if err := w.agent.StartBootstrap(); err != nil {
		t.Fatal(err)
	}
	w.waitAnswering()
	// bootstrap is killed after it removed frpc.toml and before it stopped frpc: the next one stops it.
	w.cp.Revoke(agentID, true)
	w.agent.Bootstrap.Kill()
	if err := os.Remove(filepath.Join(w.agent.RunDir, frpc.ConfigFile)); err != nil {
		t.Fatal(err)
	}
	next, err := w.agent.Command()
	if err != nil {
		t.Fatal(err)
	}
	if code := next.ExitCode(); code != 1 || !strings.Contains(next.Log(), "the tunnel is closed") {
		t.Errorf("exit code %d: %s", code, next.Log())
	}
	if resp, body := w.ask(http.MethodGet, "/version"); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("the tunnel answers %s: %s", resp.Status, body)
	}
}

// TestRefusedLeaseIsReplaced has the control plane forget its leases, or move frps. The agent does not wait until its
// lease expires.
func TestRefusedLeaseIsReplaced(t *testing.T) {
	t.Parallel()
	for name, happen := range map[string]func(w *world) error{
		"leases forgotten": func(w *world) error {
			w.cp.RevokeLeases()
			w.cp.StopFrps()
			return w.cp.StartFrps(w.t.Context())
		},
		"frps moved": func(w *world) error { return w.cp.MoveFrps(w.t.Context()) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachMethod(t, func(t *testing.T, method func(*controlplane.Options)) {
				w := connectedWithLeases(t, controlplane.Terms{Life: time.Hour}, method)
				if err := happen(w); err != nil {
					t.Fatal(err)
				}
				harness.Eventually(t, time.Minute, func() error {
					if resp, body := w.ask(http.MethodGet, "/version"); resp.StatusCode != http.StatusOK {
						return fmt.Errorf("%s: %s", resp.Status, body)
					}
					return nil
				})
			})
		})
	}
}

// TestExpiredLeasesAreReplaced gives leases that have expired when they arrive or expire at once, and a lease with
// another type of tunnel.
func TestExpiredLeasesAreReplaced(t *testing.T) {
	t.Parallel()
	for name, life := range map[string]time.Duration{"past": -time.Hour, "one second": time.Second} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.cp.SetTerms(controlplane.Terms{Life: life})
			if err := w.agent.StartBootstrap(); err != nil {
				t.Fatal(err)
			}
			first := w.lease()
			if next := w.waitRenewed(first); next.IssuedAt.Sub(first.IssuedAt) < 10*time.Second {
				t.Errorf("the control plane is asked again after %s", next.IssuedAt.Sub(first.IssuedAt))
			}
			if !strings.Contains(w.agent.Bootstrap.Log(), "the lease has already expired") {
				t.Errorf("bootstrap does not log it:\n%s", w.agent.Bootstrap.Log())
			}
		})
	}
	t.Run("http becomes https", func(t *testing.T) {
		t.Parallel()
		w := connectedWithLeases(t, controlplane.Terms{Life: 15 * time.Second, TunnelType: "http"})
		w.cp.SetTerms(controlplane.Terms{Life: time.Hour, TunnelType: "https"})
		w.waitRenewed(w.lease())
		eventually(t, func() error {
			if resp, body := w.ask(http.MethodGet, "/api/agent/status"); resp.StatusCode != http.StatusOK ||
				!strings.Contains(body, `"type":"https"`) {
				return fmt.Errorf("%s: %s", resp.Status, body)
			}
			return nil
		})
		w.waitAnswering()
	})
}

// TestRotatedTokenIsUsedAtOnce changes the agent's token in its file. The lease is renewed at once, and callers may
// use the new token.
func TestRotatedTokenIsUsedAtOnce(t *testing.T) {
	t.Parallel()
	eachMethod(t, tokenIsRotated)
}

func tokenIsRotated(t *testing.T, method func(*controlplane.Options)) {
	t.Helper()
	w := newWorld(t, method)
	file := filepath.Join(w.group.Dir(), "token")
	write := func(token string) {
		t.Helper()
		if err := process.ReplaceFile(file, token); err != nil {
			t.Fatal(err)
		}
	}
	write(agentToken)
	w.agent.Env = append(w.agent.Env, "PIPEOPS_AGENT_TOKEN=", "PIPEOPS_AGENT_TOKEN_FILE="+file)
	w.startAgent()
	w.agent.RestartFrpc(t.Context())
	first := w.lease()
	watch := w.stream()
	w.cp.SetAgent(agentID, "another-token")
	write("another-token")
	w.waitRenewed(first)
	if !runs(watch) {
		t.Error("the watch was cut")
	}
	w.token = "another-token"
	w.waitAnswering()
}

// TestBootstrapStopsOnSIGTERM checks that bootstrap ends at once, whatever it waits for, and leaves complete files
// for the next one.
func TestBootstrapStopsOnSIGTERM(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	asked := make(chan struct{}, 1)
	w.cp.Fail(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		_, _ = io.Copy(io.Discard, r.Body)
		<-r.Context().Done() // it never answers
	}))
	p, err := w.agent.Command()
	if err != nil {
		t.Fatal(err)
	}
	<-asked
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", p.Pid()))
	if err != nil || !regexp.MustCompile(`Max core file size +0 +0 `).Match(limits) {
		t.Errorf("bootstrap may dump core: %v\n%s", err, limits)
	}
	p.Stop()
	if code := p.ExitCode(); code != 1 || !strings.Contains(p.Log(), "stopped by a signal before there was a lease") {
		t.Errorf("while it asks: exit code %d: %s", code, p.Log())
	}
	w.cp.Fail(nil)
	if err := w.agent.StartBootstrap(); err != nil {
		t.Fatal(err)
	}
	w.agent.Bootstrap.Stop()
	if code := w.agent.Bootstrap.ExitCode(); code != 0 {
		t.Errorf("while it keeps a lease: exit code %d: %s", code, w.agent.Bootstrap.Log())
	}
	if probe, err := w.agent.Command("ready"); err != nil || probe.ExitCode() != 0 {
		t.Errorf("its files are not whole: %v", err)
	}
}
