package manifests

import (
	"maps"
	"net/http"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/pipeops/vm-agent/tests/harness/cluster"
)

// tenantNamespace is the agent's namespace in overlays/tenant, which somebody else has made.
const tenantNamespace = `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-a-agent",
	"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}`

// readers are the verbs that change nothing.
var readers = []string{"get", "list", "watch"}

// rights returns what `kubectl auth can-i --list` prints for a user in a namespace, as VERB RESOURCE[/NAME] or
// VERB URL.
func rights(t *testing.T, user, namespace string) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	row := regexp.MustCompile(`^(\S*)\s+\[(.*?)\]\s+\[(.*?)\]\s+\[(.*?)\]$`)
	list := mustKubectl(t, "", "auth", "can-i", "--list", "--no-headers", "--as", user, "-n", namespace)
	for line := range strings.Lines(list) {
		columns := row.FindStringSubmatch(strings.TrimSpace(line))
		if columns == nil { // a row without a resource begins with spaces
			columns = row.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		}
		if columns == nil {
			t.Fatalf("not a row: %q", line)
		}
		for verb := range strings.FieldsSeq(columns[4]) {
			for url := range strings.FieldsSeq(columns[2]) {
				found[verb+" "+url] = true
			}
			names := strings.Fields(columns[3])
			for _, name := range names {
				found[verb+" "+columns[1]+"/"+name] = true
			}
			if columns[1] != "" && len(names) == 0 {
				found[verb+" "+columns[1]] = true
			}
		}
	}
	return found
}

// added returns the rights that are not among others, sorted.
func added(rights, others map[string]bool) []string {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(rights)), func(right string) bool { return others[right] })
}

// anybody is a user who has no rights but those of every authenticated one.
const anybody = "system:serviceaccount:default:nobody"

