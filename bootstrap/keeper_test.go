package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc"
)

// configuration is what Load makes of an environment.
func configuration(t *testing.T, env map[string]string) *config.Config {
	t.Helper()
	cfg, err := config.Load("", func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// newKeeper keeps leases that source gives; the integration tests have a real control plane and a real frpc.
func newKeeper(t *testing.T, ask source) *keeper {
	t.Helper()
	k := &keeper{cfg: configuration(t, environment(t, "https://control.example")), ask: ask, log: slog.New(slog.DiscardHandler), backoff: backoffMin}
	k.token = token
	lease, life, fail := obtain(t.Context(), k.cfg, ask, frpc.Lease{})
	if fail != nil {
		t.Fatal(fail)
	}
	if err := write(k.cfg, lease, k.log); err != nil {
		t.Fatal(err)
	}
	k.adopt(lease, life, time.Now())
	return k
}

// giving gives leases that live for an hour, each with another credential.
func giving() source {
	n := 0
	return func(context.Context, []byte) (authAnswer, *failure) {
		n++
		return authAnswer{FRPToken: frpc.Secret(fmt.Sprint("lease ", n)), ExpiresAt: time.Now().Add(time.Hour), life: time.Hour}, nil
	}
}

// TestWhenToRenew: what a look at frpc and the clock decide.
func TestWhenToRenew(t *testing.T) {
	k := newKeeper(t, giving())
	start := time.Now()
	at := func(d time.Duration) time.Time { return start.Add(d) }
	if k.stale || k.due(start) || k.due(at(30*time.Minute)) {
		t.Error("the first lease is renewed at once")
	}
	if !k.due(at(45 * time.Minute)) {
		t.Error("a lease of an hour is not renewed after three quarters of it")
	}
	k.see(loggedOut, at(time.Minute))
	if k.due(at(time.Minute + loggedOutWait - 1)) {
		t.Error("frpc is given no time to log in by itself")
	}
	var asked []time.Duration
	for d := time.Minute; d < 20*time.Minute; d += time.Second {
		k.see(loggedOut, at(d))
		if k.due(at(d)) {
			asked = append(asked, d)
		}
	}
	if len(asked) < 4 || len(asked) > 8 || asked[0] != time.Minute+loggedOutWait {
		t.Errorf("while frpc is logged out, leases are asked for at %v", asked)
	}
	k.see(connected, at(20*time.Minute))
	if k.due(at(20*time.Minute + time.Second)) {
		t.Error("asked for another though frpc is connected again")
	}
}

// TestWhenToRestart: never without need, and not for the sake of an unchanged frpc.toml.
func TestWhenToRestart(t *testing.T) {
	k := newKeeper(t, giving())
	first, now := k.lease, time.Now()
	if k.restart(now) != "" {
		t.Error("restarted for the lease it has read")
	}
	again := first
	again.ExpiresAt = first.ExpiresAt.Add(time.Hour) // as with oidc, where only the token's file changes
	k.adopt(again, time.Hour, now)
	if k.stale {
		t.Error("frpc.toml is the same, but frpc is to be restarted")
	}
	k.lease = first
	if fail := k.renew(t.Context()); fail != nil {
		t.Fatal(fail)
	}
	if !k.stale || k.restart(now) != "" || k.restart(first.ExpiresAt.Add(-time.Minute)) != "" {
		t.Errorf("stale %v: restarted before the old credential ends", k.stale)
	}
	if k.restart(first.ExpiresAt.Add(time.Second)) == "" {
		t.Error("not restarted when the old credential ends")
	}
	if fail := k.renew(t.Context()); fail != nil || k.staleUntil.Sub(first.ExpiresAt).Abs() > time.Second {
		t.Errorf("frpc may still run with the first credential, which ends at %s, not at %s (%v)", first.ExpiresAt, k.staleUntil, fail)
	}
	k.see(loggedOut, now)
	if k.restart(now) == "" {
		t.Error("not restarted though it is logged out")
	}
	k.see(away, now)
	if k.stale || k.restart(now) != "" {
		t.Error("restarted though it has not started yet")
	}
}

// TestFailedRenewal: the lease stays, its file says why, the attempts grow rare, and what the control plane asks
// for is respected.
func TestFailedRenewal(t *testing.T) {
	k := newKeeper(t, giving())
	first := k.lease
	k.ask = func(context.Context, []byte) (authAnswer, *failure) {
		return authAnswer{}, &failure{err: errors.New("it is away"), retryAfter: 30 * time.Second}
	}
	for range 10 {
		if fail := k.renew(t.Context()); fail == nil {
			t.Fatal("a failure is taken for a lease")
		}
	}
	wait := time.Until(k.notYet)
	if k.due(time.Now().Add(29*time.Second)) || wait < 25*time.Second || wait > 3*backoffMax/2 || !k.due(k.notYet) {
		t.Errorf("the next attempt is in %s", wait)
	}
	lease, err := frpc.ReadLease(k.cfg.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	if lease.Renewal == nil || lease.Renewal.Error != "it is away" || lease.Renewal.FailingSince.After(time.Now()) || lease.Frpc.Token != first.Frpc.Token {
		t.Errorf("lease.json says %+v", lease)
	}
	k.ask = giving()
	if fail := k.renew(t.Context()); fail != nil {
		t.Fatal(fail)
	}
	if lease, err := frpc.ReadLease(k.cfg.RunDir); err != nil || lease.Renewal != nil {
		t.Errorf("lease.json still says %+v, %v", lease, err)
	}
}

// TestIdle: only the proxy's own word counts.
func TestIdle(t *testing.T) {
	for body, want := range map[string]bool{
		"pipeops_agent_http_requests_in_flight{listener=\"operations\"} 1\npipeops_agent_http_requests_in_flight{listener=\"tunnel\"} 0\n": true,
		"pipeops_agent_http_requests_in_flight{listener=\"tunnel\"} 2\n":                                                                   false,
		"pipeops_agent_http_requests_in_flight{listener=\"operations\"} 0\n":                                                               false,
		"": false,
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprint(w, body) }))
		k := newKeeper(t, giving())
		k.cfg.Proxy.MetricsAddr = strings.TrimPrefix(server.URL, "http://")
		if got := k.idle(t.Context()); got != want {
			t.Errorf("%q: %v", body, got)
		}
		server.Close()
		if k.idle(t.Context()) {
			t.Error("a proxy that does not answer is taken for idle")
		}
	}
}

