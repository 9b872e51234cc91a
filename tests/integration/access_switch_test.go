package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
)

// levels are those of the owner's ConfigMap, each with all that the one before allows.
var levels = []string{"none", "read", "write", "all"}

const (
	switchEnv   = "PIPEOPS_ACCESS_CONFIG_MAP=access"
	anAccessMap = `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"NAME"},"data":{"allow":"all"}}`
)

// TestTheOwnersSwitchDecides makes requests of all kinds at each level.
func TestTheOwnersSwitchDecides(t *testing.T) {
	t.Parallel()
	w := connectedAs(t, "agent", switchEnv, "PIPEOPS_RUNNERS_ALLOWED_HOSTS=127.0.0.1")
	core, inNamespace := "/api/k8s/api/v1/", "/api/k8s/api/v1/namespaces/"+w.ns
	review := func(group, kind string) (string, string) {
		return "/api/k8s/apis/" + group + ".k8s.io/v1/" + strings.ToLower(kind) + "s",
			`{"apiVersion":"` + group + `.k8s.io/v1","kind":"` + kind + `","spec":{` + map[string]string{
				"SelfSubjectAccessReview": `"resourceAttributes":{"verb":"get","resource":"pods"}`,
				"SelfSubjectRulesReview":  `"namespace":"default"`}[kind] + `}}`
	}
	accessReview, access := review("authorization", "SelfSubjectAccessReview")
	rulesReview, rules := review("authorization", "SelfSubjectRulesReview")
	selfReview, self := review("authentication", "SelfSubjectReview")
	object := strings.Replace(anAccessMap, "NAME", "thing", 1)
	message := func(id, kind, data string) string {
		return fmt.Sprintf(`{"id":%q,"type":%q,"timestamp":"2026-01-02T03:04:05Z","data":%s}`, id, kind, data)
	}
	cases := []struct{ level, method, path, body string }{
		{"none", "GET", "/health", ""},
		{"none", "GET", "/ready", ""},
		{"none", "GET", "/version", ""},
		{"none", "GET", "/api/agent/status", ""},
		{"none", "POST", "/api/agent/heartbeat", ""},
		{"none", "POST", "/api/control-plane/message", message("ping", "ping", "{}")},
		{"read", "GET", inNamespace + "/configmaps", ""},
		{"read", "GET", inNamespace + "/configmaps/none", ""},
		{"read", "HEAD", inNamespace + "/configmaps", ""},
		{"read", "GET", inNamespace + "/configmaps?watch=true&timeoutSeconds=1", ""},
		{"read", "GET", inNamespace + "/pods/none/log", ""},
		{"read", "GET", "/api/k8s/version", ""},
		{"read", "GET", "/api/k8s/apis", ""},
		{"read", "GET", "/api/k8s/openapi/v3", ""},
		{"read", "POST", accessReview, access},
		{"read", "POST", rulesReview, rules},
		{"read", "POST", selfReview, self},
		{"write", "POST", "/api/k8s/apis/authorization.k8s.io/v1/subjectaccessreviews", "{}"},
		{"write", "POST", inNamespace + "/configmaps?dryRun=All", object},
		{"write", "POST", inNamespace + "/configmaps", object},
		{"write", "PUT", inNamespace + "/configmaps/none", object},
		{"write", "PATCH", inNamespace + "/configmaps/none", "{}"},
		{"write", "DELETE", inNamespace + "/configmaps/none", ""},
		{"write", "DELETE", inNamespace + "/configmaps?labelSelector=a%3Db", ""},
		{"write", "POST", inNamespace + "/pods/none/eviction", "{}"},
		{"write", "POST", "/api/control-plane/message", message("unassign", "runner_unassigned", `{"runner_id":"r"}`)},
		{"write", "POST", "/api/control-plane/message", message("assign", "runner_assigned",
			assignment("r", "http://127.0.0.1:1/"))},
		{"all", "GET", inNamespace + "/services/none/proxy/", ""},
		{"all", "GET", inNamespace + "/services/none/proxy/watch?watch=true", ""},
		{"all", "POST", inNamespace + "/pods/none/proxy/", ""},
		{"all", "GET", inNamespace + "/pods/none/exec?command=ls", ""},
		{"all", "POST", inNamespace + "/pods/none/exec?command=ls", ""},
		{"all", "GET", inNamespace + "/pods/none/attach", ""},
		{"all", "POST", inNamespace + "/pods/none/portforward", ""},
		{"all", "GET", core + "watch/namespaces/" + w.ns + "/pods/none/exec", ""},
		{"all", "POST", "/api/runners/unknown/command", "{}"},
	}
	w.wantSwitch("all", "allow=all")
	for rank, level := range levels {
		w.wantSwitch(level, "allow="+level, "reason=audit 7")
		for _, c := range cases {
			allowed := rank >= slices.Index(levels, c.level)
			code, body := w.call(c.method, c.path, c.body)
			refused := code == http.StatusForbidden && (c.method == "HEAD" || strings.Contains(body, w.home+"/access"))
			if refused == allowed || !allowed && c.method != "HEAD" && !strings.Contains(body, "audit 7") {
				t.Errorf("level %s, %s %s: %d: %s", level, c.method, c.path, code, body)
			}
			if refused && strings.HasPrefix(c.path, "/api/k8s/") && c.method != "HEAD" {
				var status metav1.Status
				if err := json.Unmarshal([]byte(body), &status); err != nil || status.Reason != metav1.StatusReasonForbidden {
					t.Errorf("%s %s: no Status: %s", c.method, c.path, body)
				}
			}
		}
		var report struct {
			Access struct {
				Identity, Allow, Reason string
				OwnNamespace            string `json:"own_namespace"`
			}
		}
		_, text := w.call(http.MethodGet, "/api/agent/status", "")
		if err := json.Unmarshal([]byte(text), &report); err != nil || report.Access.Allow != level ||
			report.Access.Identity != "agent" || report.Access.Reason != "audit 7" || report.Access.OwnNamespace != "closed" {
			t.Errorf("level %s: the status says %+v, %v", level, report.Access, err)
		}
	}
}

