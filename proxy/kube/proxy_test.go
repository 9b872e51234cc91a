package kube

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// upstream is an API server that records the last request; the real one is in the integration tests.
type upstream struct {
	*httptest.Server

	requestURI string
	header     http.Header
}

func newUpstream(t *testing.T) *upstream {
	t.Helper()
	u := &upstream{}
	u.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u.requestURI, u.header = r.RequestURI, r.Header
		_, _ = io.WriteString(w, "ok")
	}))
	u.EnableHTTP2 = true
	u.StartTLS()
	t.Cleanup(u.Close)
	return u
}

func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	req := &Request{Description: Describe(r), Reserve: func(int64, bool) bool { return true }}
	if r.Body != nil && r.Body != http.NoBody {
		req.Body = NewBody(w, r.Body, func(float64) {})
		r = r.WithContext(r.Context())
		r.Body = req.Body
		defer req.Body.Release()
	}
	p.Serve(w, r, req)
}

// proxyTo returns a proxy to an API server.
func proxyTo(t testing.TB, config *rest.Config) *Proxy {
	t.Helper()
	client, err := NewClient(config, func(*http.Request, float64) {})
	if err != nil {
		t.Fatal(err)
	}
	return NewProxy(client, false, slog.New(slog.DiscardHandler))
}

// front serves a proxy to the API server at host over plain HTTP.
func front(t *testing.T, host string) *httptest.Server {
	t.Helper()
	server := httptest.NewServer(proxyTo(t, &rest.Config{
		Host: host, BearerToken: "agents-own", TLSClientConfig: rest.TLSClientConfig{Insecure: true},
	}))
	t.Cleanup(server.Close)
	return server
}

