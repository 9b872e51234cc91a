package integration

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
)

// post sends a JSON body to an agent's proxy.
func post(t *testing.T, a *agent.Agent, path, body string) (*http.Response, string) {
	t.Helper()
	header := http.Header{"Authorization": {"Bearer " + agentToken}, "Content-Type": {"application/json"}}
	return exchange(t, asItIs, http.MethodPost, a.Tunnel+path, header, body)
}

// sendMessage sends a control plane's message and expects it to be acknowledged.
func sendMessage(t *testing.T, a *agent.Agent, id, kind, data string, duplicate bool) {
	t.Helper()
	resp, body := post(t, a, "/api/control-plane/message",
		fmt.Sprintf(`{"id":%q,"type":%q,"timestamp":"2026-01-02T03:04:05Z","data":%s}`, id, kind, data))
	var answer struct {
		Status    string
		Duplicate bool
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || resp.StatusCode != http.StatusOK ||
		answer.Status != "acknowledged" || answer.Duplicate != duplicate {
		t.Fatalf("message %s %s: %s %s", id, kind, resp.Status, body)
	}
}

func assignment(runner, endpoint string) string {
	return fmt.Sprintf(`{"runner_id":%q,"runner_endpoint":%q,"runner_token":"token-of-%[1]s",`+
		`"assigned_at":"2026-01-02T03:04:05Z"}`, runner, endpoint)
}

// connectedWithRunners returns a world whose agent is ready, keeps its registry in a namespace of its own, and may
// relay commands to this machine.
func connectedWithRunners(t *testing.T, env ...string) (*world, string) {
	t.Helper()
	w := newWorld(t)
	ns := w.namespace()
	w.agent.Env = append(w.agent.Env, "PIPEOPS_NAMESPACE="+ns, "PIPEOPS_RUNNERS_ALLOWED_HOSTS=127.0.0.1,*.svc")
	w.agent.Env = append(w.agent.Env, env...)
	w.startAgent()
	return w, ns
}

// serve serves handler on loopback and returns its URL.
func serve(t *testing.T, handler http.Handler) string {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server.URL
}

// TestCommandsReachTheRunner checks that a command reaches the runner with the runner's token, and that the answer
// comes back unchanged. The registry survives a restart of the proxy. A repeated old message does not bring back an
// unassigned runner.
func TestCommandsReachTheRunner(t *testing.T) {
	t.Parallel() // a runner that does not answer takes half a minute
	w, _ := connectedWithRunners(t)
	lines, hung := make(chan string), make(chan struct{})
	runner := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		switch string(body) {
		case "stream":
			for line := range lines {
				_, _ = io.WriteString(rw, line+"\n")
				_ = http.NewResponseController(rw).Flush()
			}
		case "redirect":
			http.Redirect(rw, r, "http://127.0.0.1:1/elsewhere", http.StatusTemporaryRedirect)
		case "hang":
			<-hung
		default:
			rw.WriteHeader(http.StatusTeapot)
			_, _ = fmt.Fprintf(rw, "%s %s %q %q %s", r.Method, r.URL, r.Header["Authorization"], r.Header["Cookie"], body)
		}
	}))
	t.Cleanup(runner.Close)
	t.Cleanup(func() { close(hung) })
	want := func(path, body string, code int, answer string) {
		t.Helper()
		if resp, got := post(t, w.agent, path, body); resp.StatusCode != code || !strings.Contains(got, answer) {
			t.Errorf("%s: %s %.500s\nwant %d %s", path, resp.Status, got, code, answer)
		}
	}
	const command = "/api/runners/r1/command"
	want(command, "{}", http.StatusNotFound, `no runner \"r1\" is assigned`)
	sendMessage(t, w.agent, "m1", "runner_assigned", assignment("r1", runner.URL+"/run?x=y"), false)
	sendMessage(t, w.agent, "m1", "runner_assigned", assignment("r1", runner.URL+"/run?x=y"), true)
	echoed := `POST /run?x=y ["Bearer token-of-r1"] [] {"do":"it"}`
	want(command, `{"do":"it"}`, http.StatusTeapot, echoed)
	want(command+"?a=b", "", http.StatusTeapot, "POST /run?x=y&a=b ")
	want(command, "redirect", http.StatusTemporaryRedirect, "")
	want(command, strings.Repeat("x", 11<<20), http.StatusRequestEntityTooLarge, "larger than 10485760 bytes")
	want("/api/runners/R1/command", "{}", http.StatusNotFound, "no runner")

	// Each line must arrive before the next is written.
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.agent.Tunnel+command,
		strings.NewReader("stream"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+agentToken)
	go func() { lines <- "line 0" }()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer := bufio.NewReader(resp.Body)
	for i := range 3 {
		if line, err := answer.ReadString('\n'); err != nil || line != fmt.Sprintf("line %d\n", i) {
			t.Errorf("got %q, %v", line, err)
		}
		if i < 2 {
			lines <- fmt.Sprintf("line %d", i+1)
		}
	}
	close(lines)

	sendMessage(t, w.agent, "m2", "runner_assigned", assignment("gone", "http://"+harness.FreeAddr(t)+"/"), false)
	want("/api/runners/gone/command", "{}", http.StatusBadGateway, "cannot be reached: dial tcp 127.0.0.1:")
	want(command, "hang", http.StatusGatewayTimeout, "does not answer")

	w.agent.Proxy.Stop()
	if err := w.agent.StartProxy(); err != nil {
		t.Fatal(err)
	}
	w.waitReady()
	want(command, `{"do":"it"}`, http.StatusTeapot, echoed)
	sendMessage(t, w.agent, "m3", "runner_unassigned", `{"runner_id":"r1"}`, false)
	sendMessage(t, w.agent, "m1", "runner_assigned", assignment("r1", runner.URL), true)
	want(command, "{}", http.StatusNotFound, "no runner")
	for _, secret := range []string{"token-of-", agentToken} {
		if strings.Contains(w.agent.Proxy.Log(), secret) {
			t.Errorf("the log holds %q", secret)
		}
	}
}

