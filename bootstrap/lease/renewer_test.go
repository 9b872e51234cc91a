package lease

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/controlplane"
	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/secret"
)

const token = "hunter2"

// environment configures an agent of the control plane at url, with a tunnel of type http: its lease takes one request,
// without a certificate.
func environment(t *testing.T, url string) map[string]string {
	return map[string]string{
		"PIPEOPS_FRP_TUNNEL_TYPE": "http",
		"PIPEOPS_AGENT_ID":        "agent-001", "PIPEOPS_AGENT_TOKEN": token, "PIPEOPS_INSTANCE": "pod-1",
		"PIPEOPS_API_URL": url, "PIPEOPS_RUN_DIR": t.TempDir(),
	}
}

func answer(code int, contentType, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(code)
		_, _ = fmt.Fprint(w, body)
	}
}

// configuration is what Load makes of an environment.
func configuration(t *testing.T, env map[string]string) *config.Config {
	t.Helper()
	cfg, err := config.Load("", env)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// newRenewer keeps leases that source gives; the integration tests have a real control plane and a real frpc.
func newRenewer(t *testing.T, issue issuer) *renewer {
	t.Helper()
	r := &renewer{
		cfg: configuration(t, environment(t, "https://control.example")), issue: issue, login: accepts,
		log: slog.New(slog.DiscardHandler), backoff: backoffMin,
	}
	r.token = token
	lease, fail := requestLease(t.Context(), r.cfg, issue, frpc.Lease{})
	if fail != nil {
		t.Fatal(fail)
	}
	if err := write(r.cfg, lease, r.log); err != nil {
		t.Fatal(err)
	}
	r.adopt(lease, time.Now())
	return r
}

// giving gives leases that live for an hour, each with another credential.
func giving() issuer {
	n := 0
	return func(context.Context, []byte) (controlplane.Answer, *controlplane.Failure) {
		n++
		return controlplane.Answer{FRPToken: secret.Secret(fmt.Sprint("lease ", n)), Ends: time.Now().Add(time.Hour)}, nil
	}
}

// accepts is a frps that lets everybody in.
func accepts(context.Context, frpc.Config) (string, error) { return "0.71.0", nil }

// lacking returns a frps that does not let anybody in.
func lacking(err error) func(context.Context, frpc.Config) (string, error) {
	return func(context.Context, frpc.Config) (string, error) { return "", err }
}

var errUnreachable = errors.New("connection refused")

// TestLeaseIsRenewedAtTwoThirdsOfItsLife: after 65 to 75% of the lease's life, not sooner.
func TestLeaseIsRenewedAtTwoThirdsOfItsLife(t *testing.T) {
	r := newRenewer(t, giving())
	start := time.Now()
	if r.lease.Stale != nil || r.renewalDue(start) || r.renewalDue(start.Add(35*time.Minute)) {
		t.Error("a lease of an hour is renewed within 35 minutes")
	}
	if !r.renewalDue(start.Add(46 * time.Minute)) {
		t.Error("a lease of an hour is not renewed after 46 minutes")
	}
	var renewals []time.Duration
	for range 20 {
		r.adopt(r.lease, start)
		renewals = append(renewals, r.renewAt.Sub(start))
	}
	slices.Sort(renewals)
	if renewals[0] < 35*time.Minute || renewals[19] > 46*time.Minute || renewals[19]-renewals[0] < time.Minute {
		t.Errorf("agents that started together renew together: after %v", renewals)
	}
}

// outageOf lets frpc be logged out for so long, with a look every two seconds, or until it is to be restarted. It
// returns when leases were requested, when logins were tried, when frpc was to be restarted, and why.
func outageOf(t *testing.T, r *renewer, state frpc.State, life time.Duration) (
	requests, logins, restarts []time.Duration, reason string,
) {
	t.Helper()
	start := time.Now()
	now := start
	ask, login := r.issue, r.login
	r.issue = func(ctx context.Context, certificate []byte) (controlplane.Answer, *controlplane.Failure) {
		requests = append(requests, now.Sub(start))
		return ask(ctx, certificate)
	}
	r.login = func(ctx context.Context, c frpc.Config) (string, error) {
		logins = append(logins, now.Sub(start))
		return login(ctx, c)
	}
	for ; now.Sub(start) < life; now = now.Add(2 * time.Second) {
		r.recordState(state, now)
		r.probeFrps(t.Context(), now)
		if r.renewalDue(now) {
			_ = r.renew(t.Context())
			r.notYet = now.Add(10 * time.Second) // renew has it by the real clock
			if o := &r.outage; !o.since.IsZero() {
				o.request, o.probe = now.Add(time.Until(o.request)), now
			}
		}
		if reason = r.restartReason(now); reason != "" {
			restarts = append(restarts, now.Sub(start))
			break
		}
	}
	r.issue, r.login = ask, login
	return requests, logins, restarts, reason
}

// TestFrpcIsNotRestartedWhileFrpsIsUnreachable: while frps cannot be reached, frpc is left alone, and leases are
// requested ever more rarely.
func TestFrpcIsNotRestartedWhileFrpsIsUnreachable(t *testing.T) {
	var first []time.Duration
	for range 20 {
		r := newRenewer(t, unchanging)
		r.login = lacking(errUnreachable)
		requests, logins, restarts, reason := outageOf(t, r, frpc.LoggedOut, 10*time.Minute)
		if len(restarts) > 0 {
			t.Fatalf("frpc is restarted after %v: %s", restarts, reason)
		}
		if len(requests) < 3 || len(requests) > 5 || requests[0] < 15*time.Second || requests[0] > 47*time.Second {
			t.Fatalf("leases are requested after %v", requests)
		}
		if len(logins) < 7 || len(logins) > 20 || logins[0] < 7*time.Second || logins[0] > 24*time.Second {
			t.Fatalf("logins are tried after %v", logins)
		}
		first = append(first, requests[0])
	}
	if slices.Sort(first); first[19]-first[0] < 5*time.Second {
		t.Errorf("agents that lost frps together ask together: after %v", first)
	}
	r := newRenewer(t, giving()) // each lease is another: so frpc.toml changes, and still frpc is left alone
	r.login = lacking(errUnreachable)
	requests, _, restarts, reason := outageOf(t, r, frpc.LoggedOut, 10*time.Minute)
	if len(requests) < 3 || len(requests) > 5 || len(restarts) > 0 || r.lease.Stale == nil {
		t.Errorf("with another lease: requests %v, restarts %v %s", requests, restarts, reason)
	}
	now := time.Now()
	r.recordState(frpc.Running, now)
	if wait := r.noIdleRestartBefore.Sub(now); wait < 150*time.Second || wait > 450*time.Second {
		t.Errorf("back from the outage, frpc may be restarted for the new lease after %s", wait)
	}
}

// unchanging gives the same lease every time.
func unchanging(context.Context, []byte) (controlplane.Answer, *controlplane.Failure) {
	return controlplane.Answer{FRPToken: "the same", Ends: time.Now().Add(time.Hour)}, nil
}

// TestOutdatedFrpsIsReportedOnce: it is named once, by the first login that tells its version.
func TestOutdatedFrpsIsReportedOnce(t *testing.T) {
	for version, warned := range map[string]int{"0.70.1": 1, "0.9.3": 1, "0.71.0": 0, "1.0.0": 0, "": 0, "nonsense": 0} {
		r := newRenewer(t, unchanging)
		var log strings.Builder
		r.log = slog.New(slog.NewTextHandler(&log, nil))
		r.login = lacking(errUnreachable)
		_ = r.tryLogin(t.Context(), r.lease.Frpc)
		r.login = func(context.Context, frpc.Config) (string, error) { return version, nil }
		for range 3 {
			_ = r.tryLogin(t.Context(), r.lease.Frpc)
		}
		if n := strings.Count(log.String(), "frps is outdated"); n != warned {
			t.Errorf("version %q is warned of %d times: %s", version, n, log.String())
		}
	}
}

// TestRefusedCredentialRestartsFrpcWithANewLease: frps is there and refuses what frpc was started with. A new lease is
// requested at once, and frpc restarted when there is one.
func TestRefusedCredentialRestartsFrpcWithANewLease(t *testing.T) {
	r := newRenewer(t, giving())
	r.login = func(_ context.Context, c frpc.Config) (string, error) {
		if c.Token == "lease 1" { // with which frpc was started
			return "0.71.0", errors.New("frps refuses the login")
		}
		return "0.71.0", nil
	}
	requests, _, restarts, reason := outageOf(t, r, frpc.LoggedOut, 2*time.Minute)
	if len(requests) != 1 || len(restarts) != 1 ||
		requests[0] > 47*time.Second || restarts[0]-requests[0] > 4*time.Second ||
		reason != "frps accepts the new lease, and not the one that it was started with" {
		t.Errorf("requests %v, restarts %v: %s", requests, restarts, reason)
	}
	r = newRenewer(t, unchanging) // there is no better one
	r.login = lacking(errors.New("frps refuses the login"))
	if requests, _, restarts, _ := outageOf(t, r, frpc.LoggedOut, 10*time.Minute); len(requests) > 6 || len(restarts) > 0 {
		t.Errorf("requests %v, restarts %v", requests, restarts)
	}
	r = newRenewer(t, giving()) // the login is fine, the tunnel is not
	_, logins, restarts, reason := outageOf(t, r, frpc.Rejected, time.Minute)
	if len(logins) > 0 || len(restarts) != 1 || restarts[0] > 47*time.Second {
		t.Errorf("rejected: logins %v, restarts %v: %s", logins, restarts, reason)
	}
}

// TestHangingFrpcIsRestarted: frps accepts trial logins for two minutes, and frpc is still logged out.
func TestHangingFrpcIsRestarted(t *testing.T) {
	r := newRenewer(t, unchanging)
	_, _, restarts, reason := outageOf(t, r, frpc.LoggedOut, 4*time.Minute)
	if len(restarts) != 1 || restarts[0] < 127*time.Second || restarts[0] > 150*time.Second ||
		reason != "it is logged out although frps accepts logins" {
		t.Errorf("restarted after %v: %s", restarts, reason)
	}
	r.outage = outage{}
	n := 0
	r.login = func(context.Context, frpc.Config) (string, error) { // comes and goes
		n++
		return "", []error{nil, errUnreachable}[n%2]
	}
	if _, _, restarts, _ := outageOf(t, r, frpc.LoggedOut, 20*time.Minute); len(restarts) > 0 {
		t.Errorf("restarted after %v, though frps cannot be relied upon", restarts)
	}
}

// TestFrpcIsRestartedOnlyForAReason: never without need, and not for the sake of an unchanged frpc.toml.
func TestFrpcIsRestartedOnlyForAReason(t *testing.T) {
	r := newRenewer(t, giving())
	first, now := r.lease, time.Now()
	if r.restartReason(now) != "" {
		t.Error("restarted for the lease it has read")
	}
	again := first
	again.ExpiresAt = first.ExpiresAt.Add(time.Hour) // as with oidc, where only the token's file changes
	r.inherit(&again)
	if again.Stale != nil {
		t.Error("frpc.toml is the same, but frpc is to be restarted")
	}
	if fail := r.renew(t.Context()); fail != nil {
		t.Fatal(fail)
	}
	if r.lease.Stale == nil || r.lease.Stale.Frpc.Token != "lease 1" ||
		r.restartReason(now) != "" || r.restartReason(first.ExpiresAt.Add(-6*time.Second)) != "" {
		t.Errorf("stale %v: restarted before the old credential expires", r.lease.Stale)
	}
	if r.restartReason(first.ExpiresAt.Add(-4*time.Second)) == "" {
		t.Error("not restarted 4 s before the old credential expires")
	}
	if fail := r.renew(t.Context()); fail != nil ||
		!r.lease.Stale.Until.Equal(first.ExpiresAt) || r.lease.Stale.Frpc.Token != "lease 1" {
		t.Errorf("frpc may still run with the first credential, which ends at %s, not %+v (%v)",
			first.ExpiresAt, r.lease.Stale, fail)
	}
	// bootstrap is killed, and started again: what frpc runs with is not forgotten.
	if old, err := frpc.ReadLease(r.cfg.RunDir); err != nil || old.Stale == nil ||
		!old.Stale.Until.Equal(first.ExpiresAt) || old.Stale.Frpc.Token != "lease 1" {
		t.Errorf("lease.json does not say that frpc runs with the first credential: %+v, %v", old, err)
	}
	r.recordState(frpc.LoggedOut, now)
	if reason := r.restartReason(now); reason != "" {
		t.Errorf("restarted though nothing is known of frps: %s", reason)
	}
	r.login = func(_ context.Context, c frpc.Config) (string, error) { // frps has moved
		return "", map[string]error{"frp.pipeops.io": errUnreachable}[c.ServerAddr]
	}
	r.lease.Frpc.ServerAddr, r.outage.probe = "another.example", now
	if r.probeFrps(t.Context(), now); r.restartReason(now) == "" {
		t.Error("not restarted though frps is elsewhere")
	}
	r.recordState(frpc.Down, now)
	if r.lease.Stale != nil || r.restartReason(now) != "" {
		t.Error("restarted though it has not started yet")
	}
}

// TestFailedRenewalKeepsTheLease: the lease stays, its file says why, the attempts grow rare, and what the control
// plane asks for is respected.
func TestFailedRenewalKeepsTheLease(t *testing.T) {
	r := newRenewer(t, giving())
	first := r.lease
	r.issue = func(context.Context, []byte) (controlplane.Answer, *controlplane.Failure) {
		return controlplane.Answer{}, &controlplane.Failure{Err: errors.New("it is away"), RetryAfter: 24 * time.Hour}
	}
	for range 10 {
		if fail := r.renew(t.Context()); fail == nil {
			t.Fatal("a failure is taken for a lease")
		}
	}
	wait := time.Until(r.notYet)
	if r.renewalDue(time.Now().Add(89*time.Second)) || wait > 90*time.Second || !r.renewalDue(r.notYet) {
		t.Errorf("the next attempt is in %s", wait)
	}
	lease, err := frpc.ReadLease(r.cfg.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	if lease.Renewal == nil || lease.Renewal.Error != "it is away; the tunnel stays as it is" ||
		lease.Renewal.FailingSince.After(time.Now()) || lease.Frpc.Token != first.Frpc.Token {
		t.Errorf("lease.json says %+v", lease)
	}
	r.issue = giving()
	if fail := r.renew(t.Context()); fail != nil {
		t.Fatal(fail)
	}
	if lease, err := frpc.ReadLease(r.cfg.RunDir); err != nil || lease.Renewal != nil {
		t.Errorf("lease.json still says %+v, %v", lease, err)
	}
}

// TestFailedRenewalsBackOff: attempts that fail grow rare, from a second to a minute, more or less; and no sooner than
// the control plane asks for.
func TestFailedRenewalsBackOff(t *testing.T) {
	r := newRenewer(t, giving())
	retryAfter := time.Duration(0)
	r.issue = func(context.Context, []byte) (controlplane.Answer, *controlplane.Failure) {
		return controlplane.Answer{}, &controlplane.Failure{Err: errors.New("it is away"), RetryAfter: retryAfter}
	}
	attempt := func(low, high time.Duration) {
		t.Helper()
		begin := time.Now()
		_ = r.renew(t.Context())
		if wait := r.notYet.Sub(begin); wait < low || wait > high+time.Second || !r.renewAt.Equal(r.notYet) {
			t.Errorf("the next attempt is in %s, want %s to %s", wait, low, high)
		}
	}
	for _, seconds := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60} {
		attempt(seconds*time.Second/2, seconds*time.Second*3/2)
	}
	if r.backoff != time.Minute {
		t.Errorf("the attempts grow to be %s apart", r.backoff)
	}
	r.adopt(r.lease, time.Now())
	attempt(500*time.Millisecond, 1500*time.Millisecond) // a lease has begun it anew
	retryAfter = 40 * time.Second
	attempt(40*time.Second, 40*time.Second)
}

// TestChangedTokenRenewsTheLeaseOnce: a token that changes is a reason for one lease, not for one every ten seconds.
func TestChangedTokenRenewsTheLeaseOnce(t *testing.T) {
	r := newRenewer(t, giving())
	file := filepath.Join(t.TempDir(), "token")
	r.cfg.Agent.Token, r.cfg.Agent.TokenFile = "", file
	write := func(token string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(token)
	r.notYet = time.Time{}
	if r.inputChanged() {
		t.Error("the token is the same")
	}
	write("another-token-of-the-agent")
	if !r.inputChanged() {
		t.Error("the token has changed")
	}
	if fail := r.renew(t.Context()); fail != nil {
		t.Fatal(fail)
	}
	r.notYet = time.Time{}
	if r.inputChanged() {
		t.Error("the lease was requested with this token")
	}
}

// certificateIn configures the files for a certificate, and returns what writes them.
func certificateIn(t *testing.T, cfg *config.Config) (put func(certificate, key []byte)) {
	t.Helper()
	dir := t.TempDir()
	cfg.Proxy.CertFile, cfg.Proxy.KeyFile = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	return func(certificate, key []byte) {
		t.Helper()
		for file, data := range map[string][]byte{cfg.Proxy.CertFile: certificate, cfg.Proxy.KeyFile: key} {
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// newTestPair makes a certificate that ends after a while.
func newTestPair(life time.Duration) (certificate, key []byte) {
	return newCertificate([]string{"edge.example"}, time.Now().Add(life-grace), nil)
}

// TestConfiguredCertificateIsShown: to the control plane and to callers, in place of one of bootstrap's own; and a
// changed one soon, once it is whole. Until then the last whole one is shown, and leases are renewed.
func TestConfiguredCertificateIsShown(t *testing.T) {
	var shown []byte
	r := newRenewer(t, func(_ context.Context, certificate []byte) (controlplane.Answer, *controlplane.Failure) {
		shown = certificate
		return controlplane.Answer{FRPToken: "f", Tunnel: frpc.Tunnel{Type: "https"}}, nil
	})
	put := certificateIn(t, r.cfg)
	inUse := func(certificate, key []byte) {
		t.Helper()
		if fail := r.renew(t.Context()); fail != nil {
			t.Error(fail)
		}
		if r.notYet = (time.Time{}); r.inputChanged() {
			t.Error("it is shown already")
		}
		written, err := Read(r.cfg.RunDir)
		if err != nil || !bytes.Equal(shown, certificate) || !bytes.Equal(written.Certificate, certificate) ||
			!bytes.Equal(written.Key, key) || r.lease.Renewal != nil {
			t.Errorf("the control plane and callers see another certificate; %v", err)
		}
	}
	certificate, key := newTestPair(365 * 24 * time.Hour)
	put(certificate, key)
	if r.notYet = (time.Time{}); !r.inputChanged() {
		t.Error("the certificate has changed")
	}
	inUse(certificate, key)
	next, nextKey := newTestPair(365 * 24 * time.Hour)
	for _, half := range [][2][]byte{
		{next, key}, {next, nextKey[:len(nextKey)/2]}, {next[:len(next)/2], nextKey}, {nil, nil},
	} {
		put(half[0], half[1])
		if _, _, problem := Configured(r.cfg); !strings.Contains(problem, "PIPEOPS_PROXY_TLS_CERT_FILE") {
			t.Errorf("nobody hears of it: %s", problem)
		}
		inUse(certificate, key)
	}
	put(next, nextKey)
	if !r.inputChanged() {
		t.Error("the certificate has changed")
	}
	inUse(next, nextKey)
}

// TestUnusableCertificateStopsTheStart: there is none that could be shown in its place.
func TestUnusableCertificateStopsTheStart(t *testing.T) {
	cfg := configuration(t, environment(t, "https://control.example"))
	certificateIn(t, cfg)(nil, nil)
	_, fail := requestLease(t.Context(), cfg, giving(), frpc.Lease{})
	if fail == nil || !fail.Final || !strings.Contains(fail.Error(), "PIPEOPS_PROXY_TLS_CERT_FILE") {
		t.Error(fail)
	}
}

// TestCertificateThatEndsIsWarnedOf: two weeks before, once a day and not at each look; so is one that cannot be used.
func TestCertificateThatEndsIsWarnedOf(t *testing.T) {
	r := newRenewer(t, giving())
	var log bytes.Buffer
	r.log = slog.New(slog.NewTextHandler(&log, nil))
	put := certificateIn(t, r.cfg)
	const day = 24 * time.Hour
	for _, test := range []struct {
		life time.Duration // 0: no certificate
		says string
	}{
		{15 * day, ""}, {13*day + time.Hour, "in 13 days"}, {12*day + time.Hour, "in 12 days"},
		{time.Hour, "in 0 days"}, {-25 * time.Hour, "expired 1 days ago"}, {365 * day, "solved"}, {0, "cannot be used"}, {0, ""},
	} {
		put(nil, nil)
		if test.life != 0 {
			put(newTestPair(test.life))
		}
		log.Reset()
		r.inputChanged()
		r.inputChanged()
		lines, want := strings.Count(log.String(), "\n"), 1
		if test.says == "" {
			want = 0
		}
		if lines != want || !strings.Contains(log.String(), test.says) {
			t.Errorf("%v: %s", test.life, log.String())
		}
	}
}

// TestConfiguredGroupIsJoined: where the lease names none.
func TestConfiguredGroupIsJoined(t *testing.T) {
	env := environment(t, "https://control.example")
	env["PIPEOPS_FRP_TUNNEL_GROUP"], env["PIPEOPS_FRP_TUNNEL_GROUP_KEY"] = "edge", "key-of-the-group"
	env["PIPEOPS_FRP_TUNNEL_SUBDOMAIN_HOST"] = "agents.example"
	cfg := configuration(t, env)
	for given, want := range map[string]frpc.Tunnel{
		"":      {Group: "edge", GroupKey: "key-of-the-group", SubdomainHost: "agents.example"},
		"lease": {Group: "lease", GroupKey: "", SubdomainHost: "lease.example"},
	} {
		answer := controlplane.Answer{FRPToken: "f"}
		if given != "" {
			answer.Tunnel = frpc.Tunnel{Group: given, SubdomainHost: "lease.example"}
		}
		lease, err := newLease(cfg, answer, frpc.Admin{})
		got := lease.Frpc.Tunnel
		if err != nil || got.Group != want.Group || got.GroupKey != want.GroupKey || got.SubdomainHost != want.SubdomainHost {
			t.Errorf("%q: %+v, %v", given, got, err)
		}
		name := "agent-001." + want.SubdomainHost
		if !slices.Contains(certificateNames("agent-001", got), name) {
			t.Errorf("the certificate lacks %s", name)
		}
	}
}

// TestAdminPasswordIsRandomAndKept: of each agent's own, and kept.
func TestAdminPasswordIsRandomAndKept(t *testing.T) {
	cfg := configuration(t, environment(t, "https://control.example"))
	passwords := map[secret.Secret]bool{}
	for range 10 {
		lease, err := newLease(cfg, controlplane.Answer{FRPToken: "f"}, frpc.Admin{})
		if err != nil {
			t.Fatal(err)
		}
		passwords[lease.Frpc.Admin.Password] = len(lease.Frpc.Admin.Password) >= 26
		next, err := newLease(cfg, controlplane.Answer{FRPToken: "f"}, lease.Frpc.Admin)
		if err != nil || next.Frpc.Admin != lease.Frpc.Admin {
			t.Errorf("%+v, %v", next.Frpc.Admin, err)
		}
	}
	if delete(passwords, ""); len(passwords) != 10 {
		t.Errorf("%d different passwords in 10", len(passwords))
	}
}

// TestChangedTunnelIsReloaded: what differs in the tunnel alone is reloaded; a frpc that does not is restarted.
func TestChangedTunnelIsReloaded(t *testing.T) {
	var mu sync.Mutex
	answer := http.StatusOK
	var asked []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, r.Method+" "+r.URL.RequestURI())
		w.WriteHeader(answer)
	}))
	defer server.Close()
	_, port, _ := net.SplitHostPort(server.Listener.Addr().String())
	number, _ := strconv.Atoi(port)
	admin := frpc.Admin{Port: number}
	for _, test := range []struct {
		code   int
		change controlplane.Answer
		reload bool // is tried
		stale  bool // afterwards
	}{
		{http.StatusOK, controlplane.Answer{FRPToken: "the same", Tunnel: frpc.Tunnel{CustomDomains: []string{"b.example"}}}, true, false},
		{http.StatusBadRequest, controlplane.Answer{FRPToken: "the same", Tunnel: frpc.Tunnel{CustomDomains: []string{"b.example"}}}, true, true},
		{http.StatusOK, controlplane.Answer{FRPToken: "another", Tunnel: frpc.Tunnel{CustomDomains: []string{"b.example"}}}, false, true},
		{http.StatusOK, controlplane.Answer{FRPToken: "the same"}, false, false},
	} {
		r := newRenewer(t, unchanging)
		r.issue = func(context.Context, []byte) (controlplane.Answer, *controlplane.Failure) {
			test.change.Ends = time.Now().Add(time.Hour)
			return test.change, nil
		}
		if fail := r.renew(t.Context()); fail != nil {
			t.Fatal(fail)
		}
		mu.Lock()
		answer, asked = test.code, nil
		mu.Unlock()
		for range 2 {
			r.reload(t.Context(), admin)
		}
		mu.Lock()
		want := map[bool]int{true: 1}[test.reload]
		if len(asked) != want || want == 1 && asked[0] != "GET /api/reload?strictConfig=true" ||
			(r.lease.Stale != nil) != test.stale {
			t.Errorf("%+v: asked %v, stale %+v", test.change, asked, r.lease.Stale)
		}
		mu.Unlock()
	}
}

// TestRunDirectoryIsRepaired: the renewer holds everything that it writes, also after its own restart, says once what
// it has restored, and says once that it cannot.
func TestRunDirectoryIsRepaired(t *testing.T) {
	r := newRenewer(t, func(_ context.Context, _ []byte) (controlplane.Answer, *controlplane.Failure) {
		return controlplane.Answer{FRPToken: "f", AuthMethod: "oidc", Tunnel: frpc.Tunnel{Type: "https"}}, nil
	})
	old, err := Read(r.cfg.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	r.lease = *old
	var log strings.Builder
	r.log = slog.New(slog.NewTextHandler(&log, nil))
	for _, name := range []string{frpc.ConfigFile, frpc.TokenFile, frpc.CertFile, frpc.KeyFile, frpc.LeaseFile} {
		path := filepath.Join(r.cfg.RunDir, name)
		want, err := os.ReadFile(path)
		if err != nil || os.Remove(path) != nil {
			t.Fatal(err)
		}
		log.Reset()
		for range 3 {
			r.repair()
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != string(want) {
			t.Errorf("%s holds %q, %v", name, got, err)
		}
		if said := log.String(); strings.Count(said, "\n") != 1 || !strings.Contains(said, "["+name+"]") {
			t.Errorf("%s: said %q", name, said)
		}
	}
	log.Reset()
	dir := r.cfg.RunDir
	r.cfg.RunDir = filepath.Join(dir, "gone")
	for range 3 {
		r.repair()
	}
	if said := log.String(); strings.Count(said, "\n") != 1 ||
		!strings.Contains(said, "write the run directory: ") || !strings.Contains(said, "is not full") {
		t.Errorf("said %q", said)
	}
	// What could not be written is written as soon as it can be.
	r.lease.Renewal = &frpc.FailedRenewal{Error: "it is away"}
	r.cfg.RunDir = dir
	r.repair()
	if lease, err := frpc.ReadLease(dir); err != nil || lease.Renewal == nil {
		t.Errorf("lease.json says %+v, %v", lease, err)
	}
}

// TestForeignFrpcTomlMarksTheLeaseStale: bootstrap finds an frpc.toml that is not what it writes.
func TestForeignFrpcTomlMarksTheLeaseStale(t *testing.T) {
	r := newRenewer(t, giving())
	toml, err := r.lease.Frpc.TOML()
	if err != nil {
		t.Fatal(err)
	}
	for found, want := range map[string]bool{"": false, string(toml): false, "another": true} {
		lease := r.lease
		if markStale(&lease, []byte(found)); (lease.Stale != nil) != want {
			t.Errorf("%.10q: stale %v", found, lease.Stale)
		}
	}
}

// TestLeaseMustNotNameALocalFrps: to the host of the agent or its neighbours, unless the configuration does.
func TestLeaseMustNotNameALocalFrps(t *testing.T) {
	for _, addr := range []string{
		"127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "::ffff:169.254.169.254", "fe80::1",
		"0.0.0.0", "::", "::ffff:0.0.0.0", "224.0.0.1", "ff02::1", "localhost", "LOCALHOST", "frps.localhost",
	} {
		env := environment(t, "https://control.example")
		_, err := newLease(configuration(t, env), controlplane.Answer{FRPToken: "f", ServerAddr: addr}, frpc.Admin{})
		if err == nil || !strings.Contains(err.Error(), `names "`+addr+`" as frps`) ||
			!strings.Contains(err.Error(), "set frp.server_addr (PIPEOPS_FRP_SERVER_ADDR)") {
			t.Errorf("%s: %v", addr, err)
		}
		env["PIPEOPS_FRP_SERVER_ADDR"] = addr
		answer := controlplane.Answer{FRPToken: "f", ServerAddr: strings.ToLower(addr)}
		lease, err := newLease(configuration(t, env), answer, frpc.Admin{})
		if err != nil || !strings.EqualFold(lease.Frpc.ServerAddr, addr) {
			t.Errorf("%s, as configured: %v", addr, err)
		}
		answer.ServerAddr = "127.9.9.9"
		if _, err := newLease(configuration(t, env), answer, frpc.Admin{}); err == nil {
			t.Errorf("127.9.9.9 where %s is configured", addr)
		}
	}
	for _, addr := range []string{"", "frp.example", "localhost.example", "192.0.2.1", "10.0.0.1", "2001:db8::1"} {
		cfg := configuration(t, environment(t, "https://control.example"))
		if _, err := newLease(cfg, controlplane.Answer{FRPToken: "f", ServerAddr: addr}, frpc.Admin{}); err != nil {
			t.Errorf("%q: %v", addr, err)
		}
	}
}

// TestLeaseMustNotRemoveTLS: a tunnel that is configured as https stays so; where https is only the default, the log
// says that it does not.
func TestLeaseMustNotRemoveTLS(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte("frp: {tunnel: {type: https}}"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, got := range []string{"http", "tcp"} {
		env := environment(t, "https://control.example")
		delete(env, "PIPEOPS_FRP_TUNNEL_TYPE") // https is the default
		fromFile, err := config.Load(file, env)
		if err != nil {
			t.Fatal(err)
		}
		env["PIPEOPS_FRP_TUNNEL_TYPE"] = "https"
		answer := controlplane.Answer{FRPToken: "f", Tunnel: frpc.Tunnel{Type: got}}
		for origin, cfg := range map[string]*config.Config{"file": fromFile, "environment": configuration(t, env)} {
			_, err := newLease(cfg, answer, frpc.Admin{})
			want := "the control plane's lease has a tunnel of type " + got +
				", but frp.tunnel.type (PIPEOPS_FRP_TUNNEL_TYPE) is https"
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s from the %s: %v", got, origin, err)
			}
		}
		delete(env, "PIPEOPS_FRP_TUNNEL_TYPE")
		cfg := configuration(t, env)
		lease, err := newLease(cfg, answer, frpc.Admin{})
		if err != nil {
			t.Fatal(err)
		}
		var log strings.Builder
		if err := write(cfg, lease, slog.New(slog.NewTextHandler(&log, nil))); err != nil ||
			!strings.Contains(log.String(), "level=WARN msg=\"the tunnel is not of type https\"") {
			t.Errorf("%v, said %s", err, log.String())
		}
	}
	// The other way is an improvement.
	cfg := configuration(t, environment(t, "https://control.example"))
	answer := controlplane.Answer{FRPToken: "f", Tunnel: frpc.Tunnel{Type: "https"}}
	if _, err := newLease(cfg, answer, frpc.Admin{}); err != nil {
		t.Error(err)
	}
}

// TestOnlyTheProxyDecidesWhetherTheTunnelIsIdle: only the proxy's own word counts.
func TestOnlyTheProxyDecidesWhetherTheTunnelIsIdle(t *testing.T) {
	for body, want := range map[string]bool{
		`{"requests_in_flight":0}`: true,
		`{"requests_in_flight":2}`: false,
		`{}`:                       false,
		"":                         false,
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodGet || r.URL.Path != "/activity" {
				t.Errorf("asked %s %s", r.Method, r.URL)
			}
			_, _ = fmt.Fprint(w, body)
		}))
		r := newRenewer(t, giving())
		r.cfg.Proxy.MetricsAddr = strings.TrimPrefix(server.URL, "http://")
		if got := r.idle(t.Context()); got != want {
			t.Errorf("%q: %v", body, got)
		}
		server.Close()
		if r.idle(t.Context()) {
			t.Error("a proxy that does not answer is taken for idle")
		}
	}
	refusing := httptest.NewServer(answer(503, "application/json", `{"requests_in_flight":0}`))
	defer refusing.Close()
	r := newRenewer(t, giving())
	r.cfg.Proxy.MetricsAddr = strings.TrimPrefix(refusing.URL, "http://")
	if r.idle(t.Context()) {
		t.Error("a proxy that answers 503 is taken for idle")
	}
}