// TestCertificateOfTheLease: the control plane is shown a certificate with the names and the life of the lease.
func TestCertificateOfTheLease(t *testing.T) {
	end := time.Now().Add(3 * time.Hour).Truncate(time.Second)
	var shown [][]byte
	ask := func(_ context.Context, certificate []byte) (authAnswer, *failure) {
		shown = append(shown, certificate)
		return authAnswer{
			FRPToken: "f", ExpiresAt: end, life: 3 * time.Hour,
			Tunnel: frpc.Tunnel{Type: "https", CustomDomains: []string{"a.agents.example"}},
		}, nil
	}
	cfg := configuration(t, environment(t, "https://control.example"))
	lease, _, fail := obtain(t.Context(), cfg, ask, frpc.Lease{})
	if fail != nil {
		t.Fatal(fail)
	}
	// The configuration says http: that it is https, only the answer says.
	if len(shown) != 2 || shown[0] != nil || string(shown[1]) != string(lease.Certificate) {
		t.Fatalf("the control plane was shown %q", shown)
	}
	if c := (&certificate{lease.Certificate, lease.Key}); !c.fits("agent-001", lease) {
		t.Error("the certificate does not fit its own lease")
	}
	if err := lease.Write(cfg.RunDir); err != nil {
		t.Fatal(err)
	}
	// The next is asked for with the right certificate at once.
	end = time.Now().Add(3 * time.Hour).Truncate(time.Second)
	lease.IssuedAt = end.Add(-3 * time.Hour)
	next, _, fail := obtain(t.Context(), cfg, ask, lease)
	if fail != nil || len(shown) != 3 || string(next.Key) == string(lease.Key) {
		t.Errorf("%v, asked %d times; the key is new: %v", fail, len(shown), string(next.Key) != string(lease.Key))
	}
	for _, other := range []frpc.Lease{
		{ExpiresAt: end.Add(time.Hour), Frpc: lease.Frpc},
		{ExpiresAt: end.Add(-time.Hour), Frpc: lease.Frpc},
		{Frpc: lease.Frpc}, // without an end
		{ExpiresAt: end, Frpc: frpc.Config{Tunnel: frpc.Tunnel{CustomDomains: []string{"b.agents.example"}}}},
	} {
		if (&certificate{next.Certificate, next.Key}).fits("agent-001", other) {
			t.Errorf("fits %+v", other)
		}
	}
	forever, err := newCertificate("agent-001", lease.Frpc.Tunnel, time.Time{})
	if err != nil || !forever.fits("agent-001", frpc.Lease{Frpc: lease.Frpc}) {
		t.Errorf("a lease without an end: %v", err)
	}
	if matches, _ := filepath.Glob(filepath.Join(cfg.RunDir, "*")); len(matches) != 4 {
		t.Errorf("the run directory holds %v", matches)
	}
}

// TestClockOfTheControlPlaneCounts: a wrong clock here must not renew all the time, or too late.
func TestClockOfTheControlPlaneCounts(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		now := time.Now().Add(-100 * time.Hour).UTC().Truncate(time.Second)
		w.Header().Set("Date", now.Format(http.TimeFormat))
		_, _ = fmt.Fprintf(w, `{"frp_token":"f","expires_at":%q}`, now.Add(time.Hour).Format(time.RFC3339))
	}))
	defer server.Close()
	client, err := newControlPlane(configuration(t, environment(t, server.URL)))
	if err != nil {
		t.Fatal(err)
	}
	if answer, fail := client.attempt(t.Context(), nil); fail != nil || answer.life != time.Hour {
		t.Errorf("%v: the lease lives for %s", fail, answer.life)
	}
}
