package server

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc/secret"
	"github.com/pipeops/vm-agent/proxy/answer"
)

const token = "hunter2"

// defaultMemory is the memory in bytes that tests compute the limits from.
const defaultMemory = 1 << 30

// newTest returns a server whose API server accepts all, its log, and its listeners' handlers.
func newTest(t testing.TB, agentToken secret.Secret) (
	s *Server, log *bytes.Buffer, handlers map[listener]http.Handler,
) {
	t.Helper()
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "from the API server")
	}))
	t.Cleanup(api.Close)
	log = &bytes.Buffer{}
	logger := slog.New(slog.NewJSONHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s = serverBefore(t, &rest.Config{Host: api.URL}, agentToken, logger)
	return s, log, map[listener]http.Handler{tunnel: s.handler(tunnel), operations: s.handler(operations)}
}

// serverBefore returns a server for an API server, with runners on *.svc and runnerHosts.
func serverBefore(
	t testing.TB, api *rest.Config, agentToken secret.Secret, log *slog.Logger, runnerHosts ...string,
) *Server {
	t.Helper()
	return serverWith(t, api, log, func(cfg *config.Config) {
		cfg.Agent.Token = agentToken
		cfg.Runners.AllowedHosts = append([]string{"*.svc"}, runnerHosts...)
	})
}

// serverWith returns a server for an API server, with changes of its configuration.
func serverWith(t testing.TB, api *rest.Config, log *slog.Logger, change func(*config.Config)) *Server {
	t.Helper()
	cfg := &config.Config{RunDir: t.TempDir()}
	cfg.Agent.ID, cfg.Agent.TokenOverlap = "agent-001", 5*time.Minute
	cfg.Access = config.Access{Identity: "agent", Prefix: "pipeops:", OwnNamespace: "closed"}
	cfg.Kubernetes.Namespace = "pipeops-system"
	change(cfg)
	s, err := New(cfg, api, defaultMemory, log)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func do(handler http.Handler, method, target string, authorization ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, nil)
	if authorization != nil {
		r.Header["Authorization"] = authorization
	}
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, r)
	return w
}

func TestOnlyTheRightTokenIsAccepted(t *testing.T) {
	for _, test := range []struct {
		name          string
		authorization []string
		want          int
	}{
		{"right", []string{"Bearer hunter2"}, 200},
		{"right, lower case scheme", []string{"bearer hunter2"}, 200},
		{"none", nil, 401},
		{"empty", []string{""}, 401},
		{"no token", []string{"Bearer"}, 401},
		{"empty token", []string{"Bearer "}, 401},
		{"wrong", []string{"Bearer hunter3"}, 401},
		{"prefix", []string{"Bearer hunter"}, 401},
		{"longer", []string{"Bearer hunter22"}, 401},
		{"other scheme", []string{"Basic hunter2"}, 401},
		{"unknown scheme", []string{"Token hunter2"}, 401},
		{"no scheme", []string{"hunter2"}, 401},
		{"right twice", []string{"Bearer hunter2", "Bearer hunter2"}, 401},
		{"wrong and right", []string{"Bearer x", "Bearer hunter2"}, 401},
	} {
		_, log, handlers := newTest(t, token)
		for _, path := range []string{"/metrics", "/api/k8s/version", "/api/k8s"} {
			w := do(handlers[tunnel], "GET", path, test.authorization...)
			if w.Code != test.want {
				t.Errorf("%s, %s: got %d, want %d", test.name, path, w.Code, test.want)
			}
			if strings.Contains(w.Body.String(), `\u003c`) {
				t.Errorf("%s, %s: not for reading: %s", test.name, path, w.Body)
			}
			if (w.Header().Get("WWW-Authenticate") != "") != (test.want == 401) ||
				w.Header().Get("Pipeops-Agent") != "agent-001" {
				t.Errorf("%s, %s: headers %v", test.name, path, w.Header())
			}
		}
		if strings.Contains(log.String(), "hunter") {
			t.Error("the log holds a token")
		}
	}
}

func TestWithoutATokenAllCallersAreRefused(t *testing.T) {
	_, _, handlers := newTest(t, "")
	for _, authorization := range []string{"", "Bearer", "Bearer ", "Bearer x"} {
		if w := do(handlers[tunnel], "GET", "/api/k8s/version", authorization); w.Code != 401 {
			t.Errorf("%q: got %d", authorization, w.Code)
		}
	}
}