// TestLeaseWithoutHealthPathStillWorks: it was written by a version whose frpc.toml had another path.
func TestLeaseWithoutHealthPathStillWorks(t *testing.T) {
	r := newRenewer(t, giving())
	old := r.lease
	if old.Frpc.Tunnel.HealthPath != "/ready?only=shutdown" {
		t.Errorf("frpc asks %q", old.Frpc.Tunnel.HealthPath)
	}
	old.Frpc.Tunnel.HealthPath = ""
	if _, err := old.Write(r.cfg.RunDir); err != nil {
		t.Fatal(err)
	}
	got, err := Read(r.cfg.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	toml, err := old.Frpc.TOML()
	if err != nil {
		t.Fatal(err)
	}
	if markStale(got, toml); got.Stale == nil || !sameTOML(got.Frpc, r.lease.Frpc) {
		t.Errorf("frpc goes on with the old path: %+v", got)
	}
}

// TestControlPlaneIsShownACertificateForTheLease: the control plane is shown a certificate with the names and the life
// of the lease.
func TestControlPlaneIsShownACertificateForTheLease(t *testing.T) {
	end := time.Now().Add(3 * time.Hour).Truncate(time.Second)
	var shown [][]byte
	ask := func(_ context.Context, certificate []byte) (controlplane.Answer, *controlplane.Failure) {
		shown = append(shown, certificate)
		return controlplane.Answer{
			FRPToken: "f", ExpiresAt: end, Ends: end.Add(-100 * time.Hour), // this host's clock is another
			Tunnel: frpc.Tunnel{Type: "https", CustomDomains: []string{"a.agents.example"}},
		}, nil
	}
	cfg := configuration(t, environment(t, "https://control.example"))
	lease, fail := requestLease(t.Context(), cfg, ask, frpc.Lease{})
	if fail != nil {
		t.Fatal(fail)
	}
	// The configuration says http: that it is https, only the answer says.
	if len(shown) != 2 || shown[0] != nil || string(shown[1]) != string(lease.Certificate) {
		t.Fatalf("the control plane was shown %q", shown)
	}
	fits := func(c []byte, tunnel frpc.Tunnel, end time.Time) bool {
		block, _ := pem.Decode(c)
		cert, err := x509.ParseCertificate(block.Bytes)
		lacks := func(name string) bool { return cert.VerifyHostname(name) != nil }
		if err != nil || slices.ContainsFunc(append(tunnel.CustomDomains, "agent-001"), lacks) {
			return false
		}
		if end.IsZero() {
			return cert.NotAfter.Year() == 9999
		}
		grace := cert.NotAfter.Sub(end)
		return grace >= time.Minute && grace <= 10*time.Minute
	}
	tunnel := lease.Frpc.Tunnel
	if !fits(lease.Certificate, tunnel, end) {
		t.Error("the certificate does not fit its own lease")
	}
	if _, err := lease.Write(cfg.RunDir); err != nil {
		t.Fatal(err)
	}
	// The next is asked for with the right certificate at once, where the clocks agree.
	lease.IssuedAt, lease.ExpiresAt = end.Add(-3*time.Hour), end
	next, fail := requestLease(t.Context(), cfg, ask, lease)
	if fail != nil || len(shown) != 3 || string(next.Key) == string(lease.Key) {
		t.Errorf("%v, asked %d times; the key is new: %v", fail, len(shown), string(next.Key) != string(lease.Key))
	}
	if fits(next.Certificate, tunnel, end.Add(time.Hour)) || fits(next.Certificate, tunnel, end.Add(-time.Hour)) ||
		fits(next.Certificate, tunnel, time.Time{}) ||
		fits(next.Certificate, frpc.Tunnel{CustomDomains: []string{"b.agents.example"}}, end) {
		t.Error("fits another end, or another tunnel")
	}
	never := time.Time{}
	forever, _ := newCertificate(certificateNames("agent-001", tunnel), never, nil)
	if !sameEnd(never, never) || sameEnd(never, end) || sameEnd(end, never) || !fits(forever, tunnel, never) {
		t.Error("a lease without an end")
	}
	if matches, _ := filepath.Glob(filepath.Join(cfg.RunDir, "*")); len(matches) != 5 {
		t.Errorf("the run directory holds %v", matches)
	}
}

// TestCertificateOutlastsTheLeaseByEveryClock: callers have the right time, and a gateway that of the control plane.
func TestCertificateOutlastsTheLeaseByEveryClock(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	for _, ahead := range []time.Duration{-24 * time.Hour, 24 * time.Hour} {
		answer := controlplane.Answer{FRPToken: "f", Ends: now.Add(time.Hour), ExpiresAt: now.Add(time.Hour + ahead),
			Tunnel: frpc.Tunnel{Type: "https", CustomDomains: []string{"a.agents.example"}}}
		lease, fail := requestLease(t.Context(), configuration(t, environment(t, "https://control.example")),
			func(context.Context, []byte) (controlplane.Answer, *controlplane.Failure) { return answer, nil }, frpc.Lease{})
		if fail != nil {
			t.Fatal(fail)
		}
		block, _ := pem.Decode(lease.Certificate)
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		if cert.NotAfter.Before(answer.Ends) || cert.NotAfter.Before(answer.ExpiresAt) {
			t.Errorf("the control plane's clock is %s ahead, the certificate ends %s from now", ahead, cert.NotAfter.Sub(now))
		}
	}
}

// TestLeaseExpiresByTheClockOfTheControlPlane: a wrong clock here must not renew all the time, or too late; and what
// some take for a time that never comes is none.
func TestLeaseExpiresByTheClockOfTheControlPlane(t *testing.T) {
	for _, want := range []time.Duration{time.Hour, 73 * 365 * 24 * time.Hour, 0} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			now := time.Now().Add(-100 * time.Hour).UTC().Truncate(time.Second)
			w.Header().Set("Date", now.Format(http.TimeFormat))
			end := now.Add(want)
			if want == 0 {
				end = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)
			}
			_, _ = fmt.Fprintf(w, `{"frp_token":"f","expires_at":%q}`, end.Format(time.RFC3339))
		}))
		r := newRenewer(t, giving())
		client, err := controlplane.New(configuration(t, environment(t, server.URL)))
		if err != nil {
			t.Fatal(err)
		}
		r.issue = client.RequestLease
		begin := time.Now()
		if fail := r.renew(t.Context()); fail != nil {
			t.Fatal(fail)
		}
		server.Close()
		if want == 0 {
			if !r.lease.ExpiresAt.IsZero() || !r.renewAt.IsZero() {
				t.Errorf("the year 9999 is taken for a time: %s", r.lease.ExpiresAt)
			}
			continue
		}
		if got := r.lease.ExpiresAt.Sub(begin); (got-want).Abs() > 5*time.Second ||
			r.renewAt.Sub(begin) < want/2 || r.renewAt.Sub(begin) > want*4/5 {
			t.Errorf("a lease of %s ends after %s, and is renewed after %s", want, got, r.renewAt.Sub(begin))
		}
	}
}

