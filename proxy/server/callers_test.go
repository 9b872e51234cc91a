package server

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/proxy/access"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// ask sends a request with headers, in pairs, through all of the server, and returns the answer.
func (s *Server) ask(method, target, body string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	if body == "" {
		r.Body = http.NoBody
	}
	r.Header.Set("Authorization", "Bearer "+token)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	s.handler(tunnel).ServeHTTP(w, r)
	return w
}

// TestCallersDoNotChooseTheAuditID: it is the id that the agent's log and answer have.
func TestCallersDoNotChooseTheAuditID(t *testing.T) {
	api := newAPIServer(t, nil)
	s := withIdentity(t, api, access.Agent)
	for range 2 {
		w := s.ask("GET", "/api/k8s/version", "", "Audit-Id", "theirs", "X-Request-Id", "theirs")
		seen := api.take()
		if id := w.Header().Get("X-Request-Id"); len(seen) != 1 || id == "" || id == "theirs" ||
			len(seen[0].Header["Audit-Id"]) != 1 || seen[0].Header.Get("Audit-Id") != id {
			t.Errorf("answered with id %q, the API server saw %v", id, seen[0].Header)
		}
	}
}

// TestAgentsTokenIsNoCredentialForTheCluster: in identity own, it must not reach the API server, which might log it.
func TestAgentsTokenIsNoCredentialForTheCluster(t *testing.T) {
	api := newAPIServer(t, nil)
	s := withIdentity(t, api, access.Own)
	for credential, want := range map[string]int{token: http.StatusUnauthorized, "theirs": http.StatusOK} {
		w := s.ask("GET", "/api/k8s/version", "", kube.GateHeader, "Bearer "+token, "Authorization", "Bearer "+credential)
		if n := len(api.take()); w.Code != want || (n == 1) != (want == http.StatusOK) {
			t.Errorf("%s: answered %d, %d requests for the API server", credential, w.Code, n)
		}
	}
}

// TestAgentsNamespaceIsClosed: callers cannot read the agent's own credential there.
func TestAgentsNamespaceIsClosed(t *testing.T) {
	api := newAPIServer(t, nil)
	s := withIdentity(t, api, access.Agent)
	for target, want := range map[string]int{
		"/api/v1/namespaces/pipeops-system/secrets/token":  http.StatusForbidden,
		"/api/v1/namespaces/pipeops-system/pods/agent/log": http.StatusOK,
		"/api/v1/namespaces/other/secrets/token":           http.StatusOK,
	} {
		if w := s.ask("GET", "/api/k8s"+target, ""); w.Code != want || (len(api.take()) == 1) != (want == http.StatusOK) {
			t.Errorf("%s: answered %d", target, w.Code)
		}
	}
}

// TestOwnersSwitchHoldsForEveryRoute: commands need all, messages about runners write, and what asks for nothing of the
// cluster passes.
func TestOwnersSwitchHoldsForEveryRoute(t *testing.T) {
	allow := ""
	api := newAPIServer(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/configmaps/owner") {
			_, _ = fmt.Fprintf(w, `{"data":{"allow":%q}}`, allow)
			return
		}
		_, _ = io.WriteString(w, "{}")
	})
	s := serverWith(t, &rest.Config{Host: api.URL}, slog.New(slog.DiscardHandler), func(cfg *config.Config) {
		cfg.Agent.Token, cfg.Access.ConfigMap, cfg.Runners.AllowedHosts = token, "owner", []string{"*.svc"}
	})
	const ping, assign = `{"id":"1","type":"ping"}`, `{"id":"2","type":"runner_unassigned","data":{"runner_id":"r"}}`
	message := func(body string) int {
		return s.ask("POST", "/api/control-plane/message", body, "Content-Type", "application/json").Code
	}
	for _, test := range []struct {
		allow                         string
		command, assign, call, writes int
	}{
		{"none", 403, 403, 403, 403}, {"read", 403, 403, 200, 403}, {"write", 403, 200, 200, 200}, {"all", 404, 200, 200, 200},
	} {
		allow = test.allow
		s.owner.Follow(t.Context())
		got := []int{
			s.ask("POST", "/api/runners/r/command", "").Code, message(assign),
			s.ask("GET", "/api/k8s/version", "").Code, s.ask("DELETE", "/api/k8s/api/v1/namespaces/a/pods/p", "").Code,
		}
		if want := []int{test.command, test.assign, test.call, test.writes}; fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: answered %v, want %v", allow, got, want)
		}
		if code := message(ping); code != http.StatusOK {
			t.Errorf("%s: a ping is answered %d", allow, code)
		}
	}
}

