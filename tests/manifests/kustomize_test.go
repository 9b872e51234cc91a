package manifests

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	psa "k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
	"sigs.k8s.io/yaml"

	"github.com/pipeops/vm-agent/tests/harness/cluster"
)

// build returns what `kubectl apply -k` would send.
func build(t *testing.T, dir string) string {
	t.Helper()
	return mustKubectl(t, "", "kustomize", dir)
}

var rendered map[string]string

// variants renders everything that can be applied: each kustomization, and each component on top of the base.
func variants(t *testing.T) map[string]string {
	t.Helper()
	if rendered != nil {
		return rendered
	}
	dir, all := installation(t), map[string]string{}
	for _, path := range kustomizations(t, dir, "Kustomization") {
		all[path] = build(t, filepath.Join(dir, path))
	}
	for _, path := range kustomizations(t, dir, "Component") {
		overlay := filepath.Join(dir, "with", filepath.Base(path))
		write(t, filepath.Join(overlay, "kustomization.yaml"), "resources: [../../base]\ncomponents: [../../"+path+"]\n")
		all[path] = build(t, overlay)
	}
	rendered = all
	return all
}

func documents(rendering string) []string {
	return strings.Split(strings.TrimSpace(rendering), "\n---\n")
}

// TestManifestsRenderAsReviewed compares each rendering with testdata, which somebody has reviewed. For a component
// it compares what the component adds to the base.
func TestManifestsRenderAsReviewed(t *testing.T) {
	all := variants(t)
	base := documents(all["base"])
	for path, got := range all {
		t.Run(path, func(t *testing.T) {
			if strings.HasPrefix(path, "components/") {
				got = strings.Join(slices.DeleteFunc(documents(got), func(d string) bool {
					// without the dashboard, which is a copy of its file
					return slices.Contains(base, d) || strings.Contains(d, "\n  pipeops-agent.json: |")
				}), "\n---\n") + "\n"
			}
			name := "root"
			if path != "." {
				name = strings.ReplaceAll(path, "/", "-")
			}
			golden := filepath.Join("testdata", name+".yaml")
			if *update {
				write(t, golden, got)
			}
			want, err := os.ReadFile(golden)
			if diff := cmp.Diff(string(want), got); err != nil || diff != "" {
				t.Errorf("%v (-want +got)\n%s\n(go test ./manifests -args -update rewrites it)", err, diff)
			}
		})
	}
}

func deployments(t *testing.T, rendering string) []appsv1.Deployment {
	t.Helper()
	return objects[appsv1.Deployment](t, rendering, "Deployment")
}

// objects decodes a rendering's objects of a kind. An unknown field is an error.
func objects[T any](t *testing.T, rendering, kind string) (found []T) {
	t.Helper()
	for _, doc := range documents(rendering) {
		var meta metav1.TypeMeta
		if err := yaml.Unmarshal([]byte(doc), &meta); err != nil {
			t.Fatal(err)
		}
		if meta.Kind == kind {
			var object T
			if err := yaml.UnmarshalStrict([]byte(doc), &object); err != nil {
				t.Fatal(err)
			}
			found = append(found, object)
		}
	}
	return found
}

func containers(spec corev1.PodSpec) []corev1.Container {
	return slices.Concat(spec.InitContainers, spec.Containers)
}

var pinned = regexp.MustCompile(`^[a-z0-9.-]+\.[a-z]+/[^:@]+:v\d+\.\d+\.\d+(@sha256:[0-9a-f]{64})?$`)

