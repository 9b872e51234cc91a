package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc/secret"
)

func bearer(token string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
	r.Header.Set("Authorization", "Bearer "+token)
	return r
}

const tokenOverlap = 5 * time.Minute

// TestPreviousTokenIsRefusedWithoutOverlap: without an overlap, a new token revokes the previous one at once.
func TestPreviousTokenIsRefusedWithoutOverlap(t *testing.T) {
	a := newAuthenticator("first", 0, newMetrics(), slog.New(slog.DiscardHandler))
	a.setToken("second")
	accepts := func(token string) bool { return a.check(bearer(token).Header, "Authorization") == nil }
	if accepts("first") || !accepts("second") {
		t.Error("the first token is let in, or the second is not")
	}
}

// TestTokenFileIsReloaded: a new token is accepted within seconds, and the previous one for the overlap, whether
// requests come meanwhile or not. A file that cannot be read changes nothing; if it is empty or missing, all callers
// are refused.
func TestTokenFileIsReloaded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var mu sync.Mutex
		content, broken := secret.Secret("first"), error(nil)
		read := func() (secret.Secret, error) {
			mu.Lock()
			defer mu.Unlock()
			return content, broken
		}
		write := func(token secret.Secret, err error) {
			mu.Lock()
			defer mu.Unlock()
			content, broken = token, err
		}
		log := &strings.Builder{}
		a := newAuthenticator("first", tokenOverlap, newMetrics(), slog.New(slog.NewTextHandler(log, nil)))
		go a.follow(ctx, read)
		want := func(accepted ...string) {
			t.Helper()
			for _, token := range []string{"first", "second", "third", "fourth", ""} {
				want := slices.Contains(accepted, token)
				if got := a.check(bearer(token).Header, "Authorization") == nil; got != want {
					t.Errorf("%q: accepted %v, want %v", token, got, want)
				}
			}
		}
		want("first")
		write("second", nil)
		time.Sleep(2*time.Second + 1)
		want("first", "second")
		write("", errors.New("input/output error"))
		time.Sleep(time.Minute)
		want("first", "second")
		write("second", nil)
		time.Sleep(tokenOverlap)
		want("second")
		write("third", nil)
		time.Sleep(2*time.Second + 1)
		want("second", "third")
		time.Sleep(tokenOverlap)
		want("third")
		write("fourth", nil)
		time.Sleep(2*time.Second + tokenOverlap) // without a request
		want("fourth")
		write("", fmt.Errorf("%w: the file is empty", config.ErrNoSecret))
		time.Sleep(2*time.Second + 1)
		want() // neither the last token nor an empty one
		write("first", nil)
		time.Sleep(2*time.Second + 1)
		want("first")
		if n := strings.Count(log.String(), "reading the agent token failed"); n != 1 ||
			strings.Contains(log.String(), "second") {
			t.Errorf("the log says %d times that the file cannot be read:\n%s", n, log)
		}
	})
}

// TestCallerThatFailsTooOftenGets429: its failures do not fill the log, other callers are not affected, and the right
// token is always accepted.
func TestCallerThatFailsTooOftenGets429(t *testing.T) {
	s, log, _ := newTest(t, token)
	s.log = slog.New(slog.NewJSONHandler(log, nil)) // as in production: level info
	s.auth.log = s.log
	handler := s.handler(tunnel)
	from := func(source, token string) *httptest.ResponseRecorder {
		r := bearer(token)
		r.Header.Set("X-Forwarded-For", source)
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		return w
	}
	for i := range 100 {
		w := from("192.0.2.1", fmt.Sprint("wrong-", i))
		want := http.StatusUnauthorized
		if i >= 20 {
			want = http.StatusTooManyRequests
		}
		if w.Code != want || (w.Header().Get("Retry-After") != "") != (want == http.StatusTooManyRequests) {
			t.Fatalf("failure %d: answered %d %v", i, w.Code, w.Header())
		}
	}
	if w := from("192.0.2.1", token); w.Code != http.StatusOK {
		t.Errorf("the right token from there: answered %d", w.Code)
	}
	if w := from("192.0.2.2", "wrong"); w.Code != http.StatusUnauthorized {
		t.Errorf("another source: answered %d", w.Code)
	}
	if n := strings.Count(log.String(), "authentication failed"); n != 2 || strings.Count(log.String(), "\n") != 3 ||
		strings.Contains(log.String(), "wrong-") {
		t.Errorf("%d refusals are logged:\n%s", n, log)
	}
	if n := testutil.ToFloat64(s.metrics.authFailures.WithLabelValues("token")); n != 101 {
		t.Errorf("%v failures are counted", n)
	}
	for i := range 3000 {
		from(fmt.Sprintf("10.%d.%d.1", i/256, i%256), "wrong")
	}
	if n := len(s.auth.callers); n > 1001 {
		t.Errorf("%d sources are remembered", n)
	}
	if w := from("192.0.2.1", token); w.Code != http.StatusOK {
		t.Errorf("the right token, after many sources: answered %d", w.Code)
	}
}

