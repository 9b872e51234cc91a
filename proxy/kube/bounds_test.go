package kube

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
)

// TestPathsOfTheAPIServersHostAreForbidden: and those that make credentials or pass RBAC by.
func TestPathsOfTheAPIServersHostAreForbidden(t *testing.T) {
	for path, refused := range map[string]bool{
		"/metrics": true, "/metrics/slis": true, "/debug/pprof/heap": true, "/logs/": true, "/flagz": true, "/statusz": true,
		"//flagz": true, "/flagz//": true, "/api/v1/nodes/n/proxy": true, "/api/v1/nodes/n/proxy/run/a/b/c": true,
		"/api//v1/nodes/n/proxy": true, "/api/v1/namespaces/a/serviceaccounts/s/token": true,

		"": false, "/api": false, "/version": false, "/openapi/v3": false, "/readyz": false, "/apis/metrics.k8s.io/v1beta1": false,
		"/api/v1/nodes/n": false, "/api/v1/namespaces/a/serviceaccounts/s": false, "/api/v1/namespaces/a/secrets/token": false,
		"/apis/a.example/v1/nodes/n/proxy": false, "/api/v1/namespaces/a/services/s/proxy/metrics": false,
	} {
		if why := forbidden(path); (why != "") != refused {
			t.Errorf("%s: %q", path, why)
		}
	}
}

// TestHeadersOf112KiBAreForwarded: as HTTP/2 counts them, with the target.
func TestHeadersOf112KiBAreForwarded(t *testing.T) {
	for _, target := range []string{Prefix + "/version", Prefix + "/version?" + strings.Repeat("a", 60<<10)} {
		for more, want := range map[int]int{0: 0, 1: http.StatusRequestHeaderFieldsTooLarge} {
			r := httptest.NewRequest(http.MethodGet, target, nil)
			r.Header.Set("A", strings.Repeat("a", 112<<10-len(target)-1-32+more))
			if code, why := admit(r); code != want {
				t.Errorf("%d bytes more than 112 KiB: %d %s", more, code, why)
			}
		}
	}
}

// TestOnlyReadsAreSentTwice: a write may have taken effect before its connection died.
func TestOnlyReadsAreSentTwice(t *testing.T) {
	died := []error{syscall.ECONNRESET, io.EOF, errors.New("http2: client connection lost")}
	for method, again := range map[string]bool{
		"GET": true, "HEAD": true, "POST": false, "PUT": false, "PATCH": false, "DELETE": false,
	} {
		r := httptest.NewRequest(method, "/", nil)
		r.Body = nil
		for _, err := range died {
			if isRetryable(r, err) != again {
				t.Errorf("%s after %v is sent again: %v", method, err, !again)
			}
		}
		if isRetryable(r, errors.New("refused")) {
			t.Errorf("%s is sent again whatever failed", method)
		}
	}
	upgrade := httptest.NewRequest(http.MethodGet, "/", nil)
	withBody := httptest.NewRequest(http.MethodGet, "/", strings.NewReader("x"))
	upgrade.Body = nil
	upgrade.Header.Set("Upgrade", "websocket")
	ended, end := context.WithCancel(t.Context())
	end()
	left := httptest.NewRequest(http.MethodGet, "/", nil).WithContext(ended)
	left.Body = nil
	for what, r := range map[string]*http.Request{"an upgrade": upgrade, "a body": withBody, "after its caller": left} {
		if isRetryable(r, syscall.ECONNRESET) {
			t.Errorf("%s is sent again", what)
		}
	}
}

