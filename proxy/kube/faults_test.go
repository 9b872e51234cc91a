package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// before is a proxy to an API server that is handler.
func before(t *testing.T, handler http.HandlerFunc) *Proxy {
	t.Helper()
	api := httptest.NewServer(handler)
	t.Cleanup(api.Close)
	return proxyTo(t, &rest.Config{Host: api.URL})
}

// TestShutdownIsNotSuccess: a caller whose request is cut must not take that for an answer.
func TestShutdownIsNotSuccess(t *testing.T) {
	arrived := make(chan struct{})
	proxy := before(t, func(_ http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-r.Context().Done()
	})
	ctx, cut := context.WithCancelCause(t.Context())
	go func() {
		<-arrived
		cut(ErrShutdown)
	}()
	w := httptest.NewRecorder()
	proxy.ServeHTTP(w, httptest.NewRequest(http.MethodDelete, Prefix+"/api/v1/namespaces/a/configmaps/c", nil).WithContext(ctx))
	var status metav1.Status
	if err := json.Unmarshal(w.Body.Bytes(), &status); err != nil || w.Code != http.StatusGatewayTimeout || w.Header().Get("Retry-After") != "" ||
		!strings.Contains(status.Message, "the agent has stopped before") {
		t.Errorf("answered %d %v %s", w.Code, w.Header(), w.Body)
	}
}

// TestCallerWhoLeavesGetsNoAnswer: a return would answer 200 to whoever still reads.
func TestCallerWhoLeavesGetsNoAnswer(t *testing.T) {
	arrived := make(chan struct{})
	proxy := before(t, func(_ http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-r.Context().Done()
	})
	ctx, leave := context.WithCancel(t.Context())
	go func() {
		<-arrived
		leave()
	}()
	defer func() {
		if err, _ := recover().(error); !errors.Is(err, http.ErrAbortHandler) {
			t.Errorf("panicked with %v, want http.ErrAbortHandler", err)
		}
	}()
	proxy.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, Prefix+"/version", nil).WithContext(ctx))
	t.Error("it answered")
}

// TestAnothersRefusalGoesThrough: below a subresource the 401 may be a backend's, with a challenge of its own.
func TestAnothersRefusalGoesThrough(t *testing.T) {
	proxy := before(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("WWW-Authenticate", "Basic")
		w.WriteHeader(http.StatusUnauthorized)
	})
	for target, want := range map[string]int{
		"/api/v1/namespaces/a/services/s/proxy/": http.StatusUnauthorized, "/api/v1/namespaces/a/pods/p/log": http.StatusUnauthorized,
		"/api/v1/namespaces/a/pods/p": http.StatusBadGateway, "/version": http.StatusBadGateway,
	} {
		w := httptest.NewRecorder()
		proxy.ServeHTTP(w, httptest.NewRequest(http.MethodGet, Prefix+target, nil))
		if w.Code != want || (w.Header().Get("WWW-Authenticate") != "") != (want == http.StatusUnauthorized) {
			t.Errorf("%s: answered %d %v", target, w.Code, w.Header())
		}
	}
}