// TestMaliciousLeaseIsRefused: what a control plane, or who is taken for one, might say. A clear error, and the files
// stay.
func TestMaliciousLeaseIsRefused(t *testing.T) {
	r := newRenewer(t, giving())
	before, err := frpc.ReadLease(r.cfg.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		answer controlplane.Answer
		want   string
	}{
		"address":      {controlplane.Answer{FRPToken: "f", ServerAddr: "a b\nc{{.}}"}, "has the invalid host \"a b\\nc{{.}}\""},
		"domain":       {controlplane.Answer{FRPToken: "f", Tunnel: frpc.Tunnel{Type: "https", CustomDomains: []string{"x.café.example"}}}, "has the invalid host"},
		"ip":           {controlplane.Answer{FRPToken: "f", Tunnel: frpc.Tunnel{Type: "https", CustomDomains: []string{"192.0.2.1"}}}, "has the invalid host"},
		"port":         {controlplane.Answer{FRPToken: "f", ServerPort: 65536}, "has the invalid port 65536"},
		"port at frps": {controlplane.Answer{FRPToken: "f", Tunnel: frpc.Tunnel{Type: "tcp", RemotePort: -1}}, "has the invalid port -1"},
		"token":        {controlplane.Answer{FRPToken: "f", AuthMethod: token}, "auth_method \"[redacted]\""},
		"no UTF-8":     {controlplane.Answer{FRPToken: "\xff"}, "not valid UTF-8"},
	} {
		r.issue = func(context.Context, []byte) (controlplane.Answer, *controlplane.Failure) { return test.answer, nil }
		fail := r.renew(t.Context())
		if fail == nil || !strings.Contains(fail.Error(), test.want) || strings.Contains(fail.Error(), token) {
			t.Errorf("%s: %v, want %q", name, fail, test.want)
		}
		if after, err := frpc.ReadLease(r.cfg.RunDir); err != nil || !reflect.DeepEqual(after.Frpc, before.Frpc) {
			t.Errorf("%s: the lease is %+v, %v", name, after, err)
		}
	}
	// frpc refuses keys that are not the type's.
	for _, tunnel := range []frpc.Tunnel{
		{Type: "tcp", Subdomain: "s", CustomDomains: []string{"d.example"}, RemotePort: 16001},
		{Type: "http", Subdomain: "s", RemotePort: 16001},
	} {
		lease, err := newLease(r.cfg, controlplane.Answer{FRPToken: "f", Tunnel: tunnel}, frpc.Admin{})
		if got := lease.Frpc.Tunnel; err != nil || (got.RemotePort != 0) == (got.Subdomain != "") ||
			len(got.CustomDomains) > 0 {
			t.Errorf("%+v, %v", got, err)
		}
	}
}