// frontHTTP2 is front over TLS, with a client that speaks HTTP/2.
func frontHTTP2(t *testing.T, host string) *httptest.Server {
	t.Helper()
	server := httptest.NewUnstartedServer(proxyTo(t, &rest.Config{
		Host: host, BearerToken: "agents-own", TLSClientConfig: rest.TLSClientConfig{Insecure: true},
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	return server
}

// send writes a request unchanged, which net/http's client would not, and reads the answer.
func send(t *testing.T, server *httptest.Server, request string) *http.Response {
	t.Helper()
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body = io.NopCloser(strings.NewReader(string(body)))
	return resp
}

func TestPathsAreForwardedByteForByteOrRefused(t *testing.T) {
	u := newUpstream(t)
	server := front(t, u.URL+"/base/")
	for _, test := range []struct {
		target string // after /api/k8s
		want   string // at the API server; empty: refused
	}{
		{"", "/base/"},
		{"/", "/base/"},
		{"/api/v1/namespaces/a/pods?limit=5&labelSelector=a%3Db", "/base/api/v1/namespaces/a/pods?limit=5&labelSelector=a%3Db"},
		{"/apis/a%2Fb//c/", "/base/apis/a%2Fb//c/"},
		{"/x?q=a;b&c=%zz", "/base/x?q=a;b&c=%zz"},
		{"/x/%252e%252e/y", "/base/x/%252e%252e/y"},
		{"/api/v1/namespaces/a/services/https:s:443/proxy/a%20b%3F", "/base/api/v1/namespaces/a/services/https:s:443/proxy/a%20b%3F"},
		{"/n%C3%A4me", "/base/n%C3%A4me"},
		{"/..", ""}, {"/../x", ""}, {"/a/./b", ""}, {"/a/%2e%2e/b", ""}, {"/a/.%2E/b", ""}, {"/a%2f..%2fb", ""},
		{"/a\\b", ""}, {"/a%5cb", ""}, {"/a%00b", ""}, {"/n\xc3\xa4me", ""}, {"/a\"b", ""},
		{"/api/v1/nodes/n/proxy/exec", ""}, {"/api/v1/nodes/n/proxy", ""}, {"/api/v1//nodes/n/%70roxy/x", ""},
		{"//api/v1/nodes/https:n:10250/proxy/", ""},
		{"/api/v1/namespaces/a/serviceaccounts/b/token", ""}, {"/api//v1/namespaces/a/serviceaccounts/b/%74oken/", ""},
		{"/api/v1/namespaces/a/serviceaccounts/b", "/base/api/v1/namespaces/a/serviceaccounts/b"},
		{"/metrics", ""}, {"/debug/pprof/", ""}, {"/logs/kube-apiserver.log", ""}, {"//metrics", ""},
	} {
		u.requestURI = ""
		resp := send(t, server, "GET "+Prefix+test.target+" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
		if u.requestURI != test.want {
			t.Errorf("%q: the API server saw %q, want %q", test.target, u.requestURI, test.want)
		}
		refused := resp.StatusCode == http.StatusBadRequest || resp.StatusCode == http.StatusForbidden
		if refused != (test.want == "") {
			t.Errorf("%q: answered %s", test.target, resp.Status)
		}
	}
	for _, line := range []string{"GET http://other.example" + Prefix +
		"/x HTTP/1.1", "CONNECT other.example:443 HTTP/1.1"} {
		u.requestURI = ""
		if resp := send(t, server, line+"\r\nHost: a\r\n\r\n"); resp.StatusCode != http.StatusBadRequest ||
			u.requestURI != "" {
			t.Errorf("%q: answered %s, the API server saw %q", line, resp.Status, u.requestURI)
		}
	}
}

// TestRedirectsStayBelowThePrefix: the API server redirects to paths from the root. A caller must find them below the
// agent's prefix and a gateway's, of which the agent does not know.
func TestRedirectsStayBelowThePrefix(t *testing.T) {
	var location string
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Location"] = []string{location}
		w.WriteHeader(http.StatusMovedPermanently)
	}))
	t.Cleanup(api.Close)
	const gateway = "https://gateway.example/agents/a"
	for base, server := range map[string]*httptest.Server{"": front(t, api.URL), "/base": front(t, api.URL+"/base/")} {
		for _, test := range []struct{ path, location, want string }{
			{"/api/v1/namespaces/a/pods/b/proxy", base + "/api/v1/namespaces/a/pods/b/proxy/",
				gateway + Prefix + "/api/v1/namespaces/a/pods/b/proxy/"},
			{"/api/v1/namespaces/a/services/b/proxy/c%2Fd/e", base + "/api/v1/namespaces/a/services/b/proxy/f?g=/h",
				gateway + Prefix + "/api/v1/namespaces/a/services/b/proxy/f?g=/h"},
			{"/x", base + "/y:z", gateway + Prefix + "/y:z"},
			{"/x/y", base + "/", gateway + Prefix + "/"},
			{"/x/y", "z", gateway + Prefix + "/x/z"},
			{"/x/y", "//other.example/z", "https://other.example/z"},
			{"/x/y", "https://other.example/z", "https://other.example/z"},
		} {
			location = test.location
			resp := send(t, server, "GET "+Prefix+test.path+" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
			asked, err := url.Parse(gateway + Prefix + test.path)
			if err != nil {
				t.Fatal(err)
			}
			got, err := asked.Parse(resp.Header.Get("Location"))
			if err != nil || got.String() != test.want {
				t.Errorf("%s redirected to %s: the caller asks %s, %v, want %s", test.path, location, got, err, test.want)
			}
		}
	}
}

func TestOnlyTheAgentsCredentialIsForwarded(t *testing.T) {
	u := newUpstream(t)
	server := front(t, u.URL)
	for name, sent := range map[string]string{
		"plain": "Authorization: Bearer callers\r\nCookie: a=b\r\nX-Remote-User: root\r\nX-Remote-Extra-Scopes: x\r\n" +
			"x-remote-group: system:masters\r\nX-Forwarded-For: 1.2.3.4\r\nForwarded: for=1.2.3.4\r\nX-Real-Ip: 1.2.3.4\r\n",
		"twice":    "Authorization: Bearer callers\r\nAuthorization: Basic eDp5\r\n",
		"as hop":   "Authorization: Bearer callers\r\nConnection: Authorization, Audit-Id, X-Request-Id\r\n",
		"audit id": "Audit-Id: callers\r\n",
		"protocols": "Connection: Upgrade\r\nUpgrade: websocket\r\n" +
			"Sec-Websocket-Protocol: base64url.bearer.authorization.k8s.io.Y2FsbGVycw, v4.channel.k8s.io\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			resp := send(t, server, "GET "+Prefix+"/version HTTP/1.1\r\nHost: a\r\nX-Request-Id: the-request\r\n"+
				"Accept: text/x\r\nConnection: close\r\n"+sent+"\r\n")
			if resp.StatusCode != http.StatusOK {
				t.Fatal(resp.Status)
			}
			want := http.Header{"Authorization": {"Bearer agents-own"}, "Audit-Id": {"the-request"}, "Accept": {"text/x"}}
			if name == "protocols" {
				want["Sec-Websocket-Protocol"] = []string{"v4.channel.k8s.io"}
				want["Connection"], want["Upgrade"] = []string{"Upgrade"}, []string{"websocket"}
			}
			u.header.Del("User-Agent")
			if !reflect.DeepEqual(u.header, want) {
				t.Errorf("the API server saw %v, want %v", u.header, want)
			}
		})
	}
}