// TestTransportsHaveTheirBounds: of what is held for a caller who does not read, and of connections.
func TestTransportsHaveTheirBounds(t *testing.T) {
	client, err := NewClient(&rest.Config{Host: "https://api.example"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	inner := func(transport http.RoundTripper) *http.Transport {
		for w, ok := transport.(utilnet.RoundTripperWrapper); ok; w, ok = transport.(utilnet.RoundTripperWrapper) {
			transport = w.WrappedRoundTripper()
		}
		return transport.(*http.Transport)
	}
	for name, wrapped := range map[string]http.RoundTripper{"HTTP/2": client.http2, "HTTP/1.1": client.http1} {
		transport := inner(wrapped)
		if transport.HTTP2.MaxReceiveBufferPerStream != 64<<10 || transport.MaxResponseHeaderBytes != 64<<10 ||
			!transport.DisableCompression {
			t.Errorf("%s: %+v", name, transport)
		}
	}
	if n := inner(client.http2).MaxConnsPerHost; n != 3 {
		t.Errorf("%d connections of HTTP/2 are made at a time", n)
	}
	if d := inner(client.http1).ResponseHeaderTimeout; d != 75*time.Second {
		t.Errorf("a silent API server is waited for %s", d)
	}
}

// roundTripper is a function as a RoundTripper.
type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestBodiesUpTo256KiBAreKept: and as much of any over HTTP/2 counts as memory.
func TestBodiesUpTo256KiBAreKept(t *testing.T) {
	type reservation struct {
		bytes    int64
		optional bool
	}
	for _, test := range []struct {
		major, length int
		unknown       bool // how long the body is
		want          []reservation
	}{
		{1, 256 << 10, false, []reservation{{256 << 10, true}}},
		{1, 256<<10 + 1, false, nil},
		{2, 256<<10 + 1, false, []reservation{{256 << 10, false}}},
		{2, 1 << 20, true, []reservation{{256 << 10, false}}},
	} {
		client := &Client{
			target: httptest.NewRequest(http.MethodGet, "http://api.example", nil).URL, latency: func(*http.Request, float64) {},
		}
		client.major.Store(1)
		client.http1 = roundTripper(func(r *http.Request) (*http.Response, error) {
			_, err := io.Copy(io.Discard, r.Body)
			return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, err
		})
		r := httptest.NewRequest(http.MethodPost, Prefix+"/api/v1/pods", io.LimitReader(endless{}, int64(test.length)))
		r.ProtoMajor, r.ContentLength = test.major, int64(test.length)
		if test.unknown {
			r.ContentLength = -1
		}
		w := httptest.NewRecorder()
		var got []reservation
		req := &Request{Description: Describe(r), Body: NewBody(w, r.Body, func(float64) {})}
		r.Body = req.Body
		req.Reserve = func(bytes int64, optional bool) bool {
			got = append(got, reservation{bytes, optional})
			return true
		}
		NewProxy(client, false, slog.New(slog.DiscardHandler)).Serve(w, r, req)
		if len(got) > 0 && got[len(got)-1].bytes < 1000 { // the answer's headers
			got = got[:len(got)-1]
		}
		if w.Code != http.StatusOK || len(got) != len(test.want) || len(got) > 0 && got[0] != test.want[0] {
			t.Errorf("%+v: answered %d, reserved %v", test, w.Code, got)
		}
	}
}

// endless is a body without an end.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestHeadersOfAnswersNeedMemory: without it there is no answer.
func TestHeadersOfAnswersNeedMemory(t *testing.T) {
	u := newUpstream(t)
	proxy := proxyTo(t, &rest.Config{Host: u.URL, TLSClientConfig: rest.TLSClientConfig{Insecure: true}})
	r := httptest.NewRequest(http.MethodGet, Prefix+"/api/v1/pods?watch=1", nil)
	w := httptest.NewRecorder()
	proxy.Serve(w, r, &Request{Description: Describe(r), Reserve: func(int64, bool) bool { return false }})
	if w.Code != http.StatusBadGateway || !strings.Contains(w.Body.String(), "too large while so many requests") {
		t.Errorf("answered %d %s", w.Code, w.Body)
	}
	if got := u.header.Get("Accept-Encoding"); got != "identity" {
		t.Errorf("a watch may be compressed: %q", got)
	}
}

// TestHangingPluginHoldsFewRequests: each waits for 30 s, and 32 whose callers have gone.
func TestHangingPluginHoldsFewRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hangs := make(chan struct{})
		client := &Client{noCredential: errPlugin}
		client.major.Store(1)
		client.http1 = roundTripper(func(*http.Request) (*http.Response, error) {
			<-hangs
			return nil, errPlugin
		})
		begin := time.Now()
		if _, err := client.sendWithPlugin(httptest.NewRequest(http.MethodGet, "/", nil)); !errors.Is(err, errPlugin) ||
			time.Since(begin) != 30*time.Second {
			t.Errorf("after %s: %v", time.Since(begin), err)
		}
		for range 31 { // one waits already
			ctx, leave := context.WithTimeout(t.Context(), time.Second)
			if _, err := client.sendWithPlugin(httptest.NewRequest(http.MethodGet, "/", nil).WithContext(ctx)); err == nil {
				t.Error("answered")
			}
			leave()
		}
		begin = time.Now()
		if _, err := client.sendWithPlugin(httptest.NewRequest(http.MethodGet, "/", nil)); !errors.Is(err, errPlugin) ||
			time.Since(begin) > 0 {
			t.Errorf("beside 32 that wait: after %s: %v", time.Since(begin), err)
		}
		close(hangs)
	})
}

