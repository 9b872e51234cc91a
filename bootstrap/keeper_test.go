package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc"
)

// configuration is what Load makes of an environment.
func configuration(t *testing.T, env map[string]string) *config.Config {
	t.Helper()
	cfg, err := config.Load("", env)
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
	lease, fail := obtain(t.Context(), k.cfg, ask, frpc.Lease{})
	if fail != nil {
		t.Fatal(fail)
	}
	if err := write(k.cfg, lease, k.log); err != nil {
		t.Fatal(err)
	}
	k.adopt(lease, time.Now())
	return k
}

// giving gives leases that live for an hour, each with another credential.
func giving() source {
	n := 0
	return func(context.Context, []byte) (authAnswer, *failure) {
		n++
		return authAnswer{FRPToken: frpc.Secret(fmt.Sprint("lease ", n)), ends: time.Now().Add(time.Hour)}, nil
	}
}

// TestWhenToRenew: what a look at frpc and the clock decide.
func TestWhenToRenew(t *testing.T) {
	k := newKeeper(t, giving())
	start := time.Now()
	at := func(d time.Duration) time.Time { return start.Add(d) }
	if k.lease.Stale != nil || k.due(start) || k.due(at(30*time.Minute)) {
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
	k.inherit(&again)
	if again.Stale != nil {
		t.Error("frpc.toml is the same, but frpc is to be restarted")
	}
	if fail := k.renew(t.Context()); fail != nil {
		t.Fatal(fail)
	}
	if k.lease.Stale == nil || k.restart(now) != "" || k.restart(first.ExpiresAt.Add(-time.Minute)) != "" {
		t.Errorf("stale %v: restarted before the old credential ends", k.lease.Stale)
	}
	if k.restart(first.ExpiresAt.Add(time.Second)) == "" {
		t.Error("not restarted when the old credential ends")
	}
	if fail := k.renew(t.Context()); fail != nil || !k.lease.Stale.Until.Equal(first.ExpiresAt) {
		t.Errorf("frpc may still run with the first credential, which ends at %s, not at %s (%v)", first.ExpiresAt, k.lease.Stale.Until, fail)
	}
	// bootstrap is killed, and started again: what frpc runs with is not forgotten.
	if old, err := frpc.ReadLease(k.cfg.RunDir); err != nil || old.Stale == nil || !old.Stale.Until.Equal(first.ExpiresAt) {
		t.Errorf("lease.json does not say that frpc runs with the first credential: %+v, %v", old, err)
	}
	k.see(loggedOut, now)
	if k.restart(now) == "" {
		t.Error("not restarted though it is logged out")
	}
	k.see(away, now)
	if k.lease.Stale != nil || k.restart(now) != "" {
		t.Error("restarted though it has not started yet")
	}
}

// TestFailedRenewal: the lease stays, its file says why, the attempts grow rare, and what the control plane asks
// for is respected.
func TestFailedRenewal(t *testing.T) {
	k := newKeeper(t, giving())
	first := k.lease
	k.ask = func(context.Context, []byte) (authAnswer, *failure) {
		return authAnswer{}, &failure{err: errors.New("it is away"), retryAfter: 24 * time.Hour}
	}
	for range 10 {
		if fail := k.renew(t.Context()); fail == nil {
			t.Fatal("a failure is taken for a lease")
		}
	}
	wait := time.Until(k.notYet)
	if k.due(time.Now().Add(waitMax-time.Second)) || wait > waitMax || !k.due(k.notYet) {
		t.Errorf("the next attempt is in %s", wait)
	}
	lease, err := frpc.ReadLease(k.cfg.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	if lease.Renewal == nil || lease.Renewal.Error != "it is away; the tunnel stays as it is" || lease.Renewal.FailingSince.After(time.Now()) || lease.Frpc.Token != first.Frpc.Token {
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

// TestRunDirectoryIsRepaired: the keeper holds everything that it writes, also after its own restart, says once what it
// has restored, and says once that it cannot.
func TestRunDirectoryIsRepaired(t *testing.T) {
	k := newKeeper(t, func(_ context.Context, _ []byte) (authAnswer, *failure) {
		return authAnswer{FRPToken: "f", AuthMethod: "oidc", Tunnel: frpc.Tunnel{Type: "https"}}, nil
	})
	old, err := written(k.cfg)
	if err != nil {
		t.Fatal(err)
	}
	k.lease = *old
	var log strings.Builder
	k.log = slog.New(slog.NewTextHandler(&log, nil))
	for _, name := range []string{frpc.ConfigFile, frpc.TokenFile, frpc.CertFile, frpc.KeyFile, frpc.LeaseFile} {
		path := filepath.Join(k.cfg.RunDir, name)
		want, err := os.ReadFile(path)
		if err != nil || os.Remove(path) != nil {
			t.Fatal(err)
		}
		log.Reset()
		for range 3 {
			k.repair()
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != string(want) {
			t.Errorf("%s holds %q, %v", name, got, err)
		}
		if said := log.String(); strings.Count(said, "\n") != 1 || !strings.Contains(said, "["+name+"]") {
			t.Errorf("%s: said %q", name, said)
		}
	}
	log.Reset()
	dir := k.cfg.RunDir
	k.cfg.RunDir = filepath.Join(dir, "gone")
	for range 3 {
		k.repair()
	}
	if said := log.String(); strings.Count(said, "\n") != 1 || !strings.Contains(said, "the run directory cannot be written") || !strings.Contains(said, "is not full") {
		t.Errorf("said %q", said)
	}
	// What could not be written is written as soon as it can be.
	k.lease.Renewal = &frpc.Renewal{Error: "it is away"}
	k.cfg.RunDir = dir
	k.repair()
	if lease, err := frpc.ReadLease(dir); err != nil || lease.Renewal == nil {
		t.Errorf("lease.json says %+v, %v", lease, err)
	}
}

// TestFrpcMayRunWithAnother: bootstrap finds an frpc.toml that is not what it writes.
func TestFrpcMayRunWithAnother(t *testing.T) {
	k := newKeeper(t, giving())
	toml, err := k.lease.Frpc.TOML()
	if err != nil {
		t.Fatal(err)
	}
	for found, want := range map[string]bool{"": false, string(toml): false, "another": true} {
		lease := k.lease
		if markStale(&lease, []byte(found)); (lease.Stale != nil) != want {
			t.Errorf("%.10q: stale %v", found, lease.Stale)
		}
	}
}

// TestLeaseMustNotLeadElsewhere: to the host of the agent or its neighbours, unless the configuration does.
func TestLeaseMustNotLeadElsewhere(t *testing.T) {
	for _, addr := range []string{
		"127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "0.0.0.0", "::", "::ffff:0.0.0.0", "224.0.0.1", "ff02::1",
		"localhost", "LOCALHOST", "frps.localhost",
	} {
		env := environment(t, "https://control.example")
		_, err := newLease(configuration(t, env), authAnswer{FRPToken: "f", ServerAddr: addr}, frpc.Admin{})
		if err == nil || !strings.Contains(err.Error(), `names "`+addr+`" as frps`) || !strings.Contains(err.Error(), "set frp.server_addr (PIPEOPS_FRP_SERVER_ADDR)") {
			t.Errorf("%s: %v", addr, err)
		}
		env["PIPEOPS_FRP_SERVER_ADDR"] = addr
		if lease, err := newLease(configuration(t, env), authAnswer{FRPToken: "f", ServerAddr: strings.ToLower(addr)}, frpc.Admin{}); err != nil || !strings.EqualFold(lease.Frpc.ServerAddr, addr) {
			t.Errorf("%s, as configured: %v", addr, err)
		}
		if _, err := newLease(configuration(t, env), authAnswer{FRPToken: "f", ServerAddr: "127.9.9.9"}, frpc.Admin{}); err == nil {
			t.Errorf("127.9.9.9 where %s is configured", addr)
		}
	}
	for _, addr := range []string{"", "frp.example", "localhost.example", "192.0.2.1", "10.0.0.1", "2001:db8::1"} {
		if _, err := newLease(configuration(t, environment(t, "https://control.example")), authAnswer{FRPToken: "f", ServerAddr: addr}, frpc.Admin{}); err != nil {
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
		fromFile, err := config.Load(file, env)
		if err != nil {
			t.Fatal(err)
		}
		env["PIPEOPS_FRP_TUNNEL_TYPE"] = "https"
		answer := authAnswer{FRPToken: "f", Tunnel: frpc.Tunnel{Type: got}}
		for origin, cfg := range map[string]*config.Config{"file": fromFile, "environment": configuration(t, env)} {
			_, err := newLease(cfg, answer, frpc.Admin{})
			if want := "the control plane's lease has a tunnel of type " + got + ", but frp.tunnel.type (PIPEOPS_FRP_TUNNEL_TYPE) is https"; err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s from the %s: %v", got, origin, err)
			}
		}
		cfg := configuration(t, environment(t, "https://control.example"))
		cfg.FRP.Tunnel.Type = "https" // as if that were the default
		lease, err := newLease(cfg, answer, frpc.Admin{})
		if err != nil {
			t.Fatal(err)
		}
		var log strings.Builder
		if err := write(cfg, lease, slog.New(slog.NewTextHandler(&log, nil))); err != nil || !strings.Contains(log.String(), "level=WARN msg=\"the lease turns off TLS as far as the agent\"") {
			t.Errorf("%v, said %s", err, log.String())
		}
	}
	// The other way is an improvement.
	if _, err := newLease(configuration(t, environment(t, "https://control.example")), authAnswer{FRPToken: "f", Tunnel: frpc.Tunnel{Type: "https"}}, frpc.Admin{}); err != nil {
		t.Error(err)
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
			FRPToken: "f", ExpiresAt: end, ends: end.Add(-100 * time.Hour), // this host's clock is another
			Tunnel: frpc.Tunnel{Type: "https", CustomDomains: []string{"a.agents.example"}},
		}, nil
	}
	cfg := configuration(t, environment(t, "https://control.example"))
	lease, fail := obtain(t.Context(), cfg, ask, frpc.Lease{})
	if fail != nil {
		t.Fatal(fail)
	}
	// The configuration says http: that it is https, only the answer says.
	if len(shown) != 2 || shown[0] != nil || string(shown[1]) != string(lease.Certificate) {
		t.Fatalf("the control plane was shown %q", shown)
	}
	fits := func(c []byte, tunnel frpc.Tunnel, end time.Time) bool {
		return (&certificate{cert: c}).fits("agent-001", tunnel, end)
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
	next, fail := obtain(t.Context(), cfg, ask, lease)
	if fail != nil || len(shown) != 3 || string(next.Key) == string(lease.Key) {
		t.Errorf("%v, asked %d times; the key is new: %v", fail, len(shown), string(next.Key) != string(lease.Key))
	}
	if fits(next.Certificate, tunnel, end.Add(time.Hour)) || fits(next.Certificate, tunnel, end.Add(-time.Hour)) || fits(next.Certificate, tunnel, time.Time{}) ||
		fits(next.Certificate, frpc.Tunnel{CustomDomains: []string{"b.agents.example"}}, end) {
		t.Error("fits another end, or another tunnel")
	}
	forever, err := newCertificate("agent-001", tunnel, time.Time{})
	if err != nil || !forever.fits("agent-001", tunnel, time.Time{}) {
		t.Errorf("a lease without an end: %v", err)
	}
	if matches, _ := filepath.Glob(filepath.Join(cfg.RunDir, "*")); len(matches) != 4 {
		t.Errorf("the run directory holds %v", matches)
	}
}

// TestClockOfTheControlPlaneCounts: a wrong clock here must not renew all the time, or too late; and what some take
// for a time that never comes is none.
func TestClockOfTheControlPlaneCounts(t *testing.T) {
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
		k := newKeeper(t, giving())
		client, err := newControlPlane(configuration(t, environment(t, server.URL)))
		if err != nil {
			t.Fatal(err)
		}
		k.ask = client.attempt
		begin := time.Now()
		if fail := k.renew(t.Context()); fail != nil {
			t.Fatal(fail)
		}
		server.Close()
		if want == 0 {
			if !k.lease.ExpiresAt.IsZero() || !k.renewAt.IsZero() {
				t.Errorf("the year 9999 is taken for a time: %s", k.lease.ExpiresAt)
			}
			continue
		}
		if got := k.lease.ExpiresAt.Sub(begin); (got-want).Abs() > 5*time.Second || k.renewAt.Sub(begin) < want/2 || k.renewAt.Sub(begin) > want*4/5 {
			t.Errorf("a lease of %s ends after %s, and is renewed after %s", want, got, k.renewAt.Sub(begin))
		}
	}
}

// TestMaliciousLease: what a control plane, or who is taken for one, might say. A clear error, and the files stay.
func TestMaliciousLease(t *testing.T) {
	k := newKeeper(t, giving())
	before, err := frpc.ReadLease(k.cfg.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		answer authAnswer
		want   string
	}{
		"address":  {authAnswer{FRPToken: "f", ServerAddr: "a b\nc{{.}}"}, "names the host \"a b\\nc{{.}}\", which is none"},
		"domain":   {authAnswer{FRPToken: "f", Tunnel: frpc.Tunnel{Type: "https", CustomDomains: []string{"x.café.example"}}}, "names the host"},
		"ip":       {authAnswer{FRPToken: "f", Tunnel: frpc.Tunnel{Type: "https", CustomDomains: []string{"192.0.2.1"}}}, "names the host"},
		"token":    {authAnswer{FRPToken: "f", AuthMethod: token}, "auth_method \"[redacted]\""},
		"no UTF-8": {authAnswer{FRPToken: "\xff"}, "not valid UTF-8"},
	} {
		k.ask = func(context.Context, []byte) (authAnswer, *failure) { return test.answer, nil }
		fail := k.renew(t.Context())
		if fail == nil || !strings.Contains(fail.Error(), test.want) || strings.Contains(fail.Error(), token) {
			t.Errorf("%s: %v, want %q", name, fail, test.want)
		}
		if after, err := frpc.ReadLease(k.cfg.RunDir); err != nil || !reflect.DeepEqual(after.Frpc, before.Frpc) {
			t.Errorf("%s: the lease is %+v, %v", name, after, err)
		}
	}
	// frpc refuses keys that are not the type's.
	for _, tunnel := range []frpc.Tunnel{
		{Type: "tcp", Subdomain: "s", CustomDomains: []string{"d.example"}, RemotePort: 16001}, {Type: "http", Subdomain: "s", RemotePort: 16001},
	} {
		lease, err := newLease(k.cfg, authAnswer{FRPToken: "f", Tunnel: tunnel}, frpc.Admin{})
		if got := lease.Frpc.Tunnel; err != nil || (got.RemotePort != 0) == (got.Subdomain != "") || len(got.CustomDomains) > 0 {
			t.Errorf("%+v, %v", got, err)
		}
	}
}