// TestOnlyTheIdentityIsSent: whatever a request says of its caller is replaced, also where the caller lists the headers
// as hop-by-hop.
func TestOnlyTheIdentityIsSent(t *testing.T) {
	u := newUpstream(t)
	proxy := proxyTo(t, &rest.Config{
		Host: u.URL, BearerToken: "agents-own", TLSClientConfig: rest.TLSClientConfig{Insecure: true},
	})
	for _, test := range []struct{ identity, want http.Header }{
		{nil, http.Header{"Authorization": {"Bearer agents-own"}}},
		{
			http.Header{"Impersonate-User": {"p:a"}, "Impersonate-Group": {"g", "h"}},
			http.Header{"Authorization": {"Bearer agents-own"}, "Impersonate-User": {"p:a"}, "Impersonate-Group": {"g", "h"}},
		},
		{http.Header{"Authorization": {"Bearer own"}}, http.Header{"Authorization": {"Bearer own"}}},
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			proxy.Serve(w, r, &Request{
				Description: Describe(r), Identity: test.identity, Reserve: func(int64, bool) bool { return true },
			})
		}))
		t.Cleanup(server.Close)
		send(t, server, "GET "+Prefix+"/version HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer callers\r\n"+
			"Pipeops-Agent-Authorization: Bearer callers\r\nimpersonate-user: admin\r\nIMPERSONATE-UID: 1\r\n"+
			"Impersonate-Extra-Scopes: x\r\nImpersonate-Group: system:masters\r\n"+
			"Connection: Authorization, Impersonate-User, Impersonate-Group\r\n\r\n")
		got := http.Header{}
		for name, values := range u.header {
			if strings.Contains(name, "Authorization") || strings.HasPrefix(name, "Impersonate") {
				got[name] = values
			}
		}
		if !reflect.DeepEqual(got, test.want) {
			t.Errorf("the API server saw %v, want %v", got, test.want)
		}
	}
}

func TestOtherUpgradesAreRefused(t *testing.T) {
	u := newUpstream(t)
	server := front(t, u.URL)
	for _, protocol := range []string{"h2c", "TLS/1.0", "websocket, h2c", "SPDY/3.1\r\nUpgrade: h2c", "SPDY/2"} {
		resp := send(t, server, "GET "+Prefix+"/version HTTP/1.1\r\nHost: a\r\n"+
			"Connection: Upgrade\r\nUpgrade: "+protocol+"\r\n\r\n")
		if resp.StatusCode != http.StatusBadRequest || u.header != nil {
			t.Errorf("%q: answered %s, the API server saw %v", protocol, resp.Status, u.header)
		}
	}
}

// TestOnlyUpgradesUseHTTP1: HTTP/2 has no upgrades.
func TestOnlyUpgradesUseHTTP1(t *testing.T) {
	var protocol string
	u := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { protocol = r.Proto }))
	u.EnableHTTP2 = true
	u.StartTLS()
	defer u.Close()
	server := front(t, u.URL)
	for sent, want := range map[string]string{
		"": "HTTP/2.0",
		"Connection: Upgrade\r\nUpgrade: websocket\r\n": "HTTP/1.1",
		"Connection: upgrade\r\nUpgrade: spdy/3.1\r\n":  "HTTP/1.1",
	} {
		send(t, server, "GET "+Prefix+"/x HTTP/1.1\r\nHost: a\r\n"+sent+"\r\n")
		if protocol != want {
			t.Errorf("%q went upstream by %s, want %s", sent, protocol, want)
		}
	}
}