// TestRoutesAreDescribed: openapi.yaml has all routes and no others. The integration tests compare the answers with it.
func TestRoutesAreDescribed(t *testing.T) {
	var page struct{ Paths map[string]map[string]any }
	if err := yaml.Unmarshal(openAPI, &page); err != nil {
		t.Fatal(err)
	}
	s, _, _ := newTest(t, token)
	want := map[string]bool{"/api/k8s/{path}": true} // any method
	for _, r := range s.routes(tunnel) {
		want[r.method+" "+r.path] = true
	}
	got := map[string]bool{}
	for path, item := range page.Paths {
		for method := range item {
			if _, known := map[string]bool{"get": true, "put": true, "post": true, "delete": true,
				"patch": true}[method]; known {
				got[strings.ToUpper(method)+" "+path] = true
			} else {
				got[path] = got[path] || path == "/api/k8s/{path}"
			}
		}
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("described %v\nserved    %v", got, want)
	}
}

func TestErrorsOutsideKubernetesAreProblems(t *testing.T) {
	_, _, handlers := newTest(t, token)
	for _, test := range []struct {
		l              listener
		method, target string
		code           int
		allow          string
	}{
		{tunnel, "GET", "/nothing", 404, ""},
		{tunnel, "GET", "/api/k8sx/version", 404, ""},
		{tunnel, "GET", "/api%2Fk8s/version", 404, ""},
		{tunnel, "POST", "/health", 405, "GET, HEAD"},
		{tunnel, "DELETE", "/metrics", 405, "GET, HEAD"},
		{tunnel, "GET", "/api/agent/heartbeat", 405, "POST"},
		{tunnel, "GET", "/metrics", 401, ""},
		{tunnel, "GET", "/ready?exclude=nonsense", 400, ""},
		{tunnel, "GET", "/ready?only=nonsense", 400, ""},
		{tunnel, "GET", "/activity", 404, ""},
		{operations, "POST", "/activity", 405, "GET, HEAD"},
		{tunnel, "POST", "/api/agent/heartbeat/", 404, ""},
		{operations, "GET", "/api/k8s/version", 404, ""},
		{operations, "GET", "/api/v1/pods", 404, ""},
	} {
		w := do(handlers[test.l], test.method, test.target)
		var p answer.Problem
		if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil {
			t.Errorf("%s %s: %v: %s", test.method, test.target, err, w.Body)
		}
		if w.Code != test.code || p.Status != test.code || p.Detail == "" || w.Header().Get("Allow") != test.allow ||
			w.Header().Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s %s: got %d %v %s", test.method, test.target, w.Code, w.Header(), w.Body)
		}
	}
}

func TestActivityCountsRequestsOnTheTunnel(t *testing.T) {
	_, _, handlers := newTest(t, token)
	inFlight := func(want int64) {
		t.Helper()
		activity := agentapi.Activity{RequestsInFlight: -1}
		w := do(handlers[operations], "GET", agentapi.ActivityPath)
		if err := json.Unmarshal(w.Body.Bytes(), &activity); err != nil || activity.RequestsInFlight != want {
			t.Errorf("answered %d %s, want %d: %v", w.Code, w.Body, want, err)
		}
	}
	inFlight(0)
	body, caller := io.Pipe()
	request := httptest.NewRequest(http.MethodPost, "/api/control-plane/message", body)
	request.Header.Set("Authorization", "Bearer "+token)
	request.Header.Set("Content-Type", "application/json")
	done := make(chan struct{})
	go func() {
		defer close(done)
		handlers[tunnel].ServeHTTP(httptest.NewRecorder(), request)
	}()
	_, _ = caller.Write([]byte("{")) // returns when the handler reads it
	inFlight(1)
	_ = caller.Close()
	<-done
	inFlight(0)
}

// TestPathsAreNotRedirected: a Location would leave the gateway's prefix.
func TestPathsAreNotRedirected(t *testing.T) {
	_, _, handlers := newTest(t, token)
	for _, target := range []string{
		"//api/agent/heartbeat", "/api//k8s/version", "/api/runners//command", "/api/runners/../command",
		"/./health", "//health", "//", "/..", "/health//",
	} {
		for l, handler := range handlers {
			r := httptest.NewRequest(http.MethodPost, "/", nil)
			r.RequestURI, r.URL = target, &url.URL{Path: target}
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, r)
			if w.Code != http.StatusNotFound || w.Header().Get("Content-Type") != "application/problem+json" ||
				strings.Contains(w.Body.String(), "/api/k8s") != (l == tunnel) {
				t.Errorf("%s, %s: answered %d %v %s", l, target, w.Code, w.Header(), w.Body)
			}
		}
	}
}