// TestTiersGrantWhatTheySay lists all that the agent may do in each tier.
func TestTiersGrantWhatTheySay(t *testing.T) {
	aggregate(t)
	base := variants(t)["base"]
	apply(t, base)
	apply(t, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-a"}}`)
	clusterKinds := strings.Fields(mustKubectl(t, "", "api-resources", "--namespaced=false", "--verbs=list",
		"-o", "name"))
	reading := rights(t, account, "default")
	discovery := rights(t, anybody, "default")

	// writes returns the resources of which the rights change some.
	writes := func(rights []string) (resources []string) {
		for _, right := range rights {
			if verb, resource, _ := strings.Cut(right, " "); !slices.Contains(readers, verb) {
				resources = append(resources, resource)
			}
		}
		slices.Sort(resources)
		return slices.Compact(resources)
	}
	// clusterWrites returns the cluster-scoped ones of them.
	clusterWrites := func(rights []string) []string {
		return slices.DeleteFunc(writes(rights), func(resource string) bool {
			return !slices.Contains(clusterKinds, resource)
		})
	}
	has := func(t *testing.T, rights map[string]bool, wanted ...string) {
		t.Helper()
		for _, right := range wanted {
			if !rights[right] {
				t.Errorf("may not %s", right)
			}
		}
	}
	never := func(t *testing.T, rights map[string]bool) {
		t.Helper()
		for right := range rights {
			verb, resource, _ := strings.Cut(right, " ")
			if strings.Contains(right, "*.*") || resource == "nodes/proxy" || verb == "escalate" || verb == "bind" ||
				verb == "impersonate" && resource != "serviceaccounts" {
				t.Errorf("may %s", right)
			}
		}
	}

	t.Run("read", func(t *testing.T) {
		never(t, reading)
		has(t, reading, "list pods", "watch deployments.apps", "get pods/log", "list nodes", "list namespaces")
		more := added(reading, discovery)
		if w := writes(more); len(w) > 0 {
			t.Errorf("changes %v", w)
		}
		for _, right := range more {
			if strings.Contains(right, " secrets") {
				t.Errorf("may %s", right)
			}
		}
	})
	t.Run("read and cluster-scoped kinds", func(t *testing.T) {
		with(t, "read-cluster-kinds")
		more := added(rights(t, account, "default"), reading)
		if w := writes(more); len(w) > 0 {
			t.Errorf("changes %v", w)
		}
		for _, kind := range clusterKinds {
			for _, verb := range readers {
				if right := verb + " " + kind; !reading[right] && !slices.Contains(more, right) {
					t.Errorf("may not %s", right)
				}
			}
		}
		namespaced := strings.Fields(mustKubectl(t, "", "api-resources", "--namespaced", "-o", "name"))
		for _, right := range more { // another version of Kubernetes may lack some of the kinds
			if _, resource, _ := strings.Cut(right, " "); slices.Contains(namespaced, resource) {
				t.Errorf("may %s", right)
			}
		}
	})
	t.Run("namespaces", func(t *testing.T) {
		file := string(read(t, filepath.Join(source, "overlays", "production", "manage-namespaces.yaml")))
		apply(t, file)
		t.Cleanup(func() { mustKubectl(t, file, "delete", "-f", "-") })
		team := rights(t, account, "team-a")
		never(t, team)
		has(t, team, "create deployments.apps", "delete pods", "create pods/exec", "get secrets", "list nodes")
		if w := clusterWrites(added(team, reading)); len(w) > 0 {
			t.Errorf("changes %v", w)
		}
		if diff := cmp.Diff(reading, rights(t, account, "default")); diff != "" {
			t.Errorf("in another namespace (-base +with)\n%s", diff)
		}
	})
	t.Run("deploy", func(t *testing.T) {
		with(t, "deploy")
		all := rights(t, account, "default")
		never(t, all)
		has(t, all, "create deployments.apps", "create secrets", "create roles.rbac.authorization.k8s.io",
			"create namespaces", "delete namespaces", "patch customresourcedefinitions.apiextensions.k8s.io")
		want := []string{"customresourcedefinitions.apiextensions.k8s.io", "namespaces"}
		if diff := cmp.Diff(want, clusterWrites(added(all, reading))); diff != "" {
			t.Errorf("cluster-scoped kinds that it changes (-want +got)\n%s", diff)
		}
		role := `{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "deployed"},
			"rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["delete"]}]}`
		mustKubectl(t, role, "create", "--dry-run=server", "--as", account, "-n", "default", "-f", "-")
		more := strings.Replace(role, `"pods"`, `"nodes"`, 1)
		_, err := kubectl(t, more, "create", "--dry-run=server", "--as", account, "-n", "default", "-f", "-")
		if err == nil || !strings.Contains(err.Error(), "attempting to grant RBAC permissions not currently held") {
			t.Errorf("a Role with more rights than its own: %v", err)
		}
	})
	t.Run("cluster-admin", func(t *testing.T) {
		with(t, "cluster-admin")
		has(t, rights(t, account, "default"), "* *.*", "* *")
	})
}

// TestTenantNeedsNoClusterRights applies overlays/tenant as somebody who has ClusterRole admin in two namespaces, and
// nothing else. The agent may use discovery, its switch, and the namespace that is listed. Its removal leaves the agent
// of the cluster as it is.
func TestTenantNeedsNoClusterRights(t *testing.T) {
	aggregate(t)
	base := variants(t)["base"]
	apply(t, base)
	apply(t, tenantNamespace)
	apply(t, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-a"}}`)
	for _, ns := range []string{"team-a", "team-a-agent"} {
		binding := mustKubectl(t, "", "create", "rolebinding", "tenant", "--clusterrole=admin", "--user=tenant", "-n", ns,
			"--dry-run=client", "-o", "yaml")
		apply(t, binding)
		t.Cleanup(func() { mustKubectl(t, binding, "delete", "-f", "-") })
	}
	before := versions(t, base)
	rendering := variants(t)["overlays/tenant"]
	as := func(how string) { mustKubectl(t, rendering, how, "--as", "tenant", "--as-group", "tenants", "-f", "-") }
	as("apply")
	t.Cleanup(func() { mustKubectl(t, rendering, "delete", "--ignore-not-found", "-f", "-") })

	const tenant = "system:serviceaccount:team-a-agent:pipeops-agent"
	discovery := rights(t, anybody, "default")
	for ns, want := range map[string][]string{"default": {}, "kube-system": {},
		"team-a-agent": {"get configmaps/pipeops-agent-access"}} {
		if diff := cmp.Diff(want, added(rights(t, tenant, ns), discovery)); diff != "" {
			t.Errorf("in %s (-want +got)\n%s", ns, diff)
		}
	}
	team := rights(t, tenant, "team-a")
	for _, right := range []string{"list pods", "create deployments.apps", "create pods/exec"} {
		if !team[right] {
			t.Errorf("may not %s in team-a", right)
		}
	}
	call := startProxy(t, asAgentIn(t, "team-a-agent"))
	for path, want := range map[string]int{
		"/version": http.StatusOK, "/apis": http.StatusOK, "/api/v1/namespaces/team-a/pods": http.StatusOK,
		"/api/v1/namespaces/default/pods": http.StatusForbidden, "/api/v1/pods": http.StatusForbidden,
		"/api/v1/namespaces": http.StatusForbidden, "/api/v1/nodes": http.StatusForbidden,
	} {
		call(want, "GET", "/api/k8s"+path, "")
	}
	if status := call(http.StatusOK, "GET", "/api/agent/status", ""); !strings.Contains(status, `"reachable":true`) {
		t.Errorf("its status: %s", status)
	}
	as("delete")
	if diff := cmp.Diff(before, versions(t, base)); diff != "" {
		t.Errorf("the agent of the cluster (-before +after)\n%s", diff)
	}
}

// TestNamespacedHasNoClusterScopedObject renders it with every component that goes with it.
func TestNamespacedHasNoClusterScopedObject(t *testing.T) {
	dir := installation(t)
	overlay := filepath.Join(dir, "overlays", "other")
	kustomization := "namespace: other\nresources: [../../base]\ncomponents:\n"
	for _, name := range []string{"namespaced", "access", "runners", "high-availability", "network-policy", "openshift",
		"monitoring", "monitoring-probe", "monitoring-service-monitor"} {
		kustomization += "- ../../components/" + name + "\n"
	}
	write(t, filepath.Join(overlay, "kustomization.yaml"), kustomization)
	for _, doc := range documents(build(t, overlay)) {
		var object metav1.PartialObjectMetadata
		if err := yaml.Unmarshal([]byte(doc), &object); err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(object.Kind, "Cluster") || object.Namespace != "other" {
			t.Errorf("%s %s in namespace %q", object.Kind, object.Name, object.Namespace)
		}
	}
}

// TestRemovalOfOneAgentLeavesTheOther applies two agents with every component. It removes each in turn, as the install
// page says.
func TestRemovalOfOneAgentLeavesTheOther(t *testing.T) {
	aggregate(t)
	apply(t, cluster.PrometheusOperatorKinds)
	mustKubectl(t, cluster.PrometheusOperatorKinds, "wait", "--for", "condition=Established", "-f", "-")
	type agent struct {
		namespace, selected      string
		last                     []string
		objects, namespaceObject string
	}
	agents := []*agent{{namespace: "pipeops-system", selected: "!=second"},
		{namespace: "another", selected: "=second", last: []string{"suffix"}}}
	for _, a := range agents {
		for _, doc := range documents(supported(build(t, everyComponent(t, a.namespace, a.last...)))) {
			if strings.Contains(doc, "\nkind: Namespace\n") {
				a.namespaceObject = doc // without a controller manager, one that is deleted stays in termination
			} else {
				a.objects += doc + "\n---\n"
			}
		}
		apply(t, a.namespaceObject)
		apply(t, a.objects)
		t.Cleanup(func() { mustKubectl(t, a.objects, "delete", "--ignore-not-found", "-f", "-") })
	}
	for n, a := range agents {
		other := agents[1-n]
		user := "system:serviceaccount:" + other.namespace + ":pipeops-agent"
		before, might := versions(t, other.objects), rights(t, user, other.namespace)
		kinds := "clusterrole,clusterrolebinding,priorityclass"
		if api.Supports("guard") {
			kinds += ",validatingadmissionpolicy,validatingadmissionpolicybinding"
		}
		mustKubectl(t, "", "delete", kinds, "-l", "app.kubernetes.io/name=pipeops-agent,pipeops.io/agent"+a.selected)
		mustKubectl(t, a.objects, "delete", "--ignore-not-found", "-f", "-") // what goes with its namespace
		if diff := cmp.Diff(before, versions(t, other.objects)); diff != "" {
			t.Errorf("without the agent in %s (-before +after)\n%s", a.namespace, diff)
		}
		if diff := cmp.Diff(might, rights(t, user, other.namespace)); diff != "" || !might["* *.*"] {
			t.Errorf("the rights of the agent in %s, which were %d (-before +after)\n%s", other.namespace, len(might), diff)
		}
		apply(t, a.objects)
	}
}

// TestSuffixRenamesConsistently checks that two agents with every component share no object, and that what refers to a
// renamed object follows.
func TestSuffixRenamesConsistently(t *testing.T) {
	type object struct {
		metav1.PartialObjectMetadata `json:",inline"`

		RoleRef struct{ Name string }
		Spec    struct {
			PolicyName string
			Template   struct {
				Spec struct{ PriorityClassName string }
			}
		}
	}
	id := func(o object) string { return o.Kind + " " + o.Namespace + "/" + o.Name }
	load := func(dir string) map[string]object {
		all := map[string]object{}
		for _, doc := range documents(build(t, dir)) {
			var o object
			if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
				t.Fatal(err)
			}
			if strings.HasPrefix(o.Kind, "ValidatingAdmissionPolicy") {
				o.Namespace = "" // kustomize sets one, and the API server ignores it
			}
			all[id(o)] = o
		}
		return all
	}
	first, second := load(everyComponent(t, "one")), load(everyComponent(t, "two", "suffix"))
	if len(first) != len(second) || len(first) < 30 {
		t.Errorf("%d objects, with the suffix %d", len(first), len(second))
	}
	notOurs := []string{"view", "edit", "admin", "cluster-admin"}
	references := 0
	for name, o := range second {
		if _, both := first[name]; both {
			t.Errorf("both have %s", name)
		}
		if o.Namespace == "" && o.Kind != "Namespace" && o.Labels["pipeops.io/agent"] != "second" {
			t.Errorf("%s has the labels %v", name, o.Labels)
		}
		for _, reference := range []object{
			{PartialObjectMetadata: metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{Kind: map[string]string{
				"ClusterRoleBinding": "ClusterRole", "RoleBinding": "Role"}[o.Kind]},
				ObjectMeta: metav1.ObjectMeta{Name: o.RoleRef.Name, Namespace: o.Namespace}}},
			{PartialObjectMetadata: metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{Kind: "ValidatingAdmissionPolicy"},
				ObjectMeta: metav1.ObjectMeta{Name: o.Spec.PolicyName}}},
			{PartialObjectMetadata: metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{Kind: "PriorityClass"},
				ObjectMeta: metav1.ObjectMeta{Name: o.Spec.Template.Spec.PriorityClassName}}},
		} {
			if reference.Name == "" || slices.Contains(notOurs, reference.Name) {
				continue
			}
			references++
			if _, present := second[id(reference)]; !present {
				t.Errorf("%s refers to %s, which does not exist", name, id(reference))
			}
		}
	}
	if references < 8 {
		t.Errorf("%d references", references)
	}
}
