package manifests

import (
	"errors"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

const account = "system:serviceaccount:pipeops-system:pipeops-agent"

// TestComponentsGrantWhatTheySay asks a real API server what the agent may do with each component on top of the base.
func TestComponentsGrantWhatTheySay(t *testing.T) {
	aggregate(t)
	all := variants(t)
	apply(t, all["base"])
	for _, test := range []struct {
		variant  string
		may, not []string // VERB RESOURCE[/NAME] [-n NAMESPACE], as kubectl auth can-i takes it
	}{
		{
			variant: "base",
			may: []string{"list pods -A", "watch deployments.apps -A", "get pods/log -n default", "get nodes", "watch nodes",
				"list namespaces",
				"get configmaps -n default"},
			not: []string{"get secrets -n default", "list secrets -A", "get secret/pipeops-agent -n pipeops-system",
				"create pods/exec -n default",
				"delete pods -n default", "create deployments.apps -n default", "update nodes", "create secrets -n pipeops-system",
				"get secret/pipeops-agent-runners -n pipeops-system", "create serviceaccounts/token -n pipeops-system"},
		},
		{
			variant: "components/manage-all-namespaces",
			may: []string{"create deployments.apps -n default", "delete pods -n default", "create pods/exec -n default",
				"get secrets -n default",
				"impersonate serviceaccounts -n default"}, // which the agent refuses
			not: []string{"update nodes", "delete namespaces", "create clusterrolebindings.rbac.authorization.k8s.io",
				"create rolebindings.rbac.authorization.k8s.io -n default",
				"create clusterroles.rbac.authorization.k8s.io"},
		},
		{
			variant: "components/runners",
			may: []string{"get secret/pipeops-agent-runners -n pipeops-system",
				"update secret/pipeops-agent-runners -n pipeops-system"},
			not: []string{"get secret/pipeops-agent -n pipeops-system", "list secrets -n pipeops-system",
				"create secrets -n pipeops-system",
				"delete secret/pipeops-agent-runners -n pipeops-system", "get secret/pipeops-agent-runners -n default"},
		},
		{
			variant: "components/cluster-admin",
			may:     []string{"* *", "update nodes", "get secrets -A", "create clusterrolebindings.rbac.authorization.k8s.io"},
		},
	} {
		t.Run(test.variant, func(t *testing.T) {
			apply(t, all[test.variant])
			t.Cleanup(func() { removeAdded(t, all["base"], all[test.variant]) })
			if test.variant != "components/cluster-admin" { // which is everything; the agent itself refuses these
				for _, verb := range []string{"get", "create", "*"} {
					test.not = append(test.not, verb+" nodes/proxy")
				}
				test.not = append(test.not, "impersonate users", "impersonate groups")
			}
			for _, question := range test.may {
				if !canI(t, question) {
					t.Errorf("may not %s", question)
				}
			}
			for _, question := range test.not {
				if canI(t, question) {
					t.Errorf("may %s", question)
				}
			}
		})
	}
}

// TestAccessGrantsOneConfigMap takes view away, which includes all ConfigMaps.
func TestAccessGrantsOneConfigMap(t *testing.T) {
	base := variants(t)["base"]
	apply(t, base)
	with(t, "access")
	mustKubectl(t, "", "delete", "clusterrolebinding", "pipeops-agent-view", "pipeops-agent-view-cluster")
	t.Cleanup(func() { apply(t, base) })
	const its = "configmap/pipeops-agent-access -n pipeops-system"
	if !canI(t, "get "+its) {
		t.Error("may not read it")
	}
	for _, verb := range []string{"list", "watch", "create", "update", "patch", "delete", "deletecollection"} {
		if canI(t, verb+" "+its) {
			t.Errorf("may %s it", verb)
		}
	}
	for _, question := range []string{"get configmaps -n pipeops-system", "get configmap/pipeops-agent -n pipeops-system",
		"get configmap/pipeops-agent-access -n default", "get secrets -n pipeops-system"} {
		if canI(t, question) {
			t.Errorf("may %s", question)
		}
	}
}

// TestAccessStaysAsTheOwnerLeftIt applies the component again, in both ways, after its owner has set the switch.
func TestAccessStaysAsTheOwnerLeftIt(t *testing.T) {
	with(t, "access")
	rendering := variants(t)["components/access"]
	for _, doc := range documents(rendering) {
		if strings.HasPrefix(doc, "apiVersion: v1\nkind: ConfigMap\n") { // the only one without data
			rendering = doc
		}
	}
	get := func(key string) string {
		return mustKubectl(t, "", "get", "configmap", "pipeops-agent-access", "-n", "pipeops-system",
			"-o", "jsonpath={.data."+key+"}")
	}
	if allow := get("allow"); allow != "" {
		t.Errorf("a new installation allows %s", allow)
	}
	for _, allow := range []string{"all", "none"} {
		mustKubectl(t, "", "patch", "configmap", "pipeops-agent-access", "-n", "pipeops-system", "-p",
			`{"data": {"allow": "`+allow+`", "reason": "ticket"}}`)
		apply(t, rendering)
		// Its first run adds the annotation of client-side apply, and warns.
		if _, err := kubectl(t, rendering, "apply", "-f", "-"); err != nil {
			t.Fatal(err)
		}
		mustKubectl(t, rendering, "apply", "-f", "-")
		if get("allow") != allow || get("reason") != "ticket" {
			t.Errorf("after an apply it allows %s, because of %s", get("allow"), get("reason"))
		}
	}
}

// TestAgentWorksWithItsPermissions runs a real proxy with the agent's ServiceAccount. It reads a complete status, and
// keeps runners in the component's Secret.
func TestAgentWorksWithItsPermissions(t *testing.T) {
	aggregate(t)
	apply(t, variants(t)["components/runners"])
	t.Cleanup(func() { removeAdded(t, variants(t)["base"], variants(t)["components/runners"]) })
	call := startProxy(t, asAgent(t))
	if status := call(http.StatusOK, "GET", "/api/agent/status", ""); !strings.Contains(status, `"reachable":true`) ||
		strings.Contains(status, `"unavailable":{"`) {
		t.Errorf("a part of the status is missing: %s", status)
	}
	call(http.StatusOK, "POST", "/api/control-plane/message",
		`{"id":"1","type":"runner_assigned","timestamp":"2026-01-01T00:00:00Z","data":{"runner_id":"r-1",`+
			`"runner_endpoint":"http://r.default.svc:1","runner_token":"t","assigned_at":"2026-01-01T00:00:00Z"}}`)
	apply(t, variants(t)["components/runners"]) // again, as an upgrade does
	secret, err := api.Client.CoreV1().Secrets("pipeops-system").Get(t.Context(), "pipeops-agent-runners",
		metav1.GetOptions{})
	if err != nil || secret.Data["r-1"] == nil {
		t.Errorf("the runner is not in the registry: %v, %v", secret, err)
	}
}

// startProxy starts a real proxy with the configuration's credential. The function that it returns makes a call until
// the proxy answers with the wanted status, and returns the answer.
func startProxy(t *testing.T, config *rest.Config) func(want int, method, path, body string) string {
	t.Helper()
	group := harness.NewGroup(t)
	kubeconfig := filepath.Join(group.Dir(), "agent.kubeconfig")
	if err := cluster.WriteKubeconfig(kubeconfig, config); err != nil {
		t.Fatal(err)
	}
	a, err := agent.New(group, &controlplane.ControlPlane{APIURL: "https://none.invalid"}, "agent-001",
		"a-token", kubeconfig)
	if err == nil {
		err = a.StartProxy()
	}
	if err != nil {
		t.Fatal(err)
	}
	plain := strings.Replace(a.Tunnel, "https:", "http:", 1) // without a lease there is no certificate
	return func(want int, method, path, body string) (answer string) {
		t.Helper()
		err := process.Poll(t.Context(), 30*time.Second, a.Proxy.Done(), func() error {
			req, err := http.NewRequestWithContext(t.Context(), method, plain+path, strings.NewReader(body))
			if err != nil {
				return err
			}
			req.Header = http.Header{"Authorization": {"Bearer a-token"}, "Content-Type": {"application/json"}}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				return err
			}
			defer func() { _ = resp.Body.Close() }()
			data, err := io.ReadAll(resp.Body)
			if answer = string(data); err == nil && resp.StatusCode != want {
				err = errors.New(resp.Status + ": " + answer)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return answer
	}
}

// canI asks `kubectl auth can-i` as the agent's ServiceAccount.
func canI(t *testing.T, question string) bool {
	t.Helper()
	args := append([]string{"auth", "can-i", "--as", account}, strings.Fields(question)...)
	// These are RESOURCE/SUBRESOURCE, all others RESOURCE/NAME.
	for i, a := range args {
		if resource, sub, _ := strings.Cut(a, "/"); slices.Contains([]string{"proxy", "log", "exec", "token"}, sub) {
			args[i] = resource
			args = append(args, "--subresource", sub)
		}
	}
	result, _ := kubectl(t, "", args...) // exits with 1 for no
	switch strings.TrimSpace(result.Stdout) {
	case "yes":
		return true
	case "no":
		return false
	}
	t.Fatalf("%s: %+v", question, result)
	return false
}

// removeAdded deletes what a variant adds to the base.
func removeAdded(t *testing.T, base, variant string) {
	t.Helper()
	present := documents(base)
	added := slices.DeleteFunc(documents(variant), func(doc string) bool { return slices.Contains(present, doc) })
	mustKubectl(t, strings.Join(added, "\n---\n"), "delete", "--ignore-not-found", "-f", "-")
}

// aggregate does the controller manager's work: it gives view, edit and admin the rules of the ClusterRoles that they
// select.
func aggregate(t *testing.T) {
	t.Helper()
	roles := api.Client.RbacV1().ClusterRoles()
	for _, name := range []string{"view", "edit", "admin"} { // each selects the previous one's too
		role, err := roles.Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		all, err := roles.List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		role.Rules = nil
		for _, selector := range role.AggregationRule.ClusterRoleSelectors {
			s, err := metav1.LabelSelectorAsSelector(&selector)
			if err != nil {
				t.Fatal(err)
			}
			for _, other := range all.Items {
				if other.Name != name && s.Matches(labels.Set(other.Labels)) {
					role.Rules = append(role.Rules, other.Rules...)
				}
			}
		}
		if _, err := roles.Update(t.Context(), role, metav1.UpdateOptions{}); err != nil || len(role.Rules) == 0 {
			t.Fatalf("%s with %d rules: %v", name, len(role.Rules), err)
		}
	}
}

// TestNoRuleGrantsTooMuch reads the rules of every variant for what `can-i` would not find.
func TestNoRuleGrantsTooMuch(t *testing.T) {
	known := []string{"view", "edit", "admin", "cluster-admin", "pipeops-agent-view-cluster",
		"pipeops-agent-view-cluster-second", "pipeops-agent-runners", "pipeops-agent-access", "pipeops-agent-named",
		"pipeops-agent-read-cluster-kinds", "pipeops-agent-deploy"}
	for path, rendering := range variants(t) {
		for _, doc := range documents(rendering) {
			var object struct {
				Kind     string
				Metadata metav1.ObjectMeta
				Rules    []rbacv1.PolicyRule
				RoleRef  rbacv1.RoleRef
				Subjects []rbacv1.Subject
			}
			if err := yaml.Unmarshal([]byte(doc), &object); err != nil {
				t.Fatal(err)
			}
			what := path + ": " + object.Kind + " " + object.Metadata.Name
			for _, rule := range object.Rules {
				all := slices.Concat(rule.Verbs, rule.Resources, rule.APIGroups)
				if slices.ContainsFunc(rule.Verbs, func(verb string) bool { // the others grant nothing by themselves
					return !strings.HasPrefix(verb, "impersonate-on:user-info:") || strings.HasSuffix(verb, "*")
				}) && slices.Contains(all, "*") || slices.Contains(rule.Resources, "nodes/proxy") {
					t.Errorf("%s grants %v", what, all)
				}
				if verb := rule.Verbs[0]; verb == "impersonate" || verb == "impersonate:user-info" {
					if len(rule.ResourceNames) == 0 || slices.ContainsFunc(rule.ResourceNames, func(name string) bool {
						return !strings.HasPrefix(name, "pipeops:")
					}) {
						t.Errorf("%s may impersonate %v %q", what, rule.Resources, rule.ResourceNames)
					}
				}
				if slices.Contains(rule.Resources, "secrets") && len(rule.ResourceNames) == 0 {
					t.Errorf("%s grants Secrets of any name", what)
				}
			}
			if object.RoleRef.Name != "" && !slices.Contains(known, object.RoleRef.Name) {
				t.Errorf("%s binds %s", what, object.RoleRef.Name)
			}
			if object.RoleRef.Name == "cluster-admin" && path != "components/cluster-admin" {
				t.Errorf("%s binds cluster-admin", what)
			}
			if object.RoleRef.Name == "admin" && path != "components/deploy" {
				t.Errorf("%s binds admin", what)
			}
			if object.RoleRef.Name == "edit" && path != "components/manage-all-namespaces" &&
				(object.Kind != "RoleBinding" || slices.Contains([]string{"", "kube-system", "pipeops-system"},
					object.Metadata.Namespace)) {
				t.Errorf("%s binds edit in %q", what, object.Metadata.Namespace)
			}
			for _, s := range object.Subjects {
				namespace := "pipeops-system"
				if strings.HasPrefix(path, "overlays/tenant") {
					namespace = "team-a-agent"
				}
				if s.Kind+s.Namespace+s.Name != "ServiceAccount"+namespace+"pipeops-agent" {
					t.Errorf("%s is for %v", what, s)
				}
			}
		}
	}
}