// deadlines is a ResponseWriter that records the deadlines for reading.
type deadlines struct {
	http.ResponseWriter

	set []time.Duration // from now
}

func (d *deadlines) SetReadDeadline(at time.Time) error {
	d.set = append(d.set, time.Until(at))
	return nil
}

// TestBodiesHaveTheirTimes: a small one 32 s in all, and any other a minute between two parts.
func TestBodiesHaveTheirTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &deadlines{ResponseWriter: httptest.NewRecorder()}
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader("small"))
		if err := NewBody(w, r.Body, func(float64) {}).keep(r); err != nil || w.set[0] != 32*time.Second {
			t.Errorf("small: %v, %v", w.set, err)
		}
		w.set = nil
		body := NewBody(w, io.NopCloser(endless{}), func(float64) {})
		body.stream(w, r)
		for range 2 {
			time.Sleep(50 * time.Second)
			_, _ = body.Read(make([]byte, 10))
		}
		if len(w.set) != 2 || w.set[0] != time.Minute || w.set[1] != time.Minute {
			t.Errorf("large: %v", w.set)
		}
	})
}

// TestTheRestOfABodyIsNoRequest: where it cannot be read to its end, the connection closes.
func TestTheRestOfABodyIsNoRequest(t *testing.T) {
	for connection, aborts := range map[string]bool{"": true, "close": false} {
		aborted := func() (aborted bool) {
			defer func() { aborted = recover() == http.ErrAbortHandler }() //nolint:errorlint // a panic's value
			body := NewBody(httptest.NewRecorder(), unclosable{endless{}}, func(float64) {})
			body.afterAnswer(http.Header{"Connection": {connection}})
			return false
		}()
		if aborted != aborts {
			t.Errorf("Connection: %q: aborted %v", connection, aborted)
		}
	}
}

// unclosable is a body of which more comes than net/http reads to its end.
type unclosable struct{ io.Reader }

func (unclosable) Close() error { return errors.New("too much is left") }

// TestLateBodyIsNotACallerWhoHasGone: the request's context ends a moment before the read does.
func TestLateBodyIsNotACallerWhoHasGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, err := range []error{os.ErrDeadlineExceeded, io.ErrUnexpectedEOF} {
			body := NewBody(httptest.NewRecorder(), http.NoBody, func(float64) {})
			time.AfterFunc(50*time.Millisecond, func() { body.end(err) })
			if late := body.late(); late != errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%v: late %v", err, late)
			}
		}
	})
}

// TestConnectionsThatBreakAreNotCalledUnreachable: only where nothing was sent is it safe to try again.
func TestConnectionsThatBreakAreNotCalledUnreachable(t *testing.T) {
	for operation, want := range map[string]string{
		"dial": "the agent cannot reach", "read": "check whether the request took effect", "write": "check whether the request",
	} {
		code, message := explain("api.example", &net.OpError{Op: operation, Err: syscall.ECONNRESET})
		if code != http.StatusBadGateway || !strings.Contains(message, want) {
			t.Errorf("%s: %d %s", operation, code, message)
		}
	}
}
