package lease

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/controlplane"
	"github.com/pipeops/vm-agent/frpc"
)

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// says is one answer of a control plane, or of something on the way that answers in its place.
type says struct {
	code              int
	contentType, body string
}

var (
	html403    = says{403, "text/html", "<html>blocked</html>"}
	revoked403 = says{403, "application/json; charset=utf-8", `{"error":"gone","revoked":true}`}
	revoked401 = says{401, "application/json", `{"revoked":true}`}
	away503    = says{503, "application/json", `{"revoked":true}`}
	lease200   = says{200, "application/json", ""} // a lease for ten minutes
)

// TestTunnelClosesOnlyForARevokedOrRefusedAgent: at once only when the control plane itself says twice, half a minute
// apart, that the agent is revoked; with the lease where the agent is refused until then; and else not at all.
func TestTunnelClosesOnlyForARevokedOrRefusedAgent(t *testing.T) {
	const life, never = 10 * time.Minute, 0
	for name, test := range map[string]struct {
		answers []says        // one for each attempt; the last for all others
		from    time.Duration // when the tunnel is closed
		to      time.Duration
	}{
		"revoked":                            {[]says{revoked403}, 30 * time.Second, 35 * time.Second},
		"revoked, with 401":                  {[]says{revoked401}, 30 * time.Second, 35 * time.Second},
		"revoked, away between":              {[]says{revoked403, away503, away503, revoked403}, 30 * time.Second, 45 * time.Second},
		"revoked, HTML between":              {[]says{revoked403, html403, revoked403}, 30 * time.Second, 45 * time.Second},
		"revoked, let in again, and revoked": {[]says{revoked403, lease200, revoked403, lease200, revoked403, lease200}, never, never},
		"revoked, then only HTML":            {[]says{revoked403, html403}, life, life + 5*time.Second},
		"HTML":                               {[]says{html403}, life, life + 5*time.Second},
		"HTML that looks like it":            {[]says{{403, "text/html", revoked403.body}}, life, life + 5*time.Second},
		"no content type":                    {[]says{{403, "", revoked403.body}}, life, life + 5*time.Second},
		"wrong token":                        {[]says{{401, "application/json", `{"error":"unknown agent or wrong token"}`}}, life, life + 5*time.Second},
		"JSON that says no":                  {[]says{{403, "application/json", `{"revoked":false}`}}, life, life + 5*time.Second},
		"JSON of another kind":               {[]says{{403, "application/json", `{"revoked":"true"}`}}, life, life + 5*time.Second},
		"a proxy's 407":                      {[]says{{407, "application/json", revoked403.body}}, never, never},
		"away":                               {[]says{away503}, never, never},
		"refused, then away":                 {[]says{html403, away503}, never, never},
		"away, then refused after the end":   {append(repeat(away503, 12), html403), life, 15 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			port := unusedPort(t) // where no frpc runs
			synctest.Test(t, func(t *testing.T) {
				env := environment(t, "https://control.example")
				env["PIPEOPS_FRP_ADMIN_PORT"] = strconv.Itoa(port)
				cfg := configuration(t, env)
				client, err := controlplane.New(cfg)
				if err != nil {
					t.Fatal(err)
				}
				answers, attempts := append([]says{lease200}, test.answers...), []time.Time{}
				client.HTTP.Transport = roundTripper(func(*http.Request) (*http.Response, error) {
					a := answers[min(len(attempts), len(answers)-1)]
					attempts = append(attempts, time.Now())
					if a == lease200 {
						a.body = `{"frp_token":"f","expires_at":"` + time.Now().Add(life).UTC().Format(time.RFC3339) + `"}`
					}
					return &http.Response{
						StatusCode: a.code, Status: strconv.Itoa(a.code), Header: http.Header{"Content-Type": {a.contentType}},
						Body: io.NopCloser(strings.NewReader(a.body)),
					}, nil
				})
				lease, fail := requestLease(t.Context(), cfg, client.RequestLease, frpc.Lease{})
				if fail != nil {
					t.Fatal(fail)
				}
				k := &renewer{
					cfg: cfg, issue: client.RequestLease, log: slog.New(slog.DiscardHandler), backoff: backoffMin,
					lease: lease, token: token, renewAt: time.Now(),
				}
				start := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
				defer cancel()
				err = k.run(ctx)
				took := time.Since(start)
				_, gone := os.Stat(filepath.Join(cfg.RunDir, frpc.ConfigFile))
				switch {
				case test.to == never:
					if err != nil || gone != nil {
						t.Errorf("closed after %s: %v", took, err)
					}
				case err == nil || took < test.from || took > test.to:
					t.Errorf("closed after %s, want after %s to %s: %v", took, test.from, test.to, err)
				case gone == nil || !strings.Contains(err.Error(), "the tunnel is closed"):
					t.Errorf("frpc.toml is still there: %v", err)
				}
				renewal := k.lease.Renewal
				if answers[len(answers)-1] != lease200 && (renewal == nil || renewal.Error == "") {
					t.Error("lease.json does not say that the renewal fails")
				}
				if len(attempts) < 4 && test.to != 35*time.Second {
					t.Errorf("asked %d times only", len(attempts))
				}
			})
		})
	}
}

func repeat(a says, n int) []says {
	all := make([]says, n)
	for i := range all {
		all[i] = a
	}
	return all
}

// unusedPort is a port of 127.0.0.1 that refuses connections until the test Ends: it is bound, and nobody listens.
func unusedPort(t *testing.T) int {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	addr, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return addr.(*syscall.SockaddrInet4).Port
}
