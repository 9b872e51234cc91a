package integration

import (
	"bytes"
	"fmt"
	"io"
	"mime"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"sigs.k8s.io/yaml"

	"github.com/pipeops/vm-agent/tests/harness"
)

// openAPI is the OpenAPI description that the agent serves.
type openAPI struct {
	schemas *jsonschema.Compiler
	paths   map[string]any
}

// resolve follows a reference within the description.
func (o *openAPI) resolve(t *testing.T, page map[string]any, v any) map[string]any {
	t.Helper()
	node, _ := v.(map[string]any)
	ref, isRef := node["$ref"].(string)
	if !isRef {
		return node
	}
	var found any = page
	for part := range strings.SplitSeq(strings.TrimPrefix(ref, "#/"), "/") {
		found = found.(map[string]any)[part]
	}
	return o.resolve(t, page, found)
}

// TestOpenAPIIsValid validates the description by the specification, and checks what generators of clients and
// documentation need besides.
func TestOpenAPIIsValid(t *testing.T) {
	page, err := openapi3.NewLoader().LoadFromFile(filepath.Join(harness.Root(t), "proxy", "server", "openapi.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := page.Validate(t.Context()); err != nil {
		t.Error(err)
	}
	if page.Info.License == nil || len(page.Servers) == 0 {
		t.Errorf("license: %v, servers: %v", page.Info.License, page.Servers)
	}
	seen := map[string]bool{"": true}
	for path, item := range page.Paths.Map() {
		for method, operation := range item.Operations() {
			if id := operation.OperationID; seen[id] {
				t.Errorf("%s %s: operationId %q is empty or not unique", method, path, id)
			}
			seen[operation.OperationID] = true
			for _, parameter := range operation.Parameters {
				if parameter.Value.Description == "" {
					t.Errorf("%s %s: parameter %s has no description", method, path, parameter.Value.Name)
				}
			}
		}
	}
}

// TestOpenAPIDescribesEveryResponse compares the description with the agent: the examples match the schemas, every
// route answers as described, and every described response is shown by a request here.
func TestOpenAPIDescribesEveryResponse(t *testing.T) {
	t.Parallel()
	w, runnersNS := connectedWithRunners(t)
	resp, text := get(t, http.DefaultClient, w.agent.Tunnel+"/openapi.yaml", nil)
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "application/yaml" {
		t.Fatal(resp.Status, resp.Header)
	}
	data, err := yaml.YAMLToJSON([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := jsonschema.UnmarshalJSON(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	page := parsed.(map[string]any)
	api := &openAPI{schemas: jsonschema.NewCompiler(), paths: page["paths"].(map[string]any)}
	api.schemas.AssertFormat()
	if err := api.schemas.AddResource("page.json", page); err != nil {
		t.Fatal(err)
	}
	fits := func(ref string, value any) error {
		compiled, err := api.schemas.Compile("page.json" + ref)
		if err != nil {
			t.Fatal(err)
		}
		return compiled.Validate(value)
	}
	validate := func(what string, schema map[string]any, value any) {
		t.Helper()
		ref, ok := schema["$ref"].(string)
		if !ok {
			return // text, or anything
		}
		if err := fits(ref, value); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}

	// What the description says: the content by route and code.
	said := map[string]map[string]any{}
	for path, item := range api.paths {
		for method, operation := range item.(map[string]any) {
			operation, ok := operation.(map[string]any)
			if !ok || operation["responses"] == nil {
				continue
			}
			if body := api.resolve(t, page, operation["requestBody"]); body != nil {
				for _, content := range body["content"].(map[string]any) {
					content := content.(map[string]any)
					validate(path+" request", content["schema"].(map[string]any), content["example"])
				}
			}
			for code, response := range operation["responses"].(map[string]any) {
				content, _ := api.resolve(t, page, response)["content"].(map[string]any)
				said[strings.ToUpper(method)+" "+path+" "+code] = content
				for kind, content := range content {
					content := content.(map[string]any)
					if schema := content["schema"].(map[string]any); schema["$ref"] != nil {
						validate(fmt.Sprintf("example of %s %s, %s", path, code, kind), schema, content["example"])
					}
				}
			}
		}
	}

	// What the agent answers.
	const command = "/api/runners/{runner_id}/command"
	shown := map[string]bool{}
	try := func(method, path, actual, token, body string) {
		t.Helper()
		header := http.Header{}
		if token != "" {
			header.Set("Authorization", "Bearer "+token)
		}
		if body != "plain" {
			header.Set("Content-Type", "application/json")
		}
		if body == "loop" {
			header.Set("Via", "1.1 "+agentID)
		}
		resp, answer := exchange(t, asItIs, method, w.agent.Tunnel+actual, header, body)
		key := fmt.Sprintf("%s %s %d", method, path, resp.StatusCode)
		content, ok := said[key]
		if !ok {
			t.Errorf("the description lacks %s: %s", key, answer)
			return
		}
		shown[key] = true
		kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
		schema, ok := content[kind].(map[string]any)
		if !ok {
			t.Errorf("%s: the description lacks the type %s", key, kind)
			return
		}
		if strings.HasSuffix(kind, "json") {
			value, err := jsonschema.UnmarshalJSON(strings.NewReader(answer))
			if err != nil {
				t.Errorf("%s: %v", key, err)
			}
			validate(key, schema["schema"].(map[string]any), value)
		}
	}
	for _, path := range []string{"/health", "/ready", "/version", "/openapi.yaml"} {
		try(http.MethodGet, path, path, "", "")
	}
	try(http.MethodGet, "/ready", "/ready?exclude=nothing", "", "")
	for _, path := range []string{"/metrics", "/api/agent/status"} {
		try(http.MethodGet, path, path, agentToken, "")
	}
	try(http.MethodPost, "/api/agent/heartbeat", "/api/agent/heartbeat", agentToken, "")
	const messages = "/api/control-plane/message"
	for _, body := range []string{
		`{"id":"1","type":"ping"}`, `{`, strings.Repeat("x", 1<<20), "plain", `{"id":"1","type":"x"}`,
	} {
		try(http.MethodPost, messages, messages, agentToken, body)
	}
	// The agent accepts what matches the schema Message, and refuses the rest with 422.
	for _, body := range []string{
		`{"id":"m","type":"ping","data":[5]}`, `{"id":"m","type":"ping","timestamp":null}`,
		`{"id":"m","type":"ping","timestamp":"now"}`, `{"id":"","type":"ping"}`,
		`{"id":"` + strings.Repeat("m", 129) + `","type":"ping"}`, `{"id":"ü","type":"ping"}`,
		`{"id":"m","type":"ping","more":1}`, `{"id":"m"}`,
		`{"id":"u","type":"runner_unassigned","data":{"runner_id":"r"}}`,
		`{"id":"m","type":"runner_unassigned","data":{"runner_id":"r","more":1}}`,
		`{"id":"m","type":"runner_unassigned"}`, `{"id":"m","type":"runner_unassigned","data":{}}`,
		`{"id":"m","type":"runner_unassigned","data":[]}`,
		`{"id":"m","type":"runner_unassigned","data":{"runner_id":"_"}}`,
		`{"id":"a","type":"runner_assigned","data":` + assignment("r", "http://r.a.svc/") + `}`,
		`{"id":"m","type":"runner_assigned","data":{"runner_id":"r"}}`,
		`{"id":"m","type":"runner_assigned","data":` + assignment("r", "ftp://r.a.svc/") + `}`,
		`{"id":"m","type":"runner_assigned","data":` + assignment("r", "http://r.a.svc/"+strings.Repeat("x", 2048)) + `}`,
	} {
		value, err := jsonschema.UnmarshalJSON(strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		err = fits("#/components/schemas/Message", value)
		if resp, answer := post(t, w.agent, messages, body); resp.StatusCode != map[bool]int{true: http.StatusOK,
			false: http.StatusUnprocessableEntity}[err == nil] {
			t.Errorf("%s: answered %s %s, but the description says %v", body, resp.Status, answer, err)
		}
	}
	sendMessage(t, w.agent, "gone", "runner_assigned", assignment("gone", "http://"+harness.FreeAddr(t)), false)
	for runner, body := range map[string]string{"_": "", "none": "", "gone": ""} {
		try(http.MethodPost, command, "/api/runners/"+runner+"/command", agentToken, body)
	}
	sink := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	sendMessage(t, w.agent, "sink", "runner_assigned", assignment("sink", serve(t, sink)), false)
	try(http.MethodPost, command, "/api/runners/sink/command", agentToken, strings.Repeat("x", 11<<20))
	try(http.MethodPost, command, "/api/runners/sink/command", agentToken, "loop")
	fillRegistry(t, runnersNS)
	try(http.MethodPost, messages, messages, agentToken, `{"id":"full","type":"runner_assigned","data":`+
		assignment("r", "http://r.a.svc/"+strings.Repeat("x", 2000))+`}`)
	noRight := viewer(t)
	w.agent, noRight.agent = noRight.agent, w.agent
	try(http.MethodPost, messages, messages, agentToken, `{"id":"2","type":"runner_unassigned","data":{"runner_id":"r"}}`)
	for range 2 { // the first round is 401; then so many more that the next is 429
		try(http.MethodGet, "/metrics", "/metrics", "wrong", "")
		try(http.MethodGet, "/api/agent/status", "/api/agent/status", "wrong", "")
		try(http.MethodPost, "/api/agent/heartbeat", "/api/agent/heartbeat", "wrong", "")
		try(http.MethodPost, messages, messages, "wrong", "")
		try(http.MethodPost, command, "/api/runners/r/command", "wrong", "")
		try(http.MethodGet, "/ready", "/ready", "wrong", "")
		for range 20 {
			try(http.MethodGet, "/metrics", "/metrics", "wrong", "")
		}
	}
	closed := newWorld(t)
	closed.agent.Env = append(closed.agent.Env, "PIPEOPS_ACCESS_CONFIG_MAP=missing")
	if err := closed.agent.Start(); err != nil {
		t.Fatal(err)
	}
	wantTunnel(t, closed)
	w.agent = closed.agent
	try(http.MethodPost, messages, messages, agentToken, `{"id":"3","type":"runner_unassigned","data":{"runner_id":"r"}}`)
	try(http.MethodPost, command, "/api/runners/r/command", agentToken, "")
	leaving := newWorld(t)
	if err := leaving.agent.Start(); err != nil {
		t.Fatal(err)
	}
	wantTunnel(t, leaving)
	startDraining(t, leaving)
	w.agent = leaving.agent
	try(http.MethodGet, "/ready", "/ready", "", "")

	for key := range said {
		// A runner may answer anything. TestCommandsReachTheRunner and the proxy's unit tests cover timeouts.
		if !shown[key] && key != "POST "+command+" default" && !strings.HasSuffix(key, " 408") &&
			!strings.HasSuffix(key, " 504") {
			t.Errorf("no request here shows %s", key)
		}
	}
}
