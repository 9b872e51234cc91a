package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
)

// secrets is an API server with one Secret, which it writes as the real one does: not if another has written it since
// it was read. The integration tests have a real one.
type secrets struct {
	mu      sync.Mutex
	stored  map[string]any // nil: there is none
	version int
	code    int                    // of the answers to GET; 0: as it is
	others  func(s map[string]any) // changes the Secret once between a GET and what follows; it may be nil
	writes  []string
}

func (s *secrets) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fail := func(code int) {
		w.WriteHeader(code)
		_, _ = fmt.Fprintf(w, `{"kind":"Status","code":%d,"message":"no"}`, code)
	}
	if r.Method == http.MethodGet {
		switch {
		case s.code != 0:
			fail(s.code)
		case s.stored == nil:
			fail(http.StatusNotFound)
		default:
			_ = json.NewEncoder(w).Encode(s.stored)
		}
		if change := s.others; change != nil {
			s.others = nil
			if s.stored == nil {
				s.stored = map[string]any{"kind": "Secret", "metadata": map[string]any{}, "data": map[string]any{}}
			}
			change(s.stored)
			s.save()
		}
		return
	}
	written := map[string]any{}
	_ = json.NewDecoder(r.Body).Decode(&written)
	s.writes = append(s.writes, r.Method)
	metadata, _ := written["metadata"].(map[string]any)
	given, _ := metadata["resourceVersion"].(string)
	switch {
	case r.Method == http.MethodPost && s.stored != nil,
		r.Method == http.MethodPut && given != "" && given != fmt.Sprint(s.version): // without one it overwrites
		fail(http.StatusConflict)
	default:
		s.stored = written
		s.save()
		_, _ = io.WriteString(w, "{}")
	}
}

// save gives the Secret its next version.
func (s *secrets) save() {
	s.version++
	s.stored["metadata"].(map[string]any)["resourceVersion"] = fmt.Sprint(s.version)
}

func (s *secrets) data() string {
	data, _ := json.Marshal(s.stored["data"])
	return string(data)
}