func TestPodsFollowTheSecurityRules(t *testing.T) {
	evaluator, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for path, rendering := range variants(t) {
		t.Run(path, func(t *testing.T) {
			found := deployments(t, rendering)
			if len(found) != 1 {
				t.Fatalf("%d Deployments", len(found))
			}
			pod := found[0].Spec.Template
			restricted := psa.LevelVersion{Level: psa.LevelRestricted, Version: psa.LatestVersion()}
			if result := policy.AggregateCheckResults(evaluator.EvaluatePod(restricted, &pod.ObjectMeta,
				&pod.Spec)); !result.Allowed {
				t.Errorf("not restricted: %s", result.ForbiddenDetail())
			}
			if pod.Spec.AutomountServiceAccountToken == nil || *pod.Spec.AutomountServiceAccountToken {
				t.Error("every container gets the API token")
			}
			for _, c := range containers(pod.Spec) {
				if c.SecurityContext == nil || c.SecurityContext.ReadOnlyRootFilesystem == nil ||
					!*c.SecurityContext.ReadOnlyRootFilesystem {
					t.Errorf("%s may write to its file system", c.Name)
				}
				if c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() ||
					c.Resources.Limits.Memory().IsZero() {
					t.Errorf("%s lacks requests or a memory limit", c.Name)
				}
				if !pinned.MatchString(c.Image) {
					t.Errorf("the image %s is not named in full, with a version", c.Image)
				}
				if c.TerminationMessagePolicy != corev1.TerminationMessageFallbackToLogsOnError {
					t.Errorf("nobody is told why %s ended", c.Name)
				}
				mounted := map[string]bool{}
				for _, m := range c.VolumeMounts {
					mounted[m.Name] = true
					if m.SubPath != "" {
						t.Errorf("%s of %s does not follow changes", m.Name, c.Name)
					}
					if !m.ReadOnly && (m.Name != "run" || c.Name != "bootstrap") {
						t.Errorf("%s may write to %s", c.Name, m.Name)
					}
				}
				if mounted["api-token"] != (c.Name == "proxy") || mounted["secret"] != (c.Name != "frpc") {
					t.Errorf("%s mounts %v", c.Name, mounted)
				}
			}
		})
	}
}

