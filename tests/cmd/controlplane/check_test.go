package main

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
)

// TestCheckFindsEachBrokenRule checks that each mistake of a control plane fails the rule that it breaks, and no
// other.
func TestCheckFindsEachBrokenRule(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("the-token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	twice := &stub{}
	twice.faults = map[string]http.HandlerFunc{"bodies": twice.echo(2)}
	cut := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100000")
		w.WriteHeader(http.StatusCreated)
	}
	for name, s := range map[string]*stub{
		"all is well":              {},
		"no token":                 broken("lease", says(200, `{}`)),
		"the lease is over":        broken("lease", says(200, `{"frp_token":"t","expires_at":"2020-01-01T00:00:00Z"}`)),
		"frps is the agent's own":  broken("lease", says(200, `{"frp_token":"t","server_addr":"169.254.169.254"}`)),
		"a redirect":               broken("lease", says(302, ``, "Location", "/elsewhere")),
		"wrong is revoked":         broken("wrong token", says(401, `{"revoked":true}`)),
		"wrong is a page":          broken("wrong token", says(401, `<html>`, "Content-Type", "text/html")),
		"unknown is not found":     broken("unknown agent", says(404, `{}`)),
		"revoked is not said":      broken("revoked agent", says(403, `{"error":"no"}`)),
		"another agent answers":    broken("agent", says(200, `{}`, "Pipeops-Agent", "other")),
		"a 401 of its own":         broken("refusal", says(401, `{}`)),
		"a 401 becomes a 503":      broken("refusal", status(503, "1")),
		"answers are cut":          broken("bodies", cut),
		"writes come twice":        twice,
		"no upgrades":              broken("upgrade", says(400, ``)),
		"large headers: try again": broken("large headers", status(503, "1")),
		"away, reading: no object": broken("away, reading", says(404, `not found`)),
		"away, reading: a page":    broken("away, reading", says(503, `<html>`, "Retry-After", "1")),
		"away, reading: no more":   broken("away, reading", status(503, "")),
		"away, writing: no object": broken("away, writing", says(404, `not found`)),
		"away, writing: it may be": broken("away, writing", status(502, "1")),
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewTLSServer(s)
			defer server.Close()
			ca := filepath.Join(t.TempDir(), "ca")
			if err := os.WriteFile(ca, pemOf(server), 0o600); err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			err := check(t.Context(), []string{"--agent-id", "a", "--token-file", token, "--revoked-id", "r",
				"--revoked-token-file", token,
				"--ca-file", ca, "--gateway", server.URL + "/a", "--away", server.URL + "/away", server.URL}, &out)
			if strings.Count(out.String(), "\n") != 11 || strings.Count(out.String(), "ok ") != 11-len(s.faults) ||
				(err != nil) != (len(s.faults) > 0) {
				t.Errorf("%v:\n%s", err, &out)
			}
			for rule := range s.faults {
				if !strings.Contains(out.String(), "failed   "+rule+" ") {
					t.Errorf("%q has not failed:\n%s", rule, &out)
				}
			}
		})
	}
}

func broken(rule string, fault http.HandlerFunc) *stub {
	return &stub{faults: map[string]http.HandlerFunc{rule: fault}}
}

func pemOf(server *httptest.Server) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
}

// says returns a handler that answers with JSON. The headers, each a name and a value, may set another Content-Type.
func says(code int, body string, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		for pair := range slices.Chunk(header, 2) {
			w.Header().Set(pair[0], pair[1])
		}
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	}
}

func status(code int, retryAfter string, header ...string) http.HandlerFunc {
	if retryAfter != "" {
		header = append(header, "Retry-After", retryAfter)
	}
	return says(code, fmt.Sprintf(`{"kind":"Status","code":%d}`, code), header...)
}

// echo returns a handler that answers a write with its body, and counts the write the given number of times.
func (s *stub) echo(times int64) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		s.came.Add(times)
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write(body)
	}
}

// stub is a control plane that keeps the contract except for its faults.
type stub struct {
	faults map[string]http.HandlerFunc // by the rule that they break
	came   atomic.Int64
}

func (s *stub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rule, answer := "", says(http.StatusNotFound, "")
	right := r.Header.Get("Authorization") == "Bearer the-token"
	switch path := r.URL.Path; {
	case path == "/auth/frp-token":
		var request struct {
			ID string `json:"agent_id"`
		}
		_ = json.NewDecoder(r.Body).Decode(&request)
		switch {
		case request.ID == "r":
			rule, answer = "revoked agent", says(403, `{"revoked":true}`)
		case request.ID != "a":
			rule, answer = "unknown agent", says(401, `{}`)
		case !right:
			rule, answer = "wrong token", says(401, `{}`)
		default:
			rule, answer = "lease", says(200, `{"frp_token":"t","server_addr":"frps.example","server_port":7000,`+
				`"tunnel":{"type":"https","custom_domains":["a.example"]}}`)
		}
	case strings.HasPrefix(path, "/away/") && r.Method == http.MethodGet:
		rule, answer = "away, reading", status(503, "1")
	case strings.HasPrefix(path, "/away/"):
		rule, answer = "away, writing", status(502, "")
	case path == "/a/version":
		rule, answer = "agent", says(200, `{}`, "Pipeops-Agent", "a")
	case path == "/a/metrics":
		const counter = "pipeops_agent_kubernetes_requests_total{code=\"201\",verb=\"create\"} %d\n"
		answer = says(200, fmt.Sprintf(counter, s.came.Load()))
	case !right:
		rule, answer = "refusal", status(401, "", "Pipeops-Agent", "a", "WWW-Authenticate", "Bearer")
	case path == "/a"+review:
		rule, answer = "bodies", s.echo(1)
	case r.Header.Get("Upgrade") != "":
		rule, answer = "upgrade", says(403, ``, "Pipeops-Agent", "a")
	case r.Header.Get("X-Large") != "":
		rule, answer = "large headers", says(431, ``)
	}
	if fault := s.faults[rule]; fault != nil {
		answer = fault
	}
	answer(w, r)
}