func clientOf(t *testing.T, handler http.Handler) *Client {
	t.Helper()
	api := httptest.NewServer(handler)
	t.Cleanup(api.Close)
	client, err := NewClient(&rest.Config{Host: api.URL}, func(*http.Request, float64) {})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func set(key, value string) Change {
	return func(data map[string][]byte) error {
		data[key] = []byte(value)
		return nil
	}
}

// TestChangesOfASecretAreAllKept: the first, one that another writer comes between, and what is beside the data.
func TestChangesOfASecretAreAllKept(t *testing.T) {
	for name, test := range map[string]struct {
		stored string
		other  bool
		want   string
		writes string
	}{
		"there is none":          {"", false, `{"mine":"MQ=="}`, "POST"},
		"another creates it":     {"", true, `{"mine":"MQ==","other":"Mg=="}`, "POST PUT"},
		"there is one":           {`{"metadata":{"labels":{"a":"b"}},"data":{"old":"MA=="}}`, false, `{"mine":"MQ==","old":"MA=="}`, "PUT"},
		"another changes it":     {`{"metadata":{"labels":{"a":"b"}},"data":{"old":"MA=="}}`, true, `{"mine":"MQ==","old":"MA==","other":"Mg=="}`, "PUT PUT"},
		"another, and no data":   {`{"metadata":{"labels":{"a":"b"}},"data":null}`, false, `{"mine":"MQ=="}`, "PUT"},
		"it has a key with mine": {`{"metadata":{"labels":{"a":"b"}},"data":{"mine":"MA=="}}`, false, `{"mine":"MQ=="}`, "PUT"},
	} {
		t.Run(name, func(t *testing.T) {
			s := &secrets{}
			if test.stored != "" {
				if err := json.Unmarshal([]byte(test.stored), &s.stored); err != nil {
					t.Fatal(err)
				}
				s.save()
			}
			if test.other {
				s.others = func(stored map[string]any) { stored["data"].(map[string]any)["other"] = "Mg==" }
			}
			ctx := t.Context()
			if err := clientOf(t, s).ChangeSecret(ctx, "ns", "name", set("mine", "1")); err != nil {
				t.Fatal(err)
			}
			if s.data() != test.want || strings.Join(s.writes, " ") != test.writes {
				t.Errorf("stored %s by %v, want %s by %s", s.data(), s.writes, test.want, test.writes)
			}
			labels, _ := json.Marshal(s.stored["metadata"])
			if test.stored != "" && !strings.Contains(string(labels), `"labels":{"a":"b"}`) {
				t.Errorf("its labels are lost: %s", labels)
			}
		})
	}
}

// TestManyWritersOfASecretLoseNothing: each starts again until its change is in.
func TestManyWritersOfASecretLoseNothing(t *testing.T) {
	s := &secrets{}
	client := clientOf(t, s)
	var writers sync.WaitGroup
	for i := range 10 {
		writers.Go(func() {
			if err := client.ChangeSecret(t.Context(), "ns", "name", set(fmt.Sprint("key", i), "1")); err != nil {
				t.Error(err)
			}
		})
	}
	writers.Wait()
	if n := strings.Count(s.data(), `"MQ=="`); n != 10 {
		t.Errorf("%d of 10 changes are stored: %s", n, s.data())
	}
}

// TestUnreadableSecretIsNotOverwritten: an error is not an empty Secret. Nor is anything written of a change that
// fails.
func TestUnreadableSecretIsNotOverwritten(t *testing.T) {
	for _, code := range []int{http.StatusUnauthorized, http.StatusForbidden, http.StatusInternalServerError} {
		s := &secrets{code: code}
		if err := clientOf(t, s).ChangeSecret(t.Context(), "ns", "name", set("mine", "1")); err == nil || s.writes != nil {
			t.Errorf("%d: wrote %v, %v", code, s.writes, err)
		}
	}
	s, failed := &secrets{}, errors.New("failed")
	err := clientOf(t, s).ChangeSecret(t.Context(), "ns", "name", func(map[string][]byte) error { return failed })
	if !errors.Is(err, failed) || s.writes != nil {
		t.Errorf("wrote %v, %v", s.writes, err)
	}
}

// TestReadinessIsTheAPIServersOwn: a credential that may not ask passes.
func TestReadinessIsTheAPIServersOwn(t *testing.T) {
	for code, ready := range map[int]bool{200: true, 403: true, 404: true, 401: false, 429: false, 503: false} {
		client := clientOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(code)
			_, _ = io.WriteString(w, "[+]ping ok\n[-]etcd failed: reason withheld\nreadyz check failed")
			if r.URL.Path != "/readyz" {
				t.Errorf("asked %s", r.URL)
			}
		}))
		err := client.CheckReady(t.Context())
		if (err == nil) != ready || code >= 500 && !strings.Contains(err.Error(), "[-]etcd failed") {
			t.Errorf("%d: %v", code, err)
		}
	}
}

// TestReviewsAskForTheCaller: with its identity, and all that RBAC decides by.
func TestReviewsAskForTheCaller(t *testing.T) {
	var who, asked string
	client := clientOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		who, asked = r.Header.Get("Impersonate-User"), string(body)
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, `{"status":{"allowed":true}}`)
	}))
	d := &Description{
		Verb: "watch", Group: "apps", Resource: "deployments", Subresource: "status", Namespace: "ns", Name: "one",
	}
	allowed, err := client.Review(t.Context(), http.Header{"Impersonate-User": {"a"}}, d)
	const want = `{"apiVersion":"authorization.k8s.io/v1","kind":"SelfSubjectAccessReview","spec":{"resourceAttributes":` +
		`{"group":"apps","name":"one","namespace":"ns","resource":"deployments","subresource":"status","verb":"watch"}}}`
	if err != nil || !allowed || who != "a" || asked != want {
		t.Errorf("%v, %v: %q asked %s", allowed, err, who, asked)
	}
}

// TestBinaryKeysOfAConfigMapAreKeys: so that its reader finds those that it does not know.
func TestBinaryKeysOfAConfigMapAreKeys(t *testing.T) {
	client := clientOf(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"data":{"allow":"all"},"binaryData":{"until":"AA=="}}`)
	}))
	data, err := client.ReadConfigMap(t.Context(), "ns", "name")
	if until, ok := data["until"]; err != nil || len(data) != 2 || data["allow"] != "all" || !ok || until != "" {
		t.Errorf("%v, %v", data, err)
	}
	client = clientOf(t, http.NotFoundHandler())
	if _, err := client.ReadConfigMap(t.Context(), "ns", "name"); !apierrors.IsNotFound(err) {
		t.Errorf("missing: %v", err)
	}
}