// TestAPIServerAdmitsTheManifests applies them by server-side dry run, which validates and warns. It also creates a
// pod of each Deployment in the namespace that enforces the restricted standard.
func TestAPIServerAdmitsTheManifests(t *testing.T) {
	all := variants(t)
	apply(t, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-a"}}`)
	apply(t, tenantNamespace)
	apply(t, cluster.PrometheusOperatorKinds)
	mustKubectl(t, cluster.PrometheusOperatorKinds, "wait", "--for", "condition=Established", "-f", "-")
	withKinds(t)
	for _, doc := range documents(all["components/priority"]) {
		if strings.Contains(doc, "\nkind: PriorityClass\n") { // which pods need before they exist
			apply(t, doc)
			t.Cleanup(func() { mustKubectl(t, doc, "delete", "-f", "-") })
		}
	}
	for path, rendering := range all {
		t.Run(path, func(t *testing.T) {
			mustKubectl(t, supported(rendering), "apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-")
			for _, d := range deployments(t, rendering) {
				pod := corev1.Pod{
					TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
					ObjectMeta: metav1.ObjectMeta{Name: d.Name, Namespace: d.Namespace}, Spec: d.Spec.Template.Spec,
				}
				data, err := yaml.Marshal(pod)
				if err != nil {
					t.Fatal(err)
				}
				mustKubectl(t, string(data), "create", "--dry-run=server", "-f", "-")
				// Check that the standard is enforced at all.
				pod.Spec.Containers[0].SecurityContext = nil
				if data, err = yaml.Marshal(pod); err != nil {
					t.Fatal(err)
				}
				result, err := kubectl(t, string(data), "create", "--dry-run=server", "-f", "-")
				if err == nil || !strings.Contains(result.Stderr, `violates PodSecurity "restricted:latest"`) {
					t.Errorf("a pod that breaks the standard: %v\n%s", err, result.Stderr)
				}
			}
		})
	}
}

func apply(t *testing.T, rendering string) {
	mustKubectl(t, rendering, "apply", "--server-side", "-f", "-")
}

// TestMissingFileIsNamed removes each file that the user must write. The error names the file.
func TestMissingFileIsNamed(t *testing.T) {
	for path, names := range map[string][]string{
		".": {"agent.env", "agent-token"}, "overlays/production/agent": {"agent-token", "frps-ca.crt"},
		"overlays/edge": {"agent-token", "frp-token", "group-key", "ca.crt", "tls.crt", "tls.key"},
	} {
		for _, name := range names {
			dir := installation(t)
			file := filepath.Join(dir, path, name)
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			result, err := kubectl(t, "", "kustomize", filepath.Join(dir, path))
			if err == nil || !strings.Contains(result.Stderr, file+": no such file or directory") {
				t.Errorf("%s without %s: %v: %s", path, name, err, result.Stderr)
			}
		}
	}
}

// TestChangedSettingsRollThePods checks that changed settings roll the pods. A changed token does not, because the
// agent reloads it.
func TestChangedSettingsRollThePods(t *testing.T) {
	dir := installation(t)
	template := func() corev1.PodTemplateSpec { return deployments(t, build(t, dir))[0].Spec.Template }
	before := template()
	write(t, filepath.Join(dir, "agent-token"), "another\n")
	if diff := cmp.Diff(before, template()); diff != "" {
		t.Errorf("another token changes the pods:\n%s", diff)
	}
	write(t, filepath.Join(dir, "agent.env"), "PIPEOPS_AGENT_ID=agent-002\n")
	if cmp.Diff(before, template()) == "" {
		t.Error("another id does not change the pods")
	}
}

// TestNamespaceCanBeChanged checks that an overlay's namespace applies to every object, and to the subjects of
// bindings.
func TestNamespaceCanBeChanged(t *testing.T) {
	for _, doc := range documents(build(t, everyComponent(t, "other"))) {
		if strings.Contains(doc, "pipeops-system") {
			t.Errorf("still in pipeops-system:\n%s", doc)
		}
	}
}

// everyComponent returns the directory of an overlay with every component, and then the given ones. It leaves out
// named-constrained, which replaces named, namespaced, which replaces the others that grant rights, and suffix.
func everyComponent(t *testing.T, namespace string, last ...string) string {
	t.Helper()
	dir := installation(t)
	overlay := "namespace: " + namespace + "\nresources: [../../base]\ncomponents:\n"
	others := []string{"components/named-constrained", "components/namespaced", "components/suffix"}
	for _, path := range kustomizations(t, dir, "Component") {
		if !slices.Contains(others, path) {
			overlay += "- ../../" + path + "\n"
		}
	}
	for _, name := range last {
		overlay += "- ../../components/" + name + "\n"
	}
	dir = filepath.Join(dir, "overlays", "every-component")
	write(t, filepath.Join(dir, "kustomization.yaml"), overlay)
	return dir
}

// TestManagedNamespacesStay checks that the namespace of the agent moves no RoleBinding of an overlay, but its subject.
func TestManagedNamespacesStay(t *testing.T) {
	dir := installation(t)
	overlay := filepath.Join(dir, "overlays", "production")
	file := filepath.Join(overlay, "agent", "kustomization.yaml")
	write(t, file, strings.Replace(string(read(t, file)), "namespace: pipeops-system", "namespace: other", 1))
	file = filepath.Join(overlay, "manage-namespaces.yaml")
	write(t, file, string(read(t, file))+"---\n"+strings.Replace(string(read(t, file)), "team-a", "team-b", 1))
	managed := map[string]rbacv1.Subject{}
	for _, doc := range documents(build(t, overlay)) {
		var binding rbacv1.RoleBinding
		if err := yaml.Unmarshal([]byte(doc), &binding); err != nil {
			t.Fatal(err)
		}
		if binding.RoleRef.Name == "edit" {
			managed[binding.Namespace] = binding.Subjects[0]
		}
	}
	subject := rbacv1.Subject{Kind: "ServiceAccount", Name: "pipeops-agent", Namespace: "other"}
	if diff := cmp.Diff(map[string]rbacv1.Subject{"team-a": subject, "team-b": subject}, managed); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}
