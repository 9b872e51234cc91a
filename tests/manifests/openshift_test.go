package manifests

import (
	"cmp"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
)

// TestOpenShiftAdmitsItsComponent creates pods under the rules of restricted-v2: that of the component is admitted,
// with one user for all containers; that of the base is refused, as is one that breaks another rule.
func TestOpenShiftAdmitsItsComponent(t *testing.T) {
	needs(t, "RestrictedV2")
	mustKubectl(t, cluster.RestrictedV2, "apply", "-f", "-")
	t.Cleanup(func() { mustKubectl(t, cluster.RestrictedV2, "delete", "-f", "-") })
	create := func(variant string, change func(*corev1.PodSpec)) (corev1.Pod, error) {
		d := deployments(t, variants(t)[variant])[0]
		pod := corev1.Pod{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
			ObjectMeta: metav1.ObjectMeta{Name: d.Name, Namespace: d.Namespace}, Spec: d.Spec.Template.Spec,
		}
		change(&pod.Spec)
		data, err := yaml.Marshal(pod)
		if err != nil {
			t.Fatal(err)
		}
		result, err := kubectl(t, string(data), "create", "--dry-run=server", "-o", "yaml", "-f", "-")
		if err == nil {
			err = yaml.Unmarshal([]byte(result.Stdout), &pod)
		}
		return pod, err
	}
	refused := func(variant, why string, change func(*corev1.PodSpec)) error {
		_, err := create(variant, change)
		if err != nil && strings.Contains(err.Error(), why) {
			return nil
		}
		return fmt.Errorf("%s is not refused because %s: %w", variant, why, cmp.Or(err, errAllowed))
	}
	harness.Eventually(t, 30*time.Second, func() error { // the API server loads policies a moment later
		return refused("base", "restricted-v2 wants users of the namespace's range", func(*corev1.PodSpec) {})
	})
	var pod corev1.Pod
	harness.Eventually(t, 30*time.Second, func() (err error) {
		pod, err = create("components/openshift", func(*corev1.PodSpec) {})
		return err
	})
	for _, c := range containers(pod.Spec) {
		if user := c.SecurityContext.RunAsUser; user == nil || *user != cluster.OpenShiftUser {
			t.Errorf("%s runs as %v", c.Name, user)
		}
	}
	if err := refused("components/openshift", "restricted-v2 wants the namespace's fsGroup", func(spec *corev1.PodSpec) {
		user, group := int64(cluster.OpenShiftUser), int64(65532)
		spec.SecurityContext.RunAsUser, spec.SecurityContext.FSGroup = &user, &group
	}); err != nil {
		t.Error(err)
	}
}