// TestWrongPathsOfTheServerGetAHint: kubectl prints the message of a Status, and the warning of discovery.
func TestWrongPathsOfTheServerGetAHint(t *testing.T) {
	_, _, handlers := newTest(t, token)
	for _, prefix := range []string{"", "/api/k8", "/k8s", "/agents/agent-001", "/apis", "/api"} {
		for _, path := range []string{"/api", "/apis", "/api/v1/pods", "/apis/apps/v1/deployments"} {
			r := httptest.NewRequest(http.MethodGet, prefix+path, nil)
			r.Header.Set("Accept", "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList")
			w := httptest.NewRecorder()
			handlers[tunnel].ServeHTTP(w, r)
			const hint = "the Kubernetes API is under /api/k8s/: add that to the server's URL"
			if w.Code != http.StatusNotFound || !strings.Contains(w.Body.String(), `"kind":"Status"`) ||
				!strings.Contains(w.Body.String(), hint) || !strings.Contains(w.Header().Get("Warning"), hint) {
				t.Errorf("%s%s: answered %d %v %s", prefix, path, w.Code, w.Header(), w.Body)
			}
		}
	}
	if w := do(handlers[tunnel], "GET", "/api/agent/nothing"); strings.Contains(w.Body.String(), `"kind":"Status"`) {
		t.Errorf("not a request of kubectl: answered %s", w.Body)
	}
}

// TestMissingCredentialInClearIsExplained: kubectl has a token, and does not send it over http.
func TestMissingCredentialInClearIsExplained(t *testing.T) {
	_, _, handlers := newTest(t, token)
	const hint = "kubectl sends no token over http://"
	r := httptest.NewRequest(http.MethodGet, "/api/k8s/api", nil)
	for _, encrypted := range []bool{false, true} {
		if encrypted {
			r.TLS = &tls.ConnectionState{}
		}
		w := httptest.NewRecorder()
		handlers[tunnel].ServeHTTP(w, r)
		if w.Code != 401 || strings.Contains(w.Body.String(), hint) == encrypted {
			t.Errorf("over TLS %t: answered %d %s", encrypted, w.Code, w.Body)
		}
	}
	for _, other := range []*httptest.ResponseRecorder{
		do(handlers[tunnel], "GET", "/api/k8s/api", "Bearer wrong"), do(handlers[tunnel], "GET", "/metrics"),
	} {
		if strings.Contains(other.Body.String(), hint) {
			t.Errorf("answered %s", other.Body)
		}
	}
}

func TestReadyReportsItsChecks(t *testing.T) {
	s, _, handlers := newTest(t, token)
	type answer struct {
		Checks map[string]struct {
			OK     bool
			Detail string
		}
	}
	ready := func(l listener, target string, authorization ...string) (int, answer) {
		t.Helper()
		var a answer
		w := do(handlers[l], "GET", target, authorization...)
		if err := json.Unmarshal(w.Body.Bytes(), &a); err != nil {
			t.Fatal(err)
		}
		return w.Code, a
	}
	// Without a lease there is no tunnel. Only callers with the token, and on the operations listener, see why.
	for _, test := range []struct {
		l             listener
		authorization []string
		detailed      bool
	}{
		{operations, nil, true}, {tunnel, nil, false},
		{tunnel, []string{"Bearer wrong"}, false}, {tunnel, []string{"Bearer " + token}, true},
	} {
		code, a := ready(test.l, "/ready", test.authorization...)
		if code != 503 || !a.Checks["kubernetes"].OK || a.Checks["tunnel"].OK || !a.Checks["shutdown"].OK {
			t.Errorf("%v: %d %+v", test, code, a)
		}
		if detailed := strings.Contains(a.Checks["tunnel"].Detail, "bootstrap has not run"); detailed != test.detailed {
			t.Errorf("%v: %+v", test, a)
		}
	}
	if code, a := ready(operations, "/ready?exclude=tunnel"); code != 200 || len(a.Checks) != 2 {
		t.Errorf("without the tunnel: %d %+v", code, a)
	}
	s.gate.draining.Store(true)
	if code, a := ready(operations, "/ready?exclude=tunnel&exclude=kubernetes"); code != 503 ||
		a.Checks["shutdown"].OK || len(a.Checks) != 1 {
		t.Errorf("draining: %d %+v", code, a)
	}
	if code, a := ready(operations, "/ready?only=shutdown"); code != 503 || a.Checks["shutdown"].OK || len(a.Checks) != 1 {
		t.Errorf("draining, and only that is asked: %d %+v", code, a)
	}
	code, a := ready(operations, "/ready?only=kubernetes&only=tunnel&exclude=tunnel")
	if code != 200 || len(a.Checks) != 1 {
		t.Errorf("only the API server: %d %+v", code, a)
	}
	if w := do(handlers[operations], "GET", "/health"); w.Code != 200 {
		t.Errorf("health depends on readiness: %d", w.Code)
	}
}

