package server

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/pipeops/vm-agent/proxy/answer"
)

func post(handler http.Handler, path, contentType, body string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, path, strings.NewReader(body))
	r.Header.Set("Authorization", "Bearer "+token)
	if contentType != "" {
		r.Header.Set("Content-Type", contentType)
	}
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, r)
	return w
}

const messagePath = "/api/control-plane/message"

func assigned(data string) string {
	return `{"id":"1","type":"runner_assigned","timestamp":"2026-01-02T03:04:05Z","data":` + data + `}`
}

// TestInvalidMessagesAreExplained: each answer says what is invalid. None reads the registry, which would be a 502
// here.
func TestInvalidMessagesAreExplained(t *testing.T) {
	_, log, handlers := newTest(t, token)
	const good = `"runner_id":"r","runner_endpoint":"http://r.a.svc/","runner_token":"s3cret"`
	for name, test := range map[string]struct {
		contentType, body string
		code              int
		want              string
	}{
		"no content type":   {"", `{}`, 415, "Content-Type: application/json"},
		"wrong type":        {"text/plain", `{}`, 415, "Content-Type: application/json"},
		"empty":             {"application/json", ``, 400, "empty"},
		"truncated":         {"application/json", `{"id":"1","ty`, 400, "unexpected end of JSON"},
		"two":               {"application/json", `{} {}`, 400, "is not valid JSON: invalid character"},
		"too large":         {"application/json", `"` + strings.Repeat("a", 10<<20) + `"`, 413, "larger than 65536 bytes"},
		"deep":              {"application/json", strings.Repeat("[", 30_000) + strings.Repeat("]", 30_000), 400, "exceeded max depth"},
		"not UTF-8":         {"application/json", "{\"id\":\"\xff\"}", 400, "not UTF-8"},
		"array":             {"application/json", `[]`, 422, `"the message: give an object"`},
		"null":              {"application/json", `null`, 422, "id: give"},
		"number for a text": {"application/json", `{"id":1,"type":"ping"}`, 422, `"id: give a string"`},
		"twice":             {"application/json", `{"id":"1","id":"2","type":"ping"}`, 422, `"the message: duplicate field \"id\""`},
		"unknown field":     {"application/json", `{"id":"1","type":"ping","more":1}`, 422, `"the message: unknown field \"more\""`},
		"other case":        {"application/json", `{"ID":"1","type":"ping"}`, 422, `unknown field \"ID\"`},
		"no id":             {"application/json", `{"type":"ping"}`, 422, "id: give"},
		"long id":           {"application/json", `{"id":"` + strings.Repeat("a", 10_000) + `","type":"ping"}`, 422, "id: give"},
		"time":              {"application/json", `{"id":"1","type":"ping","timestamp":"yesterday"}`, 422, `"timestamp: give a time`},
		"time, a number":    {"application/json", `{"id":"1","type":"ping","timestamp":5}`, 422, `"timestamp: give a string"`},
		"time of a runner":  {"application/json", assigned(`{` + good + `,"assigned_at":""}`), 422, `"data.assigned_at: give a time`},
		"unknown type":      {"application/json", `{"id":"1","type":"reboot"}`, 422, "give ping, runner_assigned or runner_unassigned"},
		"no data":           {"application/json", `{"id":"1","type":"runner_assigned"}`, 422, `"data: give an object"`},
		"data of no kind":   {"application/json", assigned(`[]`), 422, `"data: give an object"`},
		"data null":         {"application/json", assigned(`null`), 422, `"data.runner_id: give`},
		"token no text":     {"application/json", assigned(`{"runner_token":["s3cret"]}`), 422, `"data.runner_token: give a string"`},
		"id not ASCII":      {"application/json", `{"id":"\ud800","type":"ping"}`, 422, "id: give"},
		"id with a space":   {"application/json", `{"id":"a b","type":"ping"}`, 422, "id: give"},
		"long endpoint":     {"application/json", assigned(`{` + strings.Replace(good, `svc/`, `svc/`+strings.Repeat("a", 2048), 1) + `}`), 422, "data.runner_endpoint is longer than 2048 bytes"},
		"long token":        {"application/json", assigned(`{` + strings.Replace(good, `s3cret`, strings.Repeat("a", 8193), 1) + `}`), 422, "data.runner_token: give"},
		"data twice":        {"application/json", assigned(`{` + good + `,"runner_id":"q"}`), 422, `"data: duplicate field \"runner_id\""`},
		"data unknown":      {"application/json", assigned(`{` + good + `,"x":1}`), 422, `"data: unknown field \"x\""`},
		"runner id path":    {"application/json", assigned(`{` + strings.Replace(good, `"r"`, `"../r"`, 1) + `}`), 422, "data.runner_id: give"},
		"runner id ours":    {"application/json", assigned(`{` + strings.Replace(good, `"r"`, `"_processed"`, 1) + `}`), 422, "data.runner_id: give"},
		"runner id long":    {"application/json", assigned(`{` + strings.Replace(good, `"r"`, `"`+strings.Repeat("a", 10_000)+`"`, 1) + `}`), 422, "data.runner_id: give"},
		"no URL":            {"application/json", assigned(`{` + strings.Replace(good, `http://r.a.svc/`, `:x`, 1) + `}`), 422, "is not an http or https URL"},
		"file":              {"application/json", assigned(`{` + strings.Replace(good, `http`, `file`, 1) + `}`), 422, "is not an http or https URL"},
		"user":              {"application/json", assigned(`{` + strings.Replace(good, `r.a.svc`, `u:p@r.a.svc`, 1) + `}`), 422, "without user"},
		"other host":        {"application/json", assigned(`{` + strings.Replace(good, `r.a.svc`, `169.254.169.254`, 1) + `}`), 422, "not among runners.allowed_hosts"},
		"host of a kind":    {"application/json", assigned(`{` + strings.Replace(good, `r.a.svc`, `evilsvc`, 1) + `}`), 422, "not among runners.allowed_hosts"},
		"host alone":        {"application/json", assigned(`{` + strings.Replace(good, `r.a.svc`, `.svc`, 1) + `}`), 422, "neither a DNS name nor an IP"},
		"token":             {"application/json", assigned(`{` + strings.Replace(good, `s3cret`, `s3cret\r\nX: y`, 1) + `}`), 422, "data.runner_token: give"},
		"no token":          {"application/json", assigned(`{` + strings.Replace(good, `s3cret`, ``, 1) + `}`), 422, "data.runner_token: give"},
		"unassign no id":    {"application/json", `{"id":"1","type":"runner_unassigned","data":{}}`, 422, "data.runner_id: give"},
	} {
		t.Run(name, func(t *testing.T) {
			w := post(handlers[tunnel], messagePath, test.contentType, test.body)
			var p answer.Problem
			if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil || w.Code != test.code || p.Status != test.code ||
				!strings.Contains(w.Body.String(), test.want) ||
				w.Header().Get("Content-Type") != "application/problem+json" {
				t.Errorf("answered %d %v %.300s, want %d %q", w.Code, err, w.Body, test.code, test.want)
			}
			if strings.Contains(w.Body.String(), "s3cret") {
				t.Error("the answer holds the runner's token")
			}
		})
	}
	if strings.Contains(log.String(), "s3cret") {
		t.Error("the log holds the runner's token")
	}
	w := post(handlers[tunnel], messagePath, "application/json; charset=utf-8", `{"id":"1","type":"ping"}`)
	if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), `"acknowledged"`) {
		t.Errorf("ping: %d %s", w.Code, w.Body)
	}
}

