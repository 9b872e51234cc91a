package server

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/proxy/access"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// apiServer records the requests that reach it.
type apiServer struct {
	*httptest.Server

	mu   sync.Mutex
	seen []*http.Request
}

func newAPIServer(t testing.TB, answer http.HandlerFunc) *apiServer {
	t.Helper()
	api := &apiServer{}
	api.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		api.mu.Lock()
		api.seen = append(api.seen, r)
		api.mu.Unlock()
		if answer != nil {
			answer(w, r)
		}
	}))
	t.Cleanup(api.Close)
	return api
}

func (a *apiServer) take() []*http.Request {
	a.mu.Lock()
	defer a.mu.Unlock()
	seen := a.seen
	a.seen = nil
	return seen
}

func withIdentity(t testing.TB, api *apiServer, identity string) *Server {
	t.Helper()
	return serverWith(t, &rest.Config{Host: api.URL, BearerToken: "agents-own"}, slog.New(slog.DiscardHandler),
		func(cfg *config.Config) { cfg.Agent.Token, cfg.Access.Identity = token, identity })
}

// FuzzAccess: whatever a caller sends, in every identity, what reaches the API server carries one credential, the one
// that was decided, and impersonation only where it may.
func FuzzAccess(f *testing.F) {
	for _, seed := range []string{
		"Authorization: Bearer " + token + "\r\nImpersonate-User: a\r\n",
		"Authorization: Bearer own\r\nPipeops-Agent-Authorization: Bearer " + token + "\r\n",
		"Authorization: Bearer own\r\nPipeops-Agent-Authorization: Bearer " + token + "\r\nImpersonate-User: a\r\n",
		"Authorization: Bearer  own\r\nPipeops-Agent-Authorization: Bearer " + token + "\r\n",
		"Authorization: Basic eDp5\r\nPipeops-Agent-Authorization: Bearer " + token + "\r\n",
		"Authorization: Bearer " + token + "\r\nImpersonate-User: a\r\nConnection: Impersonate-User\r\n",
		"authorization: bearer " + token + "\r\nIMPERSONATE-USER: system:admin\r\nimpersonate-group: b\r\nImpersonate-Uid: 1\r\n",
		"Authorization: Bearer " + token + "\r\nX-Remote-User: a\r\nCookie: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\n" +
			"Sec-WebSocket-Protocol: base64url.bearer.authorization.k8s.io.YQ\r\n",
		"Pipeops-Agent-Authorization: Bearer " + token + "\r\nUpgrade: websocket\r\nConnection: upgrade\r\n" +
			"Sec-WebSocket-Protocol: a, base64url.bearer.authorization.k8s.io.YQ\r\n",
	} {
		f.Add(seed)
	}
	api := newAPIServer(f, nil)
	handlers := map[string]http.Handler{}
	for _, identity := range []string{access.Agent, access.Named, access.Own} {
		handlers[identity] = withIdentity(f, api, identity).handler(tunnel)
	}
	f.Fuzz(func(t *testing.T, headers string) {
		for identity, handler := range handlers {
			text := "GET /api/k8s/version HTTP/1.1\r\nHost: a\r\n" + headers + "\r\n"
			r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text)))
			if err != nil || r.RequestURI != "/api/k8s/version" || r.ContentLength != 0 {
				return
			}
			r.Body = http.NoBody
			sent := r.Header.Clone()
			func() {
				defer func() { _ = recover() }() // ErrAbortHandler, for upgrades that a recorder cannot do
				handler.ServeHTTP(httptest.NewRecorder(), r)
			}()
			for _, seen := range api.take() {
				got := seen.Header
				credentials := got["Authorization"]
				if len(credentials) != 1 || (credentials[0] == "Bearer agents-own") != (identity != access.Own) ||
					strings.Contains(credentials[0], token) {
					t.Errorf("%s: %q reached the API server with %q", identity, headers, credentials)
				}
				for name, values := range got {
					switch {
					case strings.HasPrefix(name, "Impersonate-"):
						ok := identity == access.Own && slices.Equal(values, sent[name]) ||
							identity == access.Named && (name == "Impersonate-User" || name == "Impersonate-Group")
						if !ok {
							t.Errorf("%s: %q reached the API server with %s: %q", identity, headers, name, values)
						}
					case strings.HasPrefix(name, "X-Remote-"), name == "Cookie", name == kube.GateHeader,
						name == "Sec-Websocket-Protocol" && strings.Contains(strings.Join(values, ","), kube.TokenProtocol):
						t.Errorf("%s: %q reached the API server with %s: %q", identity, headers, name, values)
					}
				}
				user := got["Impersonate-User"]
				if identity == access.Named && (len(user) != 1 || !strings.HasPrefix(user[0], "pipeops:") ||
					!slices.Contains(got["Impersonate-Group"], access.TunnelGroup)) {
					t.Errorf("named: %q reached the API server as %q", headers, user)
				}
			}
		}
	})
}