// TestMessagesAreLimited: to 64 KiB, which count as memory of the caller.
func TestMessagesAreLimited(t *testing.T) {
	s, _, _ := newTest(t, token)
	const head = `{"id":"1","type":"ping","data":"`
	for size, want := range map[int]int{64 << 10: http.StatusOK, 64<<10 + 1: http.StatusRequestEntityTooLarge} {
		body := head + strings.Repeat("x", size-len(head)-2) + `"}`
		if w := s.ask("POST", "/api/control-plane/message", body, "Content-Type", "application/json"); w.Code != want {
			t.Errorf("%d bytes: answered %d %s", size, w.Code, w.Body)
		}
	}
	s.limits.requestMemory = 64 << 10
	w := s.ask("POST", "/api/control-plane/message", "{}", "Content-Type", "application/json")
	if w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") != "1" {
		t.Errorf("without memory: answered %d %v", w.Code, w.Header())
	}
}

// TestFullAgentSaysWhenToTryAgain: on every route, and kubectl's discovery excepted, which would try ten times.
func TestFullAgentSaysWhenToTryAgain(t *testing.T) {
	s, _, _ := newTest(t, token)
	s.limits.requests = 0
	const discovery = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
	for _, test := range []struct{ method, target, accept, want string }{
		{"GET", "/api/k8s/version", "", "1"},
		{"GET", "/api/k8s/version?timeout=2s", "", "1"},
		{"GET", "/api/k8s/version?timeout=1s", "", ""},
		{"GET", "/api/k8s/api", discovery, ""},
		{"POST", "/api/agent/heartbeat", "", "1"},
	} {
		w := s.ask(test.method, test.target, "", "Accept", test.accept)
		if w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") != test.want ||
			(w.Header().Get("Warning") != "") != (test.accept != "") {
			t.Errorf("%s: answered %d %v, want Retry-After %q", test.target, w.Code, w.Header(), test.want)
		}
	}
}

// TestActivityIsNotServedOnTheTunnel: it tells strangers how busy the agent is.
func TestActivityIsNotServedOnTheTunnel(t *testing.T) {
	_, _, handlers := newTest(t, token)
	for listener, want := range map[listener]int{tunnel: http.StatusNotFound, operations: http.StatusOK} {
		if w := do(handlers[listener], "GET", "/activity"); w.Code != want {
			t.Errorf("%s: answered %d", listener, w.Code)
		}
	}
}

// TestOnlyPathsBelowThePrefixAreForwarded: others may begin like it.
func TestOnlyPathsBelowThePrefixAreForwarded(t *testing.T) {
	api := newAPIServer(t, nil)
	s := withIdentity(t, api, access.Agent)
	for path, want := range map[string]int{
		"/api/k8s": http.StatusOK, "/api/k8s/": http.StatusOK, "/api/k8s/version?x": http.StatusOK,
		"/api/k8sx/version": http.StatusNotFound, "/api/k8%73/version": http.StatusNotFound,
	} {
		w := s.ask("GET", path, "")
		if n := len(api.take()); w.Code != want || (n == 1) != (want == http.StatusOK) {
			t.Errorf("%s: answered %d, %d requests for the API server", path, w.Code, n)
		}
	}
}

// TestStrangersLoseTheirConnection: over HTTP/1.1, else they could pipeline requests and read no answer.
func TestStrangersLoseTheirConnection(t *testing.T) {
	s, _, _ := newTest(t, token)
	for credential, closes := range map[string]bool{"wrong": true, token: false} {
		for _, path := range []string{"/api/k8s/version", "/metrics"} {
			w := s.ask("GET", path, "", "Authorization", "Bearer "+credential)
			if (w.Header().Get("Connection") == "close") != closes {
				t.Errorf("%s with %q: answered %d %v", path, credential, w.Code, w.Header())
			}
		}
	}
}