func TestMetricsCountRequests(t *testing.T) {
	_, _, handlers := newTest(t, token)
	do(handlers[tunnel], "GET", "/api/k8s/secret-name", "Bearer "+token)
	do(handlers[tunnel], "BREW", "/secret-name")
	do(handlers[operations], "GET", "/ready")
	text := do(handlers[operations], "GET", "/metrics").Body.String()
	for _, want := range []string{
		`pipeops_agent_http_requests_total{code="200",method="GET",route="/api/k8s/"} 1`,
		`pipeops_agent_http_requests_total{code="404",method="other",route="none"} 1`,
		`pipeops_agent_ready_check{check="tunnel"} 0`,
		`pipeops_agent_ready_check{check="kubernetes"} 1`,
		`pipeops_agent_http_requests_in_flight{listener="tunnel"} 0`,
		`pipeops_agent_build_info{`,
		`pipeops_agent_http_sent_bytes_total`,
		`pipeops_agent_kubernetes_requests_total{code="200",lane="call",origin="api_server",verb="get"} 1`,
		`pipeops_agent_kubernetes_requests_in_flight{lane="call"} 0`,
		`pipeops_agent_kubernetes_upstream_duration_seconds_bucket{lane="call",le="60"} 1`,
		`pipeops_agent_kubernetes_upstream_duration_seconds_count{lane="own"} 1`, // the check
		`process_resident_memory_bytes`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("missing %s in\n%s", want, text)
		}
	}
	if strings.Contains(text, "secret-name") || strings.Contains(text, "BREW") {
		t.Error("a label holds what a caller made up")
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v %v", problems, err)
	}
}

// TestErrorsHaveAnOrigin: whoever looks at 5xx must know whether to look at the agent's way to the API server or at the
// API server.
func TestErrorsHaveAnOrigin(t *testing.T) {
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadGateway)
	}))
	s := serverBefore(t, &rest.Config{Host: api.URL}, token, slog.New(slog.DiscardHandler))
	for _, origin := range []string{"api_server", "agent"} {
		do(s.handler(tunnel), "GET", "/api/k8s/version", "Bearer "+token)
		api.Close()
		if got := testutil.ToFloat64(s.metrics.kube.WithLabelValues("get", "502", "call", origin)); got != 1 {
			t.Errorf("%v errors of %s", got, origin)
		}
	}
}