// TestWrongTokensAtReadyAreLimited: as on every other route.
func TestWrongTokensAtReadyAreLimited(t *testing.T) {
	s, _, handlers := newTest(t, token)
	for range 20 {
		if w := do(handlers[tunnel], "GET", "/ready", "Bearer wrong"); w.Code == http.StatusTooManyRequests ||
			strings.Contains(w.Body.String(), "detail") {
			t.Fatalf("answered %d %s", w.Code, w.Body)
		}
	}
	if w := do(handlers[tunnel], "GET", "/ready", "Bearer wrong"); w.Code != http.StatusTooManyRequests ||
		w.Header().Get("Retry-After") == "" {
		t.Errorf("answered %d %v", w.Code, w.Header())
	}
	if n := testutil.ToFloat64(s.metrics.authFailures.WithLabelValues("token")); n != 21 {
		t.Errorf("counted %v", n)
	}
	for _, right := range [][]string{nil, {"Bearer " + token}} { // frpc sends none; the right one is accepted
		if w := do(handlers[tunnel], "GET", "/ready", right...); w.Code == http.StatusTooManyRequests ||
			strings.Contains(w.Body.String(), "detail") != (right != nil) {
			t.Errorf("%v: answered %d %s", right, w.Code, w.Body)
		}
	}
}

// TestThrottledCallerSeesWhy: client-go waits for as long as Retry-After says, past its caller's timeout, and then
// reports the timeout in place of the cause.
func TestThrottledCallerSeesWhy(t *testing.T) {
	s, _, _ := newTest(t, token)
	server := httptest.NewServer(s.handler(tunnel))
	t.Cleanup(server.Close)
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	client, err := rest.UnversionedRESTClientFor(&rest.Config{
		Host: server.URL + "/api/k8s", BearerToken: "wrong", Timeout: 2 * time.Second, QPS: -1,
		ContentConfig: rest.ContentConfig{NegotiatedSerializer: serializer.NewCodecFactory(scheme).WithoutConversion()},
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 21 {
		err = client.Get().AbsPath("/api/v1/namespaces/default/pods/pod").Do(t.Context()).Error()
	}
	if !apierrors.IsTooManyRequests(err) || !strings.Contains(err.Error(), "too many wrong credentials") {
		t.Errorf("it sees: %v", err)
	}
}

// TestFailuresCountForAMinute: from the first of them.
func TestFailuresCountForAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthenticator(token, 0, newMetrics(), slog.New(slog.DiscardHandler))
		wrong := &refusal{"token", "wrong"}
		for range 20 {
			if wait := a.recordFailure("192.0.2.1", wrong); wait != 0 {
				t.Fatalf("it has to wait for %s", wait)
			}
		}
		time.Sleep(59 * time.Second)
		if wait := a.recordFailure("192.0.2.1", wrong); wait != time.Second {
			t.Errorf("after 59 s it has to wait for %s", wait)
		}
		time.Sleep(2 * time.Second)
		if wait := a.recordFailure("192.0.2.1", wrong); wait != 0 {
			t.Errorf("after 61 s it has to wait for %s", wait)
		}
	})
}