func TestBrokenBodyIsTheCallersFault(t *testing.T) {
	proxy := before(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	server := httptest.NewServer(proxy)
	defer server.Close()
	resp := send(t, server, "POST "+Prefix+"/api/v1/namespaces HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusBadRequest || !strings.Contains(string(body), "the body of the request cannot be read") {
		t.Errorf("answered %s: %s", resp.Status, body)
	}
}

func TestBrokenAnswerIsNotUnreachable(t *testing.T) {
	proxy := before(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	w := httptest.NewRecorder()
	proxy.ServeHTTP(w, httptest.NewRequest(http.MethodPost, Prefix+"/api/v1/namespaces", nil))
	if w.Code != http.StatusBadGateway || !strings.Contains(w.Body.String(), "broke off before it answered") {
		t.Errorf("answered %d: %s", w.Code, w.Body)
	}
}

// TestBodiesAreNotTouched: Go would ask for gzip and unpack it, where client-go hands out its default transport.
func TestBodiesAreNotTouched(t *testing.T) {
	var asked []string
	proxy := before(t, func(w http.ResponseWriter, r *http.Request) {
		asked = r.Header["Accept-Encoding"]
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = io.WriteString(w, "not unpacked")
	})
	w := httptest.NewRecorder()
	proxy.ServeHTTP(w, httptest.NewRequest(http.MethodGet, Prefix+"/version", nil))
	if asked != nil || w.Body.String() != "not unpacked" || w.Header().Get("Content-Encoding") != "gzip" {
		t.Errorf("the API server was asked for %q; the caller got %v %q", asked, w.Header(), w.Body)
	}
}

// TestEmptyKubeconfigIsNoServiceAccount: whoever names a file must not get another credential.
func TestEmptyKubeconfigIsNoServiceAccount(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "443")
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, kubeconfig := range []string{empty, "/none1:/none2"} {
		if config, err := RESTConfig(kubeconfig, false); err == nil || !strings.Contains(err.Error(), "kubernetes.kubeconfig") {
			t.Errorf("%s: got %v, %v", kubeconfig, config, err)
		}
	}
}

// TestTurnedAway: an API server that closes a connection in order (GOAWAY) has not looked at the requests that it
// turns away. They are sent again, with their bodies.
func TestTurnedAway(t *testing.T) {
	api := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if rand.IntN(20) == 0 { // as kube-apiserver does with --goaway-chance
			w.Header().Set("Connection", "close")
		}
		_, _ = w.Write(body)
	}))
	api.EnableHTTP2 = true
	api.StartTLS()
	defer api.Close()
	server := front(t, api.URL)
	var group sync.WaitGroup
	for i := range 20 {
		group.Go(func() {
			for j := range 100 {
				want := fmt.Sprintf("body %d of %d", j, i)
				resp, err := http.Post(server.URL+Prefix+"/api/v1/pods", "text/plain", strings.NewReader(want))
				if err != nil {
					t.Error(err)
					return
				}
				body, err := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				if err != nil || resp.StatusCode != http.StatusOK || string(body) != want {
					t.Errorf("%s %v: %s", resp.Status, err, body)
				}
			}
		})
	}
	group.Wait()
}

// TestThrottlingGoesThrough: the API server's 429 is the caller's to wait for. It is neither retried here nor
// changed.
func TestThrottlingGoesThrough(t *testing.T) {
	var calls atomic.Int32
	proxy := before(t, func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		w.Header().Set("Retry-After", "7")
		w.Header().Set("X-Kubernetes-PF-FlowSchema-UID", "u")
		w.WriteHeader(http.StatusTooManyRequests)
		_, _ = io.WriteString(w, "slow down")
	})
	w := httptest.NewRecorder()
	proxy.ServeHTTP(w, httptest.NewRequest(http.MethodGet, Prefix+"/api/v1/pods", nil))
	if w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") != "7" || w.Header().Get("X-Kubernetes-Pf-Flowschema-Uid") != "u" ||
		w.Body.String() != "slow down" || calls.Load() != 1 {
		t.Errorf("after %d calls answered %d %v %s", calls.Load(), w.Code, w.Header(), w.Body)
	}
}

// TestEarlyAnswersAndTrailersGoThrough: 1xx before the answer, trailers behind it, and a body that the caller
// sends only when told to continue.
func TestEarlyAnswersAndTrailersGoThrough(t *testing.T) {
	proxy := before(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</early>")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Set("Trailer", "X-Sum")
		body, _ := io.ReadAll(r.Body)
		_, _ = w.Write(body)
		w.Header().Set("X-Sum", "42")
	})
	server := httptest.NewServer(proxy)
	defer server.Close()
	var early []int
	trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
		early = append(early, code)
		return nil
	}}
	req, err := http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), trace), http.MethodPost, server.URL+Prefix+"/api/v1/pods", strings.NewReader("the body"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Expect", "100-continue")
	client := &http.Client{Transport: &http.Transport{ExpectContinueTimeout: time.Minute}} // without a 100 it would wait
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "the body" || resp.Trailer.Get("X-Sum") != "42" || !slices.Contains(early, http.StatusEarlyHints) {
		t.Errorf("%s %q, %v; trailers %v; 1xx %v", resp.Status, body, err, resp.Trailer, early)
	}
}

// TestWatchesBeforeAnHTTP1Server: those that begin before it is known that nothing can be shared all get their answers.
func TestWatchesBeforeAnHTTP1Server(t *testing.T) {
	api := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}))
	api.StartTLS()
	t.Cleanup(func() {
		api.CloseClientConnections()
		api.Close()
	})
	server := front(t, api.URL)
	var group sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	for range 20 {
		group.Go(func() {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL+Prefix+"/api/v1/pods?watch=true", nil)
			if err != nil {
				t.Error(err)
				return
			}
			resp, err := (&http.Client{Transport: &http.Transport{}}).Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { _ = resp.Body.Close() })
		})
	}
	group.Wait()
	cancel()
}