// TestTheOwnersSwitchEndsWhatRuns narrows the access while a kubectl, a JSON and a protobuf watch, and an exec run.
func TestTheOwnersSwitchEndsWhatRuns(t *testing.T) {
	t.Parallel()
	w := newAccessWorld(t, "named", switchEnv)
	runningPod(t, w.ns)
	writeSwitch(t, api.Client, w.home, "allow=all")
	w.startAgent()
	w.wantLevel("all")
	path := "/api/k8s/api/v1/namespaces/" + w.ns + "/configmaps?watch=true"
	watch1, protobuf := w.open(path, w.header("alice")), w.header("alice")
	protobuf.Set("Accept", "application/vnd.kubernetes.protobuf;stream=watch")
	watch2 := w.open(path, protobuf)
	config := agent.Caller(w.cp, agentID, w.token)
	config.ContentType = "application/vnd.kubernetes.protobuf"
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	typed, err := client.CoreV1().ConfigMaps(w.ns).Watch(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer typed.Stop()
	session := startSession(t, w.world, w.ns)

	w.wantSwitch("read", "allow=read", "reason=audit 7") // the exec ends, and nothing else
	if _, err := session.out.ReadString('\n'); err == nil || !session.wasCut() {
		t.Errorf("the exec goes on: %v", err)
	}
	create(t, w.ns, "seen", 1)
	if event := <-typed.ResultChan(); event.Type != watch.Added {
		t.Errorf("a watch that may go on got %+v", event)
	}
	if !runs(watch1.ended) || !runs(watch2.ended) {
		t.Error("a watch that may go on has ended")
	}

	start := time.Now()
	w.wantSwitch("none", "allow=none", "reason=audit 8")
	for what, stream := range map[string]*running{"JSON": watch1, "protobuf": watch2} {
		stream.wantEnd(t, "the watch in "+what, true)
	}
	if late := time.Since(start); late > 6*time.Second { // 3 s, and a busy machine
		t.Errorf("the watches ended after %s", late)
	}
	lines := strings.Split(strings.TrimSpace(string(watch1.read)), "\n")
	var last struct {
		Type   string
		Object metav1.Status
	}
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil || last.Type != "ERROR" ||
		last.Object.Code != http.StatusForbidden || !strings.Contains(last.Object.Message, "audit 8") {
		t.Errorf("the last event is %s", lines[len(lines)-1])
	}
	for event := range typed.ResultChan() {
		t.Errorf("client-go got %+v", event)
	}
	r := w.kubectl(w.caller, "", "get", "--raw", "/api/v1/pods")
	if r.Code == 0 || !strings.Contains(r.Stderr, "audit 8") || !strings.Contains(r.Stderr, w.home+"/access") {
		t.Errorf("kubectl: %+v", r)
	}
	wantMetric(t, w.agent, `pipeops_agent_streams_ended_total{reason="switch"} 4`)
}

// TestASwitchThatCannotBeReadIsOff checks each way in which the owner's ConfigMap may be unusable.
func TestASwitchThatCannotBeReadIsOff(t *testing.T) {
	t.Parallel()
	w := connectedAs(t, "agent", switchEnv)
	list := "/api/k8s/api/v1/namespaces/" + w.ns + "/configmaps"
	w.wantLevel("none") // there is no ConfigMap yet
	if code, body := w.call(http.MethodGet, list, ""); code != http.StatusForbidden ||
		!strings.Contains(body, w.home+"/access") {
		t.Errorf("no ConfigMap: %d: %s", code, body)
	}
	for _, data := range [][]string{{}, {"allow=everything"}, {"allow=all", "until=tomorrow"}, {"allow=all", "Reason=x"}} {
		w.wantSwitch("all", "allow=all", "until="+time.Now().Add(time.Hour).UTC().Format(time.RFC3339), "reason=x")
		w.wantSwitch("none", data...)
		if code, body := w.call(http.MethodGet, list, ""); code != http.StatusForbidden {
			t.Errorf("%v: %d: %s", data, code, body)
		}
	}

	until := time.Now().Add(5 * time.Second).UTC().Truncate(time.Second).Format(time.RFC3339)
	w.wantSwitch("all", "allow=all", "until="+until)
	w.wantLevel("none")
	if code, body := w.call(http.MethodGet, list, ""); code != http.StatusForbidden || !strings.Contains(body, until) {
		t.Errorf("after until: %d: %s", code, body)
	}

	w.wantSwitch("all", "allow=all")
	bindings := api.Client.RbacV1().ClusterRoleBindings()
	if err := bindings.Delete(t.Context(), w.home+"-agent-"+agentRole, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	w.wantLevel("none")
	w.bind("", agentRole, w.subject("agent"))
	w.wantLevel("all")
}

// TestTheSwitchHoldsWithoutTheAPIServer freezes the API server. The last level holds, and ends in time.
func TestTheSwitchHoldsWithoutTheAPIServer(t *testing.T) {
	t.Parallel()
	own, err := cluster.Start(t.Context(), harness.NewGroup(t))
	if err != nil {
		t.Fatal(err)
	}
	unread := startedWithAPIServer(t, func(c *rest.Config) { c.Host = "https://" + harness.FreeAddr(t) }, switchEnv)
	w := &accessWorld{identity: "agent", home: "default", ns: "default"}
	w.world = startedWithAPIServer(t, func(c *rest.Config) { *c = *own.Config }, switchEnv, "PIPEOPS_NAMESPACE=default")
	w.waitReady()
	frozen := func(signal syscall.Signal) {
		t.Helper()
		if err := syscall.Kill(own.APIServer.Pid(), signal); err != nil {
			t.Fatal(err)
		}
	}
	const list = "/api/k8s/api/v1/namespaces/default/pods"
	client := own.Client
	until := time.Now().Add(15 * time.Second).UTC().Truncate(time.Second) // longer than a reading may take
	writeSwitch(t, client, "default", "allow=read", "until="+until.Format(time.RFC3339))
	w.wantLevel("read")
	frozen(syscall.SIGSTOP)
	t.Cleanup(func() { frozen(syscall.SIGCONT) })
	eventually(t, func() error {
		sent := time.Now()
		code, body := w.call(http.MethodPost, list, "{}")
		switch over := strings.Contains(body, ", has passed"); {
		case code != http.StatusForbidden, over && time.Now().Before(until), !over && sent.After(until),
			!over && !strings.Contains(body, `"read\"`):
			t.Fatalf("until is %s, asked at %s: %d: %s", until, sent, code, body)
		case !over:
			return errors.New("its until has not passed")
		}
		return nil
	})
	w.wantLevel("none")
	frozen(syscall.SIGCONT)
	eventually(t, func() error {
		_, err := client.Discovery().ServerVersion()
		return err
	})
	writeSwitch(t, client, "default", "allow=read")
	w.wantLevel("read")

	other := &accessWorld{world: unread, identity: "agent"}
	if code, body := other.call(http.MethodGet, list, ""); code != http.StatusForbidden {
		t.Errorf("before the first reading: %d: %s", code, body)
	}
}

// TestTheAgentsNamespaceIsClosed tries to widen the access through the tunnel, with everything that RBAC lets the agent
// do.
func TestTheAgentsNamespaceIsClosed(t *testing.T) {
	t.Parallel()
	for _, setting := range []string{"closed", "open"} {
		t.Run(setting, func(t *testing.T) {
			t.Parallel()
			w := newAccessWorld(t, "agent", switchEnv, "PIPEOPS_ACCESS_OWN_NAMESPACE="+setting)
			w.bind(w.home, "cluster-admin", w.subject("agent"))
			writeSwitch(t, api.Client, w.home, "allow=all")
			before, err := api.Client.CoreV1().ConfigMaps(w.home).Get(t.Context(), "access", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			w.startAgent()
			w.wantLevel("all")
			home := "/api/k8s/api/v1/namespaces/" + w.home
			const configMap, ownNamespace, open, either = "access", "own namespace", "", "either"
			for _, c := range []struct{ closedBy, method, path, body string }{
				{configMap, "PUT", home + "/configmaps/access", anAccessMap},
				{configMap, "PATCH", home + "/configmaps/access", `{"data":{"allow":"all"}}`},
				{configMap, "PATCH", home + "/configmaps/access?dryRun=All", `{"data":{"allow":"all"}}`},
				{either, "PATCH", "/api/k8s//api/v1/namespaces/" + w.home + "/configmaps/access/", `{}`},
				{configMap, "PATCH", home + "/configmaps/%61ccess", `{}`},
				{configMap, "DELETE", home + "/configmaps/access", ""},
				{configMap, "DELETE", home + "/configmaps", ""},
				{configMap, "DELETE", home + "/configmaps?fieldSelector=metadata.name%3Daccess", ""},
				{configMap, "POST", home + "/configmaps", strings.Replace(anAccessMap, "NAME", "other", 1)},
				{ownNamespace, "DELETE", home + "/configmaps/other", ""},
				{ownNamespace, "POST", home + "/services", `{"metadata":{"name":"s"},"spec":{"ports":[{"port":1}]}}`},
				{ownNamespace, "PATCH", home, `{"metadata":{"labels":{"a":"b"}}}`},
				{ownNamespace, "PUT", home + "/finalize", "{}"},
				{ownNamespace, "DELETE", home + "?dryRun=All", ""},
				{ownNamespace, "GET", "/api/k8s/api/v1/watch/namespaces/" + w.home + "/secrets?timeoutSeconds=1", ""},
				{ownNamespace, "GET", home + "/secrets", ""},
				{ownNamespace, "GET", home + "/secrets/none", ""},
				{ownNamespace, "GET", home + "/secrets?watch=true&timeoutSeconds=1", ""},
				{ownNamespace, "GET", home + "/pods/none/exec?command=ls", ""},
				{ownNamespace, "GET", home + "/services/none/proxy/", ""},
				{ownNamespace, "GET", home + "/pods/none/portforward", ""},
				{open, "GET", home + "/configmaps/access", ""},
				{open, "GET", home + "/pods", ""},
				{open, "GET", home, ""},
				{open, "POST", "/api/k8s/api/v1/namespaces/" + w.ns + "/configmaps", strings.Replace(anAccessMap, "NAME", "access", 1)},
			} {
				header := w.header("alice")
				header.Set("Content-Type", "application/json")
				if c.method == http.MethodPatch {
					header.Set("Content-Type", "application/merge-patch+json")
				}
				resp, body := exchange(t, asItIs, c.method, w.agent.Tunnel+c.path, header, c.body)
				events := reached(t, resp.Header.Get("X-Request-Id"))
				closed := c.closedBy == configMap || c.closedBy == ownNamespace && setting == "closed"
				if c.closedBy == either {
					continue // no server of Kubernetes reads such a path
				}
				if closed && (resp.StatusCode != http.StatusForbidden || len(events) > 0) ||
					!closed && (resp.StatusCode == http.StatusForbidden || len(events) == 0) {
					t.Errorf("%s %s: %s: %s; audit: %v", c.method, c.path, resp.Status, body, events)
				}
			}
			object, err := api.Client.CoreV1().ConfigMaps(w.home).Get(t.Context(), "access", metav1.GetOptions{})
			if err != nil || object.ResourceVersion != before.ResourceVersion {
				t.Errorf("the ConfigMap was changed: %+v, %v", object, err)
			}
		})
	}
}