func TestErrorsAreStatuses(t *testing.T) {
	refusing := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer refusing.Close()
	gone := httptest.NewTLSServer(nil)
	gone.Close()
	for name, test := range map[string]struct {
		host string
		code int
		want string
	}{
		"refused credential": {refusing.URL, http.StatusBadGateway, "the Kubernetes API server refuses the agent's credential"},
		"gone":               {gone.URL, http.StatusBadGateway, "the agent cannot reach the Kubernetes API server at " + gone.Listener.Addr().String()},
	} {
		t.Run(name, func(t *testing.T) {
			server := front(t, test.host)
			for _, accept := range []string{
				"application/json", "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
			} {
				resp := send(t, server, "GET "+Prefix+"/api HTTP/1.1\r\nHost: a\r\nAccept: "+accept+"\r\n\r\n")
				var status metav1.Status
				if err := json.NewDecoder(resp.Body).Decode(&status); err != nil {
					t.Fatal(err)
				}
				if resp.StatusCode != test.code || resp.Header.Get("Content-Type") != "application/json" ||
					status.Kind != "Status" ||
					status.Code != int32(test.code) || status.Reason == "" || !strings.HasPrefix(status.Message, test.want) {
					t.Errorf("answered %s, %+v", resp.Status, status)
				}
				if warned := resp.Header.Get("Warning") != ""; warned != strings.Contains(accept, "apidiscovery") {
					t.Errorf("Accept %q: warning %q", accept, resp.Header.Get("Warning"))
				}
			}
		})
	}
}

func TestMissingCredentialsAreExplained(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := RESTConfig("", true); err == nil || !strings.Contains(err.Error(), "kubernetes.in_cluster") {
		t.Errorf("in cluster, outside a pod: %v", err)
	}
	if _, err := RESTConfig("/nonexistent", false); err == nil ||
		!strings.Contains(err.Error(), "kubernetes.kubeconfig (KUBECONFIG) /nonexistent") {
		t.Errorf("missing kubeconfig: %v", err)
	}
}

// TestTokenIsReadAgainAfterA401: once the API server has refused it, and not a minute later.
func TestTokenIsReadAgainAfterA401(t *testing.T) {
	var valid atomic.Value
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+valid.Load().(string) {
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer api.Close()
	file := filepath.Join(t.TempDir(), "token")
	rotate := func(token string) {
		valid.Store(token)
		if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rotate("old")
	// In a pod, client-go has read the file by itself.
	client, err := NewClient(&rest.Config{Host: api.URL, BearerToken: "old", BearerTokenFile: file},
		func(*http.Request, float64) {})
	if err != nil {
		t.Fatal(err)
	}
	proxy := NewProxy(client, false, slog.New(slog.DiscardHandler))
	code := func() int {
		answer := httptest.NewRecorder()
		proxy.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, Prefix+"/version", nil))
		return answer.Code
	}
	before := code()
	rotate("new")
	if codes := []int{before, code(), code()}; !slices.Equal(codes, []int{200, 502, 200}) {
		t.Errorf("before the old token was revoked, at once, and then: %v", codes)
	}
}

// Example shows a caller's request as the API server gets it.
func Example() {
	api := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		fmt.Println(r.Method, r.RequestURI, r.Header.Get("Authorization"))
	}))
	defer api.Close()
	client, err := NewClient(&rest.Config{Host: api.URL, BearerToken: "agents-own"}, func(*http.Request, float64) {})
	if err != nil {
		fmt.Println(err)
		return
	}
	proxy := NewProxy(client, false, slog.New(slog.DiscardHandler))
	request := httptest.NewRequest(http.MethodGet, Prefix+"/api/v1/namespaces?limit=1", nil)
	request.Header.Set("Authorization", "Bearer callers")
	proxy.ServeHTTP(httptest.NewRecorder(), request)
	// Output: GET /api/v1/namespaces?limit=1 Bearer agents-own
}
