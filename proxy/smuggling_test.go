package main

import (
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// TestSmugglingShapes sends requests whose end two servers could see in different places, with a second
// request hidden in them. The API server must see what the agent has seen, and the hidden one only where it
// really is a request of its own, which then needs a token like any other.
func TestSmugglingShapes(t *testing.T) {
	var mu sync.Mutex
	var seen []string
	api := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // broken off: the caller's body was not one
		}
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, r.Method+" "+r.RequestURI+" "+string(body))
	}))
	defer api.Close()
	m := newMetrics()
	proxy, err := kube.New(&rest.Config{Host: api.URL}, m.latency, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	cfg := &config.Config{RunDir: t.TempDir()}
	cfg.Agent.ID, cfg.Agent.Token = "agent-001", token
	server := httptest.NewServer(newServer(cfg, proxy, m, slog.New(slog.DiscardHandler)).handler(tunnel))
	defer server.Close()

	const (
		auth   = "Authorization: Bearer " + token + "\r\n"
		hidden = "GET /api/k8s/hidden HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" // without a token
	)
	for name, test := range map[string]struct {
		request string
		want    []string // at the API server
	}{
		"length and chunks":        {"POST /api/k8s/x HTTP/1.1\r\nHost: a\r\n" + auth + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden, []string{"POST /x "}},
		"two lengths":              {"POST /api/k8s/x HTTP/1.1\r\nHost: a\r\n" + auth + "Content-Length: 0\r\nContent-Length: 60\r\n\r\n" + hidden, nil},
		"length in a list":         {"POST /api/k8s/x HTTP/1.1\r\nHost: a\r\n" + auth + "Content-Length: 0, 60\r\n\r\n" + hidden, nil},
		"signed length":            {"POST /api/k8s/x HTTP/1.1\r\nHost: a\r\n" + auth + "Content-Length: +60\r\n\r\n" + hidden, nil},
		"unknown encoding":         {"POST /api/k8s/x HTTP/1.1\r\nHost: a\r\n" + auth + "Transfer-Encoding: xchunked\r\n\r\n" + hidden, nil},
		"encodings":                {"POST /api/k8s/x HTTP/1.1\r\nHost: a\r\n" + auth + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + hidden, nil},
		"space before the colon":   {"POST /api/k8s/x HTTP/1.1\r\nHost: a\r\n" + auth + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + hidden, nil},
		"bare LF in chunks":        {"POST /api/k8s/x HTTP/1.1\r\nHost: a\r\n" + auth + "Transfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n" + hidden, nil},
		"extension with a bare LF": {"POST /api/k8s/x HTTP/1.1\r\nHost: a\r\n" + auth + "Transfer-Encoding: chunked\r\n\r\n1;a\nb\r\na\r\n0\r\n\r\n" + hidden, nil},
		"chunk extension":          {"POST /api/k8s/x HTTP/1.1\r\nHost: a\r\n" + auth + "Transfer-Encoding: chunked\r\n\r\n1;a=b\r\na\r\n0\r\n\r\n" + hidden, []string{"POST /x a"}},
		"two hosts":                {"GET /api/k8s/x HTTP/1.1\r\nHost: a\r\nHost: b\r\n" + auth + "\r\n" + hidden, nil},
		"folded header":            {"GET /api/k8s/x HTTP/1.1\r\nHost: a\r\n" + auth + "X-A: b\r\n c: d\r\n\r\n" + hidden, []string{"GET /x "}},
		"after a refused upgrade":  {"GET /api/k8s/x HTTP/1.1\r\nHost: a\r\n" + auth + "Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + hidden, nil},
		"after a failed upgrade":   {"GET /api/k8s/x HTTP/1.1\r\nHost: a\r\n" + auth + "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + hidden, []string{"GET /x "}},
	} {
		t.Run(name, func(t *testing.T) {
			mu.Lock()
			seen = nil
			mu.Unlock()
			conn, err := net.Dial("tcp", server.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			if _, err := io.WriteString(conn, test.request); err != nil {
				t.Fatal(err)
			}
			// The server closes after the hidden request, or after what it has refused.
			_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
			answers, _ := io.ReadAll(conn) // a reset after a refusal is as good as an end
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(seen, test.want) {
				t.Errorf("the API server saw %q, want %q; answers:\n%s", seen, test.want, answers)
			}
			if strings.Count(string(answers), "HTTP/1.1 200") > len(test.want) {
				t.Errorf("the hidden request was answered:\n%s", answers)
			}
		})
	}
}