// TestRightsOfStreamsAreReviewed: one review for all streams that ask the same, and all of them end with the right.
func TestRightsOfStreamsAreReviewed(t *testing.T) {
	var mu sync.Mutex
	code, allowed := http.StatusCreated, true
	answer := func(c int, a bool) {
		mu.Lock()
		defer mu.Unlock()
		code, allowed = c, a
	}
	api := newAPIServer(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			mu.Lock()
			defer mu.Unlock()
			w.WriteHeader(code)
			_, _ = fmt.Fprintf(w, `{"status":{"allowed":%v}}`, allowed)
			return
		}
		silent(w, r)
	})
	for _, test := range []struct {
		identity string
		code     int
		allowed  bool
		ends     bool
		event    string
	}{
		{access.Named, http.StatusCreated, true, false, ""},
		{access.Named, http.StatusCreated, false, true, "may no longer watch pods"},
		{access.Named, http.StatusForbidden, true, true, "may no longer watch pods"},
		{access.Named, http.StatusUnauthorized, true, false, ""},
		{access.Named, http.StatusInternalServerError, false, false, ""},
		{access.Own, http.StatusUnauthorized, true, true, ""},
		{access.Own, http.StatusServiceUnavailable, true, false, ""},
	} {
		t.Run(fmt.Sprint(test), func(t *testing.T) {
			s := withIdentity(t, api, test.identity)
			addr := listening(t, s)
			watch := func(user string) io.Reader {
				who := auth + "Impersonate-User: " + user + "\r\n"
				if test.identity == access.Own {
					who = kube.GateHeader + ": Bearer " + token + "\r\nAuthorization: Bearer " + user + "\r\n"
				}
				_, resp, err := send(t, addr, "GET /api/k8s/api/v1/pods?watch=1 HTTP/1.1\r\nHost: a\r\n"+who)
				if err != nil || resp.StatusCode != http.StatusOK {
					t.Fatalf("watch: %v, %v", resp, err)
				}
				return resp.Body
			}
			first, second, other := watch("a"), watch("a"), watch("b")
			api.take()
			answer(test.code, test.allowed)
			s.reviewStreams(t.Context())
			if n := len(api.take()); n != 0 {
				t.Fatalf("%d reviews before any was due", n)
			}
			for key := range s.reviews {
				s.reviews[key] = &review{at: time.Now().Add(-time.Hour)}
			}
			s.reviewStreams(t.Context())
			reviews := api.take()
			if len(reviews) != 2 {
				t.Errorf("%d reviews for the watches of two callers", len(reviews))
			}
			s.reviewStreams(t.Context())
			if n := len(api.take()); n != 0 {
				t.Errorf("%d reviews at once after the last", n)
			}
			if !test.ends {
				if inUse(s) != 3 {
					t.Errorf("%d watches run, want 3", inUse(s))
				}
				answered := test.code == http.StatusCreated
				if age := testutil.ToFloat64(s.metrics.reviewAge); (age < 60) != answered {
					t.Errorf("answered: %v; the last review was %.0f s ago", answered, age)
				}
				return
			}
			for _, body := range []io.Reader{first, second, other} {
				got, err := io.ReadAll(body)
				if err != nil || strings.Contains(string(got), test.event) != (test.event != "") && test.event != "" ||
					test.event == "" && len(got) > 0 {
					t.Errorf("ended with %q, %v", got, err)
				}
			}
		})
	}
}

// TestOwnerEndsWhatIsNoLongerAllowed: what runs, and what comes.
func TestOwnerEndsWhatIsNoLongerAllowed(t *testing.T) {
	var mu sync.Mutex
	allow := "read"
	api := newAPIServer(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "configmaps") {
			mu.Lock()
			defer mu.Unlock()
			_, _ = fmt.Fprintf(w, `{"data":{"allow":%q,"reason":"an audit"}}`, allow)
			return
		}
		silent(w, r)
	})
	s := serverWith(t, &rest.Config{Host: api.URL}, slog.New(slog.DiscardHandler), func(cfg *config.Config) {
		cfg.Agent.Token, cfg.Access.ConfigMap = token, "owner"
	})
	s.owner.Follow(t.Context())
	addr := listening(t, s)
	_, watch, err := call(t, addr, "GET /api/k8s/api/v1/pods?watch=1")
	if err != nil || watch.StatusCode != http.StatusOK {
		t.Fatalf("%v, %v", watch, err)
	}
	_, resp, err := call(t, addr, "DELETE /api/k8s/api/v1/pods")
	if err != nil || resp.StatusCode != http.StatusForbidden {
		t.Errorf("delete: %v, %v", resp, err)
	}
	mu.Lock()
	allow = "none"
	mu.Unlock()
	s.owner.Follow(t.Context())
	s.endForbidden()
	s.endForbidden()
	got, err := io.ReadAll(watch.Body)
	if err != nil || !strings.Contains(string(got), `"type":"ERROR"`) || !strings.Contains(string(got), "an audit") {
		t.Errorf("the watch ended with %q, %v", got, err)
	}
	for _, path := range []string{"/api/k8s/version", "/api/k8s/api/v1/pods?watch=1"} {
		_, resp, err := call(t, addr, "GET "+path)
		if err != nil || resp.StatusCode != http.StatusForbidden {
			t.Errorf("%s: %v, %v", path, resp, err)
		}
	}
	if n := testutil.ToFloat64(s.metrics.streamsEnded.WithLabelValues("switch")); n != 1 {
		t.Errorf("%v ended, want 1", n)
	}
}

