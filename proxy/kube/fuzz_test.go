package kube

import (
	"bufio"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"

	"k8s.io/client-go/rest"
)

// capture is a transport that records the request that would be sent.
type capture struct{ sent *http.Request }

func (c *capture) RoundTrip(r *http.Request) (*http.Response, error) {
	c.sent = r
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: http.NoBody, Request: r}, nil
}

// FuzzRequest: any request that net/http accepts is refused, or forwarded with the agent's credential and no other, and
// with the caller's path and query byte for byte. The corpus is in testdata/fuzz.
func FuzzRequest(f *testing.F) {
	for _, seed := range []string{
		"GET /api/k8s/api/v1/pods HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer callers\r\nImpersonate-User: x\r\n\r\n",
		"GET /api/k8s/a/%2e%2E/b HTTP/1.1\r\nHost: a\r\nConnection: Authorization, upgrade\r\nUpgrade: h2c\r\n\r\n",
		"GET /api/k8s//x%2Fy?a=b;c&%zz HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: WebSocket\r\n" +
			"Sec-WebSocket-Protocol: a, base64url.bearer.authorization.k8s.io.YQ\r\n\r\n",
		"POST http://h/api/k8s/a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n" +
			"X-Remote-User: x\r\nCookie: a=b\r\n\r\n0\r\n\r\n",
		"CONNECT /api/k8s/a HTTP/1.1\r\nHost: a\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET /api/k8s/api/v1/nodes/n/proxy/exec HTTP/1.1\r\nHost: a\r\nX-Request-Id: callers\r\nAudit-Id: callers\r\n\r\n",
	} {
		f.Add(seed)
	}
	upstream := &capture{}
	config := &rest.Config{Host: "https://api.internal", BearerToken: "agents-own"}
	proxy := proxyTo(f, config)
	captured, err := rest.HTTPWrappersForConfig(config, upstream)
	if err != nil {
		f.Fatal(err)
	}
	proxy.Client.http1, proxy.Client.http2 = captured, captured
	f.Fuzz(func(t *testing.T, text string) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text)))
		if err != nil {
			return
		}
		raw, query, hasQuery := strings.Cut(r.RequestURI, "?")
		if raw != Prefix && !strings.HasPrefix(raw, Prefix+"/") && strings.HasPrefix(raw, "/") {
			return // another route's
		}
		r.Header.Set("X-Request-Id", "ours") // as the server does
		upstream.sent = nil
		answer := httptest.NewRecorder()
		proxy.ServeHTTP(answer, r)
		sent := upstream.sent
		if sent == nil {
			if answer.Code != http.StatusBadRequest && answer.Code != http.StatusForbidden &&
				answer.Code != http.StatusMethodNotAllowed {
				t.Fatalf("not sent, and answered %d", answer.Code)
			}
			return
		}
		want := strings.TrimPrefix(raw, Prefix)
		if want == "" {
			want = "/"
		}
		if hasQuery && query != "" {
			want += "?" + query
		}
		if got := strings.TrimSuffix(sent.URL.RequestURI(), "?"); got != want || sent.URL.Host != "api.internal" ||
			sent.Host != "" && sent.Host != "api.internal" {
			t.Errorf("sent to %s (host %q): %q, want %q", sent.URL.Host, sent.Host, got, want)
		}
		if got := sent.Header["Authorization"]; !reflect.DeepEqual(got, []string{"Bearer agents-own"}) {
			t.Errorf("sent with Authorization %q", got)
		}
		if got := sent.Header["Audit-Id"]; !reflect.DeepEqual(got, []string{"ours"}) {
			t.Errorf("sent with Audit-Id %q", got)
		}
		for name, values := range sent.Header {
			lower := strings.ToLower(name)
			if strings.HasPrefix(lower, "impersonate-") || strings.HasPrefix(lower, "x-remote-") || lower == "cookie" ||
				strings.HasPrefix(lower, "x-forwarded-") ||
				strings.Contains(strings.ToLower(strings.Join(values, ",")), "base64url.bearer.authorization.k8s.io.") &&
					lower == "sec-websocket-protocol" {
				t.Errorf("sent with %s: %q", name, values)
			}
		}
		if got := strings.ToLower(strings.Join(sent.Header["Upgrade"], ",")); got != "" && got != "websocket" &&
			got != "spdy/3.1" {
			t.Errorf("sent with Upgrade %q", got)
		}
		for segment := range strings.SplitSeq(sent.URL.Path, "/") {
			if segment == "." || segment == ".." {
				t.Errorf("sent with a dot segment: %q", sent.URL.Path)
			}
		}
	})
}
