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

// before returns a proxy to an API server that answers with handler.
func before(t *testing.T, handler http.HandlerFunc) *Proxy {
	t.Helper()
	api := httptest.NewServer(handler)
	t.Cleanup(api.Close)
	return proxyTo(t, &rest.Config{Host: api.URL})
}

// TestShutdownIsNotSuccess: a caller whose request is cut must not take that for success.
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
	r := httptest.NewRequest(http.MethodDelete, Prefix+"/api/v1/namespaces/a/configmaps/c", nil)
	proxy.ServeHTTP(w, r.WithContext(ctx))
	var status metav1.Status
	if err := json.Unmarshal(w.Body.Bytes(), &status); err != nil || w.Code != http.StatusGatewayTimeout ||
		w.Header().Get("Retry-After") != "" ||
		!strings.Contains(status.Message, "the agent has stopped before") {
		t.Errorf("answered %d %v %s", w.Code, w.Header(), w.Body)
	}
}

// TestCallerWhoLeavesGetsNoAnswer: to return would answer 200.
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

// TestBackend401IsForwarded: below a subresource the 401 may be a backend's, with its own challenge.
func TestBackend401IsForwarded(t *testing.T) {
	proxy := before(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("WWW-Authenticate", "Basic")
		w.WriteHeader(http.StatusUnauthorized)
	})
	for target, want := range map[string]int{
		"/api/v1/namespaces/a/services/s/proxy/": http.StatusUnauthorized,
		"/api/v1/namespaces/a/pods/p/log":        http.StatusUnauthorized,
		"/api/v1/namespaces/a/pods/p":            http.StatusBadGateway, "/version": http.StatusBadGateway,
	} {
		w := httptest.NewRecorder()
		proxy.ServeHTTP(w, httptest.NewRequest(http.MethodGet, Prefix+target, nil))
		if w.Code != want || (w.Header().Get("WWW-Authenticate") != "") != (want == http.StatusUnauthorized) {
			t.Errorf("%s: answered %d %v", target, w.Code, w.Header())
		}
	}
}

func TestBrokenBodyGets400(t *testing.T) {
	proxy := before(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	server := httptest.NewServer(proxy)
	defer server.Close()
	resp := send(t, server, "POST "+Prefix+"/api/v1/namespaces HTTP/1.1\r\nHost: a\r\n"+
		"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusBadRequest ||
		!strings.Contains(string(body), "the body of the request cannot be read") {
		t.Errorf("answered %s: %s", resp.Status, body)
	}
}

func TestBrokenAnswerIsNotReportedAsUnreachable(t *testing.T) {
	proxy := before(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	w := httptest.NewRecorder()
	proxy.ServeHTTP(w, httptest.NewRequest(http.MethodPost, Prefix+"/api/v1/namespaces", nil))
	if w.Code != http.StatusBadGateway || !strings.Contains(w.Body.String(), "broke off before it answered") {
		t.Errorf("answered %d: %s", w.Code, w.Body)
	}
}

// TestBodiesAreNotDecompressed: Go's default transport would request gzip and unpack it.
func TestBodiesAreNotDecompressed(t *testing.T) {
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

// TestEmptyKubeconfigDoesNotFallBackToTheServiceAccount: a configured file must not yield another credential.
func TestEmptyKubeconfigDoesNotFallBackToTheServiceAccount(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "443")
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, kubeconfig := range []string{empty, "/none1:/none2"} {
		if config, err := RESTConfig(kubeconfig, false); err == nil ||
			!strings.Contains(err.Error(), "kubernetes.kubeconfig") {
			t.Errorf("%s: got %v, %v", kubeconfig, config, err)
		}
	}
}

// TestRequestsAreRepeatedAfterGOAWAY: an API server that closes a connection in order has not read the requests that it
// rejects. They are repeated, with their bodies.
func TestRequestsAreRepeatedAfterGOAWAY(t *testing.T) {
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

// TestThrottlingIsForwarded: the API server's 429 is neither retried here nor changed; the caller must wait.
func TestThrottlingIsForwarded(t *testing.T) {
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
	if w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") != "7" ||
		w.Header().Get("X-Kubernetes-Pf-Flowschema-Uid") != "u" ||
		w.Body.String() != "slow down" || calls.Load() != 1 {
		t.Errorf("after %d calls answered %d %v %s", calls.Load(), w.Code, w.Header(), w.Body)
	}
}

// TestEarlyAnswersAndTrailersAreForwarded: 1xx before the answer, trailers after it, and 100 for a caller that waits
// for it with its body.
func TestEarlyAnswersAndTrailersAreForwarded(t *testing.T) {
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
	req, err := http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), trace), http.MethodPost,
		server.URL+Prefix+"/api/v1/pods", strings.NewReader("the body"))
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
	if err != nil || string(body) != "the body" || resp.Trailer.Get("X-Sum") != "42" ||
		!slices.Contains(early, http.StatusEarlyHints) {
		t.Errorf("%s %q, %v; trailers %v; 1xx %v", resp.Status, body, err, resp.Trailer, early)
	}
}

// TestWatchesOfAnHTTP1ServerAllBegin: also those that begin before the agent knows that connections cannot be shared.
func TestWatchesOfAnHTTP1ServerAllBegin(t *testing.T) {
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