// TestCertificatesHaveAnExpiry: of a chain, that of the first certificate; of authorities, that of the last to expire.
func TestCertificatesHaveAnExpiry(t *testing.T) {
	dir := t.TempDir()
	var chain []byte
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, end := range []int64{2e9, 3e9, 1e9} {
		template := &x509.Certificate{SerialNumber: big.NewInt(end), NotAfter: time.Unix(end, 0)}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	file := filepath.Join(dir, "chain.crt")
	if err := os.WriteFile(file, chain, 0o600); err != nil {
		t.Fatal(err)
	}
	s := serverWith(t, &rest.Config{Host: "127.0.0.1:1"}, slog.New(slog.DiscardHandler), func(cfg *config.Config) {
		cfg.Agent.Token = token
		cfg.FRP.TLS.CertFile, cfg.FRP.TLS.CAFile, cfg.Agent.CAFile = file, file, filepath.Join(dir, "none")
	})
	text := do(s.handler(operations), "GET", "/metrics").Body.String()
	for name, want := range map[string]string{
		"frp_client": "2e+09", "frp_ca": "3e+09", "control_plane_ca": "0", "client_ca": "0",
	} {
		line := `certificate_expiry_timestamp_seconds{certificate="` + name + `"} ` + want + "\n"
		if !strings.Contains(text, line) {
			t.Errorf("missing %s", line)
		}
	}
}

// TestMetricsAreDocumented: the README lists all metrics with their types, and no others.
func TestMetricsAreDocumented(t *testing.T) {
	_, _, handlers := newTest(t, token)
	do(handlers[tunnel], "GET", "/api/k8s/version", "Bearer "+token)
	do(handlers[tunnel], "POST", "/api/runners/r/command", "Bearer "+token)
	do(handlers[operations], "GET", "/ready")
	served, documented := map[string]string{}, map[string]string{}
	page := do(handlers[operations], "GET", "/metrics").Body.String()
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (pipeops_agent_\S+) (\S+)$`).FindAllStringSubmatch(page, -1) {
		served[m[1]] = m[2]
	}
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile("(?m)^\\| `(pipeops_agent_\\S+)` \\| (\\w+)")
	for _, m := range row.FindAllStringSubmatch(string(readme), -1) {
		documented[m[1]] = m[2]
	}
	if !reflect.DeepEqual(served, documented) {
		t.Errorf("served     %v\ndocumented %v", served, documented)
	}
}

func TestRequestsAreLoggedWithoutTheirContent(t *testing.T) {
	_, log, handlers := newTest(t, token)
	w := do(handlers[tunnel], "GET", "/api/k8s/api/v1/namespaces/a/secrets/top?command=rm", "Bearer "+token)
	line := log.String()
	if strings.Contains(line, "rm") || strings.Contains(line, token) {
		t.Errorf("logged %s", line)
	}
	id := w.Header().Get("X-Request-Id")
	for _, want := range []string{`"request_id":"` + id + `"`, `"status":200`, `"bytes":19`, `"verb":"get"`,
		`"resource":"secrets"`, `"namespace":"a"`, `"name":"top"`, `"outcome":"forwarded"`, `"caller":"192.0.2.1"`} {
		if id == "" || !strings.Contains(line, want) {
			t.Errorf("request %q logged without %s: %s", id, want, line)
		}
	}
}

// TestRefusalsDoNotWaitForBodies: net/http would read the body before it answers, without a time limit.
func TestRefusalsDoNotWaitForBodies(t *testing.T) {
	_, _, handlers := newTest(t, token)
	server := httptest.NewServer(handlers[tunnel])
	defer server.Close()
	for _, path := range []string{"/api/k8s/api", "/metrics", "/nothing"} {
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, "POST "+path+" HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		// The body never comes: a wait would reach the time limit of go test.
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode < 400 || !resp.Close {
			t.Errorf("%s: %+v, %v", path, resp, err)
		}
		_ = conn.Close()
	}
}

// TestAgentsHeadersSurvive1xx: ReverseProxy clears all headers when a 1xx passes.
func TestAgentsHeadersSurvive1xx(t *testing.T) {
	s, _, _ := newTest(t, token)
	handler := s.observe(tunnel, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusEarlyHints)
		clear(w.Header())
		w.Header().Set("Pipeops-Agent", "an impostor")
		_, _ = io.WriteString(w, "ok")
	}))
	w := do(handler, "GET", "/")
	if got := w.Header()["Pipeops-Agent"]; !reflect.DeepEqual(got, []string{"agent-001"}) ||
		w.Header().Get("X-Request-Id") == "" {
		t.Errorf("headers %v", w.Header())
	}
}

// TestPanicsAreLoggedAs500: and not as callers who left; net/http still sees the panic.
func TestPanicsAreLoggedAs500(t *testing.T) {
	s, log, _ := newTest(t, token)
	for value, want := range map[any]string{"a mistake": `"status":500`, http.ErrAbortHandler: `"status":499`} {
		log.Reset()
		func() {
			defer func() {
				if p := recover(); p != value {
					t.Errorf("recovered %v, want %v", p, value)
				}
			}()
			do(s.observe(tunnel, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(value) })), "GET", "/")
		}()
		if !strings.Contains(log.String(), want) {
			t.Errorf("%v is logged as %s", value, log)
		}
	}
}

func TestCallerIsAnAddress(t *testing.T) {
	for forwarded, want := range map[string]string{
		"": "192.0.2.1", "1.2.3.4": "1.2.3.4", "evil, 1.2.3.4": "1.2.3.4", "1.2.3.4, evil text": "192.0.2.1", "::1": "::1",
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		if forwarded != "" {
			r.Header.Set("X-Forwarded-For", forwarded)
		}
		if got := caller(r); got != want {
			t.Errorf("%q: got %q, want %q", forwarded, got, want)
		}
	}
}

// TestPlainHTTPGets421WhileTheTunnelIsHTTPS: except frpc's health check.
func TestPlainHTTPGets421WhileTheTunnelIsHTTPS(t *testing.T) {
	s, _, handlers := newTest(t, token)
	s.tunnel.https.Store(true)
	for path, want := range map[string]int{
		"/ready?only=shutdown": 200, "/ready?only=shutdown&only=tunnel": 421,
		"/ready": 421, "/health": 421, "/api/k8s/version": 421, "/metrics": 421,
	} {
		if w := do(handlers[tunnel], "GET", path, "Bearer "+token); w.Code != want {
			t.Errorf("%s: answered %d %s", path, w.Code, w.Body)
		}
		if w := do(handlers[operations], "GET", "/health"); w.Code != 200 {
			t.Errorf("the operations listener answers %d", w.Code)
		}
	}
}

func TestOnlyMethodsOfTheKubernetesAPIAreForwarded(t *testing.T) {
	_, _, handlers := newTest(t, token)
	for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} {
		if w := do(handlers[tunnel], method, "/api/k8s/x", "Bearer "+token); w.Code != 200 {
			t.Errorf("%s: answered %d", method, w.Code)
		}
	}
	for _, method := range []string{"TRACE", "PROPFIND", "get"} {
		if w := do(handlers[tunnel], method, "/api/k8s/x", "Bearer "+token); w.Code != 405 || w.Header().Get("Allow") == "" {
			t.Errorf("%s: answered %d", method, w.Code)
		}
	}
}

// TestCallerComesFromThePROXYHeader: not from X-Forwarded-For, which the caller can set.
func TestCallerComesFromThePROXYHeader(t *testing.T) {
	var log strings.Builder
	api := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	t.Cleanup(api.Close)
	s := serverBefore(t, &rest.Config{Host: api.URL}, token, slog.New(slog.NewJSONHandler(&log, nil)))
	header := "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + "\xc0\x00\x02\x07\xc0\x00\x02\x08\x12\x67\x01\xbb"
	request := header + "GET /api/k8s/version HTTP/1.1\r\nX-Forwarded-For: 198.51.100.9\r\nX-Rest:"
	if _, resp, err := call(t, listening(t, s), request); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("answered %v, %v", resp, err)
	}
	if !strings.Contains(log.String(), `"caller":"192.0.2.7"`) ||
		!strings.Contains(log.String(), `"forwarded_for":"198.51.100.9"`) {
		t.Errorf("logged %s", &log)
	}
}

// TestInvalidStatusBecomes502: and a valid status that HTTP does not define gets the label "other".
func TestInvalidStatusBecomes502(t *testing.T) {
	for code, want := range map[int]struct {
		answer int
		label  string
	}{7: {502, "502"}, 99: {502, "502"}, 600: {502, "502"}, 999: {502, "502"}, 299: {299, "other"}, 418: {418, "418"}} {
		upstream, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = upstream.Close() })
		go func() {
			for {
				conn, err := upstream.Accept()
				if err != nil {
					return
				}
				_, _ = http.ReadRequest(bufio.NewReader(conn))
				_, _ = fmt.Fprintf(conn, "HTTP/1.1 %03d X\r\nContent-Length: 0\r\n\r\n", code)
				_ = conn.Close()
			}
		}()
		s := serverBefore(t, &rest.Config{Host: "http://" + upstream.Addr().String()}, token, slog.New(slog.DiscardHandler))
		if w := do(s.handler(tunnel), "POST", "/api/k8s/x", "Bearer "+token); w.Code != want.answer {
			t.Errorf("%d: answered %d %s", code, w.Code, w.Body)
		}
		if n := testutil.ToFloat64(s.metrics.requests.WithLabelValues("/api/k8s/", "POST", want.label)); n != 1 {
			t.Errorf("%d: label %q counts %v", code, want.label, n)
		}
	}
}

// TestAnonymousRequestsDoNotFillTheLog: they are counted, and logged at level debug.
func TestAnonymousRequestsDoNotFillTheLog(t *testing.T) {
	var log strings.Builder
	s := serverBefore(t, &rest.Config{Host: "http://127.0.0.1:1"}, token, slog.New(slog.NewJSONHandler(&log, nil)))
	for range 1000 {
		for _, path := range []string{"/nowhere", "/api/k8s/x", "/openapi.yaml", "/api/runners/a/command"} {
			do(s.handler(tunnel), "GET", path)
		}
	}
	if lines := strings.Count(log.String(), "\n"); lines > 3 {
		t.Errorf("%d lines", lines)
	}
	do(s.handler(tunnel), "GET", "/metrics", "Bearer "+token)
	if !strings.Contains(log.String(), `"msg":"request"`) {
		t.Error("an authenticated request is not logged")
	}
}