// TestStrangerOfHTTP2WithoutAWindowIsNotWaitedFor: the answer cannot be sent, and its handler ends.
func TestStrangerOfHTTP2WithoutAWindowIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	s := withLimits(t, func(*limits) {}, events(nil))
	client, _ := overHTTP2(t, s)
	conn := rawHTTP2(t, client)
	const openapi = "\x82\x87\x41\x01a\x44\x0d/openapi.yaml" // GET, https, authority, path
	if _, err := io.WriteString(conn, noWindow+frame(1, 5, 1, openapi)); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, conn) }()
	eventually(t, func() bool { return s.metrics.inFlight[tunnel].Load() == 1 })
	eventually(t, func() bool { return s.metrics.inFlight[tunnel].Load() == 0 })
}

// TestCallersShareTheLimitsByWhoTheyAre: not by the address of the gateway that all of them have.
func TestCallersShareTheLimitsByWhoTheyAre(t *testing.T) {
	certificate := &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{RawSubject: []byte("CN=a")}}}
	certificate.PeerCertificates[0].Subject = pkix.Name{CommonName: "a"}
	for _, test := range []struct {
		identity string
		tls      *tls.ConnectionState
		headers  http.Header
		want     string
	}{
		{access.Agent, nil, http.Header{}, "192.0.2.1"},
		{access.Agent, certificate, http.Header{}, "CN=a"},
		{access.Named, nil, http.Header{"Impersonate-User": {"alice"}}, "pipeops:alice"},
		{access.Named, certificate, http.Header{"Impersonate-User": {"alice"}}, "pipeops:alice"},
		{access.Own, certificate, http.Header{"Authorization": {"Bearer own"}}, "CN=a"},
	} {
		s := withIdentity(t, newAPIServer(t, nil), test.identity)
		r := httptest.NewRequest(http.MethodGet, "/api/k8s/api/v1/namespaces/a/pods/p/exec", nil)
		r.Header, r.TLS, r.Pattern = test.headers, test.tls, kube.Prefix+"/"
		r.Header.Set("Connection", "Upgrade")
		r.Header.Set("Upgrade", "websocket")
		sc := &scope{share: "192.0.2.1"}
		if code, why := s.identify(sc, r); code != 0 || sc.share != test.want {
			t.Errorf("%s: shares with %q, want %q (%s)", test.identity, sc.share, test.want, why)
		}
		if sc.right == nil || sc.right.Upgrade || sc.right.Subresource != "exec" || !sc.Upgrade {
			t.Errorf("%s: an exec has the right %+v", test.identity, sc.right)
		}
	}
}

// TestTokensAreComparedInConstantTime: no test can measure it, so that this one reads the source.
func TestTokensAreComparedInConstantTime(t *testing.T) {
	source, err := os.ReadFile("auth.go")
	if err != nil {
		t.Fatal(err)
	}
	_, check, _ := strings.Cut(string(source), ") check(")
	check, _, _ = strings.Cut(check, "\n}\n")
	compared := regexp.MustCompile(`subtle\.ConstantTimeCompare\(hash\[:\], a\.(current|previous)\[:\]\)`)
	if n := len(compared.FindAllString(check, -1)); n != 2 || strings.Contains(check, "hash ==") {
		t.Errorf("%d tokens are compared in constant time: %s", n, check)
	}
}

// TestOldTLSIsRefused: and a session is not resumed, which would outlive the authority of its certificate.
func TestOldTLSIsRefused(t *testing.T) {
	s, _, _ := newTest(t, token)
	leaf := writeCertificate(t, s.config.RunDir, 1)
	authority := s.config.RunDir + "/tls.crt" // any will do
	for _, clients := range []bool{false, true} {
		c := &certificates{runDir: s.config.RunDir, log: s.log}
		if clients {
			c.clientCAFile = authority
		}
		if err := c.reload(); err != nil {
			t.Fatal(err)
		}
		socket, err := tls.Listen("tcp", "127.0.0.1:0", c.config())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = socket.Close() })
		go func() {
			for conn, err := socket.Accept(); err == nil; conn, err = socket.Accept() {
				go func(conn net.Conn) { _ = conn.(*tls.Conn).Handshake() }(conn)
			}
		}()
		pair, err := tls.LoadX509KeyPair(authority, s.config.RunDir+"/tls.key")
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AddCert(leaf)
		dial := func(low, high uint16, cache tls.ClientSessionCache) (resumed bool, err error) {
			conn, err := tls.Dial("tcp", socket.Addr().String(), &tls.Config{
				RootCAs: pool, ServerName: "agent-001", MinVersion: low, MaxVersion: high, ClientSessionCache: cache,
				Certificates: []tls.Certificate{pair},
			})
			if err == nil {
				resumed = conn.ConnectionState().DidResume
				_ = conn.Close()
			}
			return resumed, err
		}
		if _, err := dial(tls.VersionTLS10, tls.VersionTLS11, nil); err == nil {
			t.Errorf("client certificates %v: TLS 1.1 is spoken", clients)
		}
		if !clients {
			continue
		}
		cache := tls.NewLRUClientSessionCache(1)
		for range 2 {
			if resumed, err := dial(tls.VersionTLS12, tls.VersionTLS12, cache); resumed {
				t.Errorf("a session is resumed (%v)", err)
			}
		}
	}
}

