package server

import (
	"errors"
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
)

// recording is a server of the agent, and an API server that records the complete requests.
type recording struct {
	addr string

	mu   sync.Mutex
	seen []string
}

func record(t *testing.T) *recording {
	t.Helper()
	rec := &recording{}
	api := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/refused" {
			http.Error(w, "refused before the body is read", http.StatusForbidden)
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // an incomplete body
		}
		rec.mu.Lock()
		defer rec.mu.Unlock()
		rec.seen = append(rec.seen, r.Method+" "+r.RequestURI+" "+string(body))
	}))
	api.EnableHTTP2 = true
	api.StartTLS()
	t.Cleanup(api.Close)
	quiet := slog.New(slog.DiscardHandler)
	s := serverBefore(t, &rest.Config{Host: api.URL, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}, token, quiet)
	server := httptest.NewUnstartedServer(nil)
	server.Config = newHTTPServer(t.Context(), tunnel, s.handler(tunnel), quiet)
	server.Start()
	t.Cleanup(server.Close)
	rec.addr = server.Listener.Addr().String()
	return rec
}

// send writes a request, closes its side if half, and returns all answers, and the requests that the API server has
// seen.
func (rec *recording) send(t *testing.T, request string, half bool) (answers string, seen []string) {
	t.Helper()
	rec.mu.Lock()
	rec.seen = nil
	rec.mu.Unlock()
	conn, err := net.Dial("tcp", rec.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	go func() { // the server may answer before it has read all
		_, _ = io.WriteString(conn, request)
		if half {
			_ = conn.(*net.TCPConn).CloseWrite()
		}
	}()
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	data, err := io.ReadAll(conn) // a reset after a refusal is as good as an end
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("the connection stays open after %q", data)
	}
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return string(data), rec.seen
}

const auth = "Authorization: Bearer " + token + "\r\n"

// TestHiddenRequestsAreNotSmuggled sends requests whose end two servers could see in different places, with a second
// request hidden in them. The API server must see what the agent has seen, and the hidden one only where it is a
// request of its own, which needs a token as any other.
func TestHiddenRequestsAreNotSmuggled(t *testing.T) {
	rec := record(t)
	const hidden = "GET /api/k8s/hidden HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" // without a token
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
			// The server closes after the hidden request, or after the one that it has refused.
			answers, seen := rec.send(t, test.request, false)
			if !slices.Equal(seen, test.want) {
				t.Errorf("the API server saw %q, want %q; answers:\n%s", seen, test.want, answers)
			}
			if strings.Count(answers, "HTTP/1.1 200") > len(test.want) {
				t.Errorf("the hidden request was answered:\n%s", answers)
			}
		})
	}
}

// TestIncompleteBodyIsNotForwarded: a caller that closes before the end of its body has sent no request.
func TestIncompleteBodyIsNotForwarded(t *testing.T) {
	rec := record(t)
	for name, rest := range map[string]string{
		"length":           "Content-Length: 10\r\n\r\n12345",
		"chunk":            "Transfer-Encoding: chunked\r\n\r\na\r\n12345",
		"no last chunk":    "Transfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n",
		"no end":           "Transfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n0\r\n",
		"expects to go on": "Expect: 100-continue\r\nContent-Length: 10\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			answers, seen := rec.send(t, "POST /api/k8s/x HTTP/1.1\r\nHost: a\r\n"+auth+rest, true)
			if len(seen) > 0 || strings.Contains(answers, "HTTP/1.1 2") {
				t.Errorf("the API server saw %q; answers:\n%s", seen, answers)
			}
		})
	}
}

// TestEarlyRefusalIsForwarded: the API server may refuse before it has read the body; the caller need not send the
// rest.
func TestEarlyRefusalIsForwarded(t *testing.T) {
	rec := record(t)
	request := "POST /api/k8s/refused HTTP/1.1\r\nHost: a\r\n" + auth + "Content-Length: 1000000000\r\n\r\nabc"
	answers, _ := rec.send(t, request, false)
	if !strings.HasPrefix(answers, "HTTP/1.1 403 ") || !strings.Contains(answers, "refused before") {
		t.Errorf("answered %q", answers)
	}
}

// TestRefusalReachesACallerThatStillSends: a caller that sends a large body gets the answer, not a reset connection.
func TestRefusalReachesACallerThatStillSends(t *testing.T) {
	rec := record(t)
	for path, want := range map[string]int{
		"/api/control-plane/message": http.StatusRequestEntityTooLarge, "/api/k8s/refused": http.StatusForbidden,
		"/nowhere": http.StatusNotFound,
	} {
		for range 50 {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+rec.addr+path,
				strings.NewReader(strings.Repeat("x", 1<<20)))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Authorization", "Bearer "+token)
			req.Header.Set("Content-Type", "application/json")
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			if _, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != want {
				t.Errorf("%s: answered %s, %v", path, resp.Status, err)
			}
			_ = resp.Body.Close()
		}
	}
}

// TestTooLargeHeadersGet431: the target counts too, and all is counted as HTTP/2 does.
func TestTooLargeHeadersGet431(t *testing.T) {
	rec := record(t)
	for name, test := range map[string]struct{ path, headers, want string }{
		"header":                              {"/x", "X-A: " + strings.Repeat("a", 2<<20) + "\r\n", "431 Request Header Fields Too Large"},
		"many headers":                        {"/x", strings.Repeat("A: b\r\n", 60_000), "431 Request Header Fields Too Large"},
		"path":                                {"/" + strings.Repeat("a", 2<<20), "", "431 Request Header Fields Too Large"},
		"query":                               {"/x?" + strings.Repeat("a", 2<<20), "", "431 Request Header Fields Too Large"},
		"long path, said by the agent itself": {"/" + strings.Repeat("a", 128<<10-1000), "", "431 Request Header Fields Too Large"},
		"an exec with a long command, of a member of many groups": {
			"/x?command=" + strings.Repeat("a", 60<<10),
			strings.Repeat("X-Group: oidc:department-of-redundancy\r\n", 200), "200 OK",
		},
	} {
		t.Run(name, func(t *testing.T) {
			answers, seen := rec.send(t, "GET /api/k8s"+test.path+" HTTP/1.1\r\nHost: a\r\n"+auth+test.headers+
				"Connection: close\r\n\r\n", false)
			if status, _, _ := strings.Cut(answers, "\r\n"); status != "HTTP/1.1 "+test.want ||
				(len(seen) > 0) != (test.want == "200 OK") {
				t.Errorf("answered %q; the API server saw %d requests", status, len(seen))
			}
		})
	}
}