func TestInvalidRunnerIDsGet400(t *testing.T) {
	_, _, handlers := newTest(t, token)
	for _, id := range []string{"..%2f..%2fx", "%2e%2e%2f", "_processed", strings.Repeat("a", 10_000), "a%00b", "a%20b"} {
		w := post(handlers[tunnel], "/api/runners/"+id+"/command", "application/json", `{}`)
		if w.Code != http.StatusBadRequest {
			t.Errorf("%.20q: answered %d %s", id, w.Code, w.Body)
		}
	}
}

// FuzzMessage: no message causes a panic or an answer that is not JSON, and only a valid one for a runner reaches the
// API server.
func FuzzMessage(f *testing.F) {
	f.Add(`{"id":"1","type":"ping","timestamp":"2026-01-02T03:04:05Z","data":{}}`)
	f.Add(assigned(`{"runner_id":"r","runner_endpoint":"http://r.a.svc/x?y#z","runner_token":"t",` +
		`"assigned_at":"2026-01-02T03:04:05Z"}`))
	f.Add(`{"id":"1","type":"runner_unassigned","data":{"runner_id":"r"}}`)
	f.Add(`{"id":"\u0000","type":null,"data":[[[]]]}`)
	_, log, handlers := newTest(f, token)
	f.Fuzz(func(t *testing.T, body string) {
		log.Reset()
		w := post(handlers[tunnel], messagePath, "application/json", body)
		var answer map[string]any
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || w.Code >= 500 && w.Code != http.StatusBadGateway {
			t.Errorf("answered %d %s", w.Code, w.Body)
		}
	})
}