// TestRightsOfStreamsAreReviewedWithin30Seconds: 20 of them in a look, so that it is no burst.
func TestRightsOfStreamsAreReviewedWithin30Seconds(t *testing.T) {
	for range 100 {
		if due := untilReview(); due < 25*time.Second || due >= 28*time.Second {
			t.Fatalf("due after %s", due)
		}
	}
	api := newAPIServer(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"status":{"allowed":true}}`)
	})
	s := withIdentity(t, api, access.Named)
	for i := range 30 {
		sc := requestOf("a")
		sc.start = time.Now().Add(-time.Minute)
		sc.Verb, sc.Resource, sc.Name = "watch", "pods", fmt.Sprint(i)
		sc.right = &right{Description: sc.Description}
		if why := s.gate.enter(sc, 0); why != "" {
			t.Fatal(why)
		}
	}
	for _, want := range []int{20, 10, 0} {
		s.reviewStreams(t.Context())
		if n := len(api.take()); n != want {
			t.Errorf("%d reviews in a look, want %d", n, want)
		}
	}
}

// TestSessionOutlivesItsToken: an exec whose token has expired goes on, for its caller cannot come again; a watch ends,
// and so does an exec whose token was revoked.
func TestSessionOutlivesItsToken(t *testing.T) {
	api := newAPIServer(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnauthorized) })
	jwt := func(end time.Time) string {
		return "e30." + base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"exp":%d}`, end.Unix())) + ".x"
	}
	for _, test := range []struct {
		subresource string
		end         time.Duration
		ends        bool
	}{{"exec", -time.Hour, false}, {"exec", time.Hour, true}, {"log", -time.Hour, true}} {
		s := withIdentity(t, api, access.Own)
		r := httptest.NewRequest(http.MethodGet, "/api/k8s/api/v1/namespaces/a/pods/p/"+test.subresource, nil)
		r.Header.Set("Authorization", "Bearer "+jwt(time.Now().Add(test.end)))
		if test.subresource == "exec" {
			r.Header.Set("Connection", "Upgrade")
			r.Header.Set("Upgrade", "websocket")
		}
		r.Pattern = kube.Prefix + "/"
		sc := requestOf("a")
		if code, why := s.identify(sc, r); code != 0 || sc.right == nil {
			t.Fatal(why)
		}
		if why := s.gate.enter(sc, 0); why != "" {
			t.Fatal(why)
		}
		s.review(t.Context(), *sc.right, sc)
		if sc.revoked != test.ends {
			t.Errorf("%+v: ended %v", test, sc.revoked)
		}
	}
}

// TestOwnerEndsOnlyWhatNeedsMore: with read, a call that writes ends and one that reads goes on.
func TestOwnerEndsOnlyWhatNeedsMore(t *testing.T) {
	api := newAPIServer(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"data":{"allow":"read"}}`)
	})
	s := serverWith(t, &rest.Config{Host: api.URL}, slog.New(slog.DiscardHandler), func(cfg *config.Config) {
		cfg.Access.ConfigMap = "owner"
	})
	var all []*scope
	for _, needs := range []access.Level{access.None, access.Read, access.Write, access.All} {
		sc := requestOf("a")
		sc.needs = needs
		if why := s.gate.enter(sc, 0); why != "" {
			t.Fatal(why)
		}
		all = append(all, sc)
	}
	s.owner.Follow(t.Context())
	s.endForbidden()
	for needs, sc := range all {
		if sc.revoked != (needs > 1) {
			t.Errorf("what needs level %d has ended: %v", needs, sc.revoked)
		}
	}
}