// TestReplicasShareTheRegistry has two replicas change the registry at the same time. No change is lost.
func TestReplicasShareTheRegistry(t *testing.T) {
	t.Parallel()
	w, ns := connectedWithRunners(t)
	second := *w.agent
	second.Env = slices.Clone(w.agent.Env)
	for i, variable := range []string{"PIPEOPS_LISTEN_ADDR", "PIPEOPS_METRICS_ADDR"} {
		addr := harness.FreeAddr(t)
		second.Env = append(second.Env, variable+"="+addr)
		if i == 0 {
			second.Tunnel = "https://" + addr
		} else {
			second.Operations = "http://" + addr
		}
	}
	if err := second.StartProxy(); err != nil {
		t.Fatal(err)
	}
	if err := second.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	const each = 20
	var group sync.WaitGroup
	for i, a := range []*agent.Agent{w.agent, &second} {
		for n := range each {
			group.Go(func() {
				name := fmt.Sprintf("r-%d-%d", i, n)
				sendMessage(t, a, name, "runner_assigned", assignment(name, "http://runner.a.svc/"), false)
			})
		}
	}
	group.Wait()
	secret, err := api.Client.CoreV1().Secrets(ns).Get(t.Context(), "pipeops-agent-runners", metav1.GetOptions{})
	if err != nil || len(secret.Data) != 2*each+1 {
		t.Errorf("%v: the registry has %d keys, want %d", err, len(secret.Data), 2*each+1)
	}
	var processed []string
	if err := json.Unmarshal(secret.Data["_processed"], &processed); err != nil || len(processed) != 2*each {
		t.Errorf("%v: %d messages are remembered", err, len(processed))
	}
}

// fillRegistry leaves 1,000 bytes free in the registry.
func fillRegistry(t *testing.T, ns string) {
	t.Helper()
	secrets := api.Client.CoreV1().Secrets(ns)
	registry, err := secrets.Get(t.Context(), "pipeops-agent-runners", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	room := 1 << 20
	for _, value := range registry.Data {
		room -= len(value)
	}
	registry.Data["filler"] = make([]byte, room-1000)
	if _, err := secrets.Update(t.Context(), registry, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// TestFullRegistryIsReported checks that an assignment beyond the registry's size is refused, and that runners can
// still be unassigned.
func TestFullRegistryIsReported(t *testing.T) {
	t.Parallel()
	w, ns := connectedWithRunners(t)
	large := assignment("r1", "http://r.a.svc/"+strings.Repeat("x", 2000))
	sendMessage(t, w.agent, "m1", "runner_assigned", large, false)
	fillRegistry(t, ns)
	resp, body := post(t, w.agent, "/api/control-plane/message",
		`{"id":"m2","type":"runner_assigned","data":`+strings.Replace(large, "r1", "r2", 1)+`}`)
	if resp.StatusCode != http.StatusInsufficientStorage || !strings.Contains(body, "the registry of runners is full") {
		t.Errorf("%s %s", resp.Status, body)
	}
	sendMessage(t, w.agent, "m3", "runner_unassigned", `{"runner_id":"r1"}`, false)
	sendMessage(t, w.agent, "m2", "runner_assigned", strings.Replace(large, "r1", "r2", 1), false)
}

// TestRegistryWithoutPermissionIsReported checks that nothing is acknowledged if RBAC forbids the agent to write the
// registry.
func TestRegistryWithoutPermissionIsReported(t *testing.T) {
	t.Parallel()
	w := viewer(t)
	resp, body := post(t, w.agent, "/api/control-plane/message",
		`{"id":"1","type":"runner_assigned","data":`+assignment("r", "http://r.a.svc/")+`}`)
	if resp.StatusCode != http.StatusBadGateway || !strings.Contains(body, `cannot get resource \"secrets\"`) {
		t.Errorf("%s %s", resp.Status, body)
	}
}