// TestUnverifiedSubjectsAreNotLogged: a token's own account of its subject holds once the API server accepts it.
func TestUnverifiedSubjectsAreNotLogged(t *testing.T) {
	code := 0
	api := newAPIServer(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) })
	log := &bytes.Buffer{}
	s := serverWith(t, &rest.Config{Host: api.URL}, slog.New(slog.NewJSONHandler(log, nil)), func(cfg *config.Config) {
		cfg.Agent.Token, cfg.Access.Identity = token, access.Own
	})
	for _, test := range []struct {
		code   int
		logged bool
	}{
		{http.StatusOK, true}, {http.StatusForbidden, true},
		{http.StatusBadRequest, false}, {http.StatusUnauthorized, false}, {http.StatusBadGateway, false},
	} {
		code = test.code
		r := httptest.NewRequest(http.MethodGet, "/api/k8s/version", nil)
		r.Header.Set(kube.GateHeader, "Bearer "+token)
		r.Header.Set("Authorization", "Bearer e30."+base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"victim"}`))+".x")
		log.Reset()
		s.handler(tunnel).ServeHTTP(httptest.NewRecorder(), r)
		if strings.Contains(log.String(), `"user":"victim"`) != test.logged || strings.Contains(log.String(), "e30.") {
			t.Errorf("%d: logged %s", test.code, log)
		}
	}
}

// TestConnectionsEndWithTheirCertificates: when they expire, and when their authority is no longer trusted.
func TestConnectionsEndWithTheirCertificates(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ca.pem")
	issue := func() func(life time.Duration) tls.Certificate { // writes a new authority, and issues by it
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		ca := &x509.Certificate{
			SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true,
			Subject: pkix.Name{CommonName: "ca"}, BasicConstraintsValid: true,
		}
		der, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return func(life time.Duration) tls.Certificate {
			leaf := &x509.Certificate{
				SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(life),
				ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
			}
			der, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), key)
			if err != nil {
				t.Fatal(err)
			}
			return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
		}
	}
	first := issue()
	s, _, _ := newTest(t, token)
	writeCertificate(t, s.config.RunDir, 1)
	c := &certificates{runDir: s.config.RunDir, clientCAFile: file, log: s.log}
	if err := c.reload(); err != nil {
		t.Fatal(err)
	}
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	bounded := s.bound(tunnel, socket.(*net.TCPListener), c.config())
	server := newHTTPServer(t.Context(), tunnel, s.handler(tunnel), s.log)
	go func() { _ = server.Serve(bounded) }()
	t.Cleanup(func() { _ = server.Close() })
	served := func(certificates ...tls.Certificate) bool {
		conn, err := tls.Dial("tcp", socket.Addr().String(),
			&tls.Config{InsecureSkipVerify: true, Certificates: certificates, MinVersion: tls.VersionTLS13})
		if err != nil {
			return false
		}
		t.Cleanup(func() { _ = conn.Close() })
		_, _ = io.WriteString(conn, "GET /metrics HTTP/1.1\r\nHost: a\r\n"+auth+"\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		return err == nil && resp.StatusCode == http.StatusOK
	}
	if served() || !served(first(2*time.Second)) || !served(first(time.Hour)) {
		t.Fatal("a caller without a certificate is served, or one with a certificate is not")
	}
	if n := c.follow(bounded); n != 0 {
		t.Errorf("%d connections closed before anything has changed", n)
	}
	eventually(t, func() bool { return c.follow(bounded) == 1 })
	second := issue()
	if n := c.follow(bounded); n != 1 || served(first(time.Hour)) || !served(second(time.Hour)) {
		t.Errorf("%d connections closed, or another authority is trusted than that of the file", n)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if n := c.follow(bounded); n != 1 || served(second(time.Hour)) {
		t.Errorf("without a file, %d connections closed, or callers are served", n)
	}
}
