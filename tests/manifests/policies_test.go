package manifests

import (
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// installedObjects are the objects of a rendering that companies have policies for.
type installedObjects struct {
	metas      []metav1.PartialObjectMetadata
	deployment appsv1.Deployment
	networks   []networkingv1.NetworkPolicy
	rules      map[string][]rbacv1.PolicyRule // by name
}

// policies return what violates them. They are the common baselines of Kyverno and Gatekeeper that are not part of the
// Pod Security Standard restricted.
var policies = map[string]func(o installedObjects) []string{
	"image digests": func(o installedObjects) []string {
		return violating(o, func(c corev1.Container) bool { return !strings.Contains(c.Image, "@sha256:") })
	},
	"your own registry": func(o installedObjects) []string {
		return violating(o, func(c corev1.Container) bool { return !strings.HasPrefix(c.Image, "registry.example.com/") })
	},
	"memory limits": func(o installedObjects) []string {
		return violating(o, func(c corev1.Container) bool {
			return c.Resources.Limits.Memory().IsZero() || c.Resources.Requests.Memory().IsZero()
		})
	},
	"CPU requests": func(o installedObjects) []string {
		return violating(o, func(c corev1.Container) bool { return c.Resources.Requests.Cpu().IsZero() })
	},
	"CPU limits": func(o installedObjects) []string {
		return violating(o, func(c corev1.Container) bool { return c.Resources.Limits.Cpu().IsZero() })
	},
	"probes": func(o installedObjects) []string {
		return violating(o, func(c corev1.Container) bool {
			return c.StartupProbe == nil && c.LivenessProbe == nil && c.ReadinessProbe == nil
		})
	},
	"liveness and readiness probes": func(o installedObjects) []string {
		return violating(o, func(c corev1.Container) bool { return c.LivenessProbe == nil || c.ReadinessProbe == nil })
	},
	"labels": func(o installedObjects) (names []string) {
		for _, m := range append(o.metas, metav1.PartialObjectMetadata{ObjectMeta: o.deployment.Spec.Template.ObjectMeta}) {
			if m.Labels["app.kubernetes.io/name"] == "" || m.Labels["app.kubernetes.io/part-of"] == "" {
				names = append(names, m.Kind+" "+m.Name)
			}
		}
		return names
	},
	"no default ServiceAccount": func(o installedObjects) []string {
		account := o.deployment.Spec.Template.Spec.ServiceAccountName
		return unless(account != "" && account != "default", "the pod")
	},
	"no API token in every container": func(o installedObjects) []string {
		mounts := o.deployment.Spec.Template.Spec.AutomountServiceAccountToken
		return unless(mounts != nil && !*mounts, "the pod")
	},
	"no Secrets in the environment": func(o installedObjects) []string {
		return violating(o, func(c corev1.Container) bool {
			return slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool {
				return e.ValueFrom != nil && e.ValueFrom.SecretKeyRef != nil
			}) || slices.ContainsFunc(c.EnvFrom, func(e corev1.EnvFromSource) bool { return e.SecretRef != nil })
		})
	},
	"limited volumes": func(o installedObjects) (names []string) {
		for _, v := range o.deployment.Spec.Template.Spec.Volumes {
			if v.EmptyDir != nil && v.EmptyDir.SizeLimit == nil {
				names = append(names, v.Name)
			}
		}
		return names
	},
	"a NetworkPolicy for both directions": func(o installedObjects) []string {
		return unless(slices.ContainsFunc(o.networks, func(n networkingv1.NetworkPolicy) bool {
			selector, err := metav1.LabelSelectorAsMap(&n.Spec.PodSelector)
			for key, value := range selector {
				if o.deployment.Spec.Template.Labels[key] != value {
					return false
				}
			}
			return err == nil && len(n.Spec.PolicyTypes) == 2
		}), "the pod")
	},
	"egress destinations": func(o installedObjects) (names []string) {
		for _, n := range o.networks {
			for _, rule := range n.Spec.Egress {
				if len(rule.To) == 0 {
					names = append(names, n.Name)
				}
			}
		}
		return names
	},
	"a PriorityClass": func(o installedObjects) []string {
		return unless(o.deployment.Spec.Template.Spec.PriorityClassName != "", "the pod")
	},
	"two replicas": func(o installedObjects) []string {
		return unless(*o.deployment.Spec.Replicas > 1 && slices.ContainsFunc(o.metas,
			func(m metav1.PartialObjectMetadata) bool { return m.Kind == "PodDisruptionBudget" }), "the Deployment")
	},
	"no wildcards in RBAC": func(o installedObjects) (names []string) {
		for name, rules := range o.rules {
			for _, r := range rules {
				if slices.Contains(slices.Concat(r.Verbs, r.Resources, r.APIGroups), "*") {
					names = append(names, name)
				}
			}
		}
		return names
	},
}

func violating(o installedObjects, violates func(corev1.Container) bool) (names []string) {
	for _, c := range containers(o.deployment.Spec.Template.Spec) {
		if violates(c) {
			names = append(names, c.Name)
		}
	}
	return names
}

func unless(satisfied bool, name string) []string {
	if satisfied {
		return nil
	}
	return []string{name}
}

// TestProductionSatisfiesPolicies compares what violates each policy with the exceptions on the install page, which
// also names every policy.
func TestProductionSatisfiesPolicies(t *testing.T) {
	dir := filepath.Join(installation(t), "overlays", "production")
	file := filepath.Join(dir, "agent", "kustomization.yaml")
	digest := "\n    digest: sha256:" + strings.Repeat("0", 64)
	write(t, file, regexp.MustCompile(`(?m)^    newName: .*$`).ReplaceAllString(string(read(t, file)), "$0"+digest))
	rendering := build(t, dir)
	o := installedObjects{
		deployment: deployments(t, rendering)[0], rules: map[string][]rbacv1.PolicyRule{},
		networks: objects[networkingv1.NetworkPolicy](t, rendering, "NetworkPolicy"),
	}
	for _, role := range objects[rbacv1.ClusterRole](t, rendering, "ClusterRole") {
		o.rules[role.Name] = append(o.rules[role.Name], role.Rules...)
	}
	for _, role := range objects[rbacv1.Role](t, rendering, "Role") {
		o.rules[role.Name] = append(o.rules[role.Name], role.Rules...)
	}
	for _, doc := range documents(rendering) {
		var meta metav1.PartialObjectMetadata
		if err := yaml.Unmarshal([]byte(doc), &meta); err != nil {
			t.Fatal(err)
		}
		o.metas = append(o.metas, meta)
	}
	page := string(read(t, filepath.Join(source, "README.md")))
	_, section, _ := strings.Cut(page, "\n## Policies that companies have\n")
	section, _, _ = strings.Cut(section, "\n## ")
	exceptions := map[string]string{}
	row := regexp.MustCompile(`(?m)^\| ([^|]+) \| ([^|]+) \| [^|]{20,} \|$`)
	for _, row := range row.FindAllStringSubmatch(section, -1) {
		exceptions[row[1]] = row[2]
	}
	found := map[string]string{}
	for name, violations := range policies {
		if v := violations(o); len(v) > 0 {
			found[name] = strings.Join(v, ", ")
		}
		if !strings.Contains(strings.ReplaceAll(section, "\n", " "), name) {
			t.Errorf("the page does not name the policy %s", name)
		}
	}
	if diff := cmp.Diff(exceptions, found); diff != "" {
		t.Errorf("exceptions (-page +found)\n%s", diff)
	}
}
