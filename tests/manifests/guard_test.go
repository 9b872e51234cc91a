package manifests

import (
	"cmp"
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness"
)

const (
	guard      = "ValidatingAdmissionPolicy 'pipeops-agent-guard'"
	guardHint  = "through the PipeOps agent: use your own access to the cluster"
	editGroups = `{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
		"metadata": {"name": "edit-for-developers"},
		"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"},
		"subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "pipeops:developers"}]}`
)

var errAllowed = errors.New("allowed")

// asAgent returns a configuration with a token of the agent's ServiceAccount.
func asAgent(t *testing.T) *rest.Config {
	t.Helper()
	return asAgentIn(t, "pipeops-system")
}

// asAgentIn returns one of the agent in a namespace.
func asAgentIn(t *testing.T, namespace string) *rest.Config {
	t.Helper()
	config := rest.CopyConfig(api.Config)
	config.BearerToken = strings.TrimSpace(mustKubectl(t, "", "create", "token", "pipeops-agent", "-n", namespace))
	return config
}

// with applies a component on top of the base until the test ends.
func with(t *testing.T, components ...string) {
	t.Helper()
	all := variants(t)
	for _, name := range components {
		rendering := all["components/"+name]
		apply(t, rendering)
		t.Cleanup(func() { removeAdded(t, all["base"], rendering) })
	}
}

// call is one request to the API server.
type call struct {
	name string
	do   func(ctx context.Context, c kubernetes.Interface, namespace string) error
}

// raw makes a request of any kind.
func raw(name, verb, path, body string) call {
	return call{name, func(ctx context.Context, c kubernetes.Interface, ns string) error {
		r := c.CoreV1().RESTClient().Verb(verb).RequestURI(strings.ReplaceAll(path, "NS", ns)).Body([]byte(body))
		r.SetHeader("Content-Type", "application/json")
		if verb == "PATCH" {
			r.SetHeader("Content-Type", string(types.MergePatchType))
		}
		return r.Do(ctx).Error()
	}}
}

// guarded are requests that ClusterRole edit allows in a namespace. What they name exists in every namespace of the
// test, except for pods: exec and the like reach admission before the API server looks for the pod.
var guarded = []call{
	raw("create", "POST", "/api/v1/namespaces/NS/configmaps", `{"metadata": {"name": "new"}}`),
	raw("create by dry run", "POST", "/api/v1/namespaces/NS/configmaps?dryRun=All", `{"metadata": {"name": "dry"}}`),
	raw("patch", "PATCH", "/api/v1/namespaces/NS/configmaps/there", `{"data": {"a": "b"}}`),
	raw("apply", "PATCH", "/apis/apps/v1/namespaces/NS/deployments/there", `{"metadata": {"labels": {"a": "b"}}}`),
	raw("scale", "PATCH", "/apis/apps/v1/namespaces/NS/deployments/there/scale", `{"spec": {"replicas": 2}}`),
	raw("delete a collection", "DELETE", "/api/v1/namespaces/NS/configmaps?labelSelector=a%3Db", ""),
	raw("delete", "DELETE", "/api/v1/namespaces/NS/configmaps/there", ""),
	{"a token", func(ctx context.Context, c kubernetes.Interface, ns string) error {
		_, err := c.CoreV1().ServiceAccounts(ns).CreateToken(ctx, "there", &authenticationv1.TokenRequest{},
			metav1.CreateOptions{})
		return err
	}},
	raw("exec", "POST", "/api/v1/namespaces/NS/pods/none/exec?command=id&stdout=true", ""),
	raw("exec by GET", "GET", "/api/v1/namespaces/NS/pods/none/exec?command=id&stdout=true", ""),
	raw("attach", "POST", "/api/v1/namespaces/NS/pods/none/attach", ""),
	raw("port-forward", "POST", "/api/v1/namespaces/NS/pods/none/portforward", ""),
	raw("the proxy of a pod", "GET", "/api/v1/namespaces/NS/pods/none/proxy/", ""),
	raw("the proxy of a Service", "DELETE", "/api/v1/namespaces/NS/services/none/proxy/", ""),
	raw("evict", "POST", "/api/v1/namespaces/NS/pods/none/eviction",
		`{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "none"}}`),
}

// TestGuardKeepsCallersOut gives callers ClusterRole edit in the whole cluster. Only the guard keeps them out of
// kube-system and the agent's namespace.
func TestGuardKeepsCallersOut(t *testing.T) {
	needs(t, "guard")
	aggregate(t)
	apply(t, variants(t)["base"])
	apply(t, editGroups)
	t.Cleanup(func() { mustKubectl(t, editGroups, "delete", "-f", "-") })
	with(t, "manage-all-namespaces", "runners")
	agent := asAgent(t)
	named := rest.CopyConfig(api.Config)
	named.Impersonate = rest.ImpersonationConfig{UserName: "pipeops:alice@example.com",
		Groups: []string{"pipeops:developers", "pipeops:tunnel"}}
	namespaces := []string{"pipeops-system", "kube-system", "default"}
	for _, ns := range namespaces {
		for _, object := range []string{
			`{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "there"}}`,
			`{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "there", "labels": {"a": "b"}}}`,
			`{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "there"}, "spec": {
				"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": {
				"securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
				"containers": [{"name": "c", "image": "c", "securityContext": {
					"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}]}}}}`,
		} {
			mustKubectl(t, object, "apply", "--server-side", "-n", ns, "-f", "-")
			t.Cleanup(func() { mustKubectl(t, object, "delete", "--ignore-not-found", "-n", ns, "-f", "-") })
		}
		t.Cleanup(func() { mustKubectl(t, "", "delete", "configmap", "new", "--ignore-not-found", "-n", ns) })
	}
	with(t, "guard")

	for name, config := range map[string]*rest.Config{"the ServiceAccount": agent, "a user": named} {
		t.Run(name, func(t *testing.T) {
			client, err := kubernetes.NewForConfig(config)
			if err != nil {
				t.Fatal(err)
			}
			harness.Eventually(t, 30*time.Second, func() error { // the API server loads policies a moment later
				return notGuarded(guarded[1].do(t.Context(), client, "kube-system"))
			})
			for _, ns := range namespaces[:2] {
				for _, call := range guarded {
					if err := notGuarded(call.do(t.Context(), client, ns)); err != nil {
						t.Errorf("%s in %s: %v", call.name, ns, err)
					}
				}
				// What is not a change is left to RBAC.
				if _, err := client.CoreV1().ConfigMaps(ns).List(t.Context(), metav1.ListOptions{}); err != nil {
					t.Errorf("list in %s: %v", ns, err)
				}
			}
			for _, call := range guarded {
				err := call.do(t.Context(), client, "default")
				if err != nil && (!apierrors.IsNotFound(err) || !strings.Contains(err.Error(), `"none" not found`)) {
					t.Errorf("%s in default: %v", call.name, err)
				}
				apply(t, `{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {
					"name": "there", "namespace": "default", "labels": {"a": "b"}}}`) // again
			}
			mustKubectl(t, "", "delete", "configmap", "new", "-n", "default")
			review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{
				ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: "get", Resource: "pods",
					Namespace: "pipeops-system"}}}
			if review, err = client.AuthorizationV1().SelfSubjectAccessReviews().Create(t.Context(), review,
				metav1.CreateOptions{}); err != nil || !review.Status.Allowed {
				t.Errorf("a review: %v, %v", review, err)
			}
			for _, kind := range []string{"validatingadmissionpolicies", "validatingadmissionpolicybindings"} {
				path := "/apis/admissionregistration.k8s.io/v1/" + kind + "/pipeops-agent-guard"
				if err := raw("", "DELETE", path, "").do(t.Context(), client, ""); !apierrors.IsForbidden(err) {
					t.Errorf("the guard itself: %v", err)
				}
			}
		})
	}
	t.Run("the registry", func(t *testing.T) { registryPasses(t, agent, named) })
	t.Run("Namespaces", func(t *testing.T) {
		with(t, "cluster-admin")
		client, err := kubernetes.NewForConfig(agent)
		if err != nil {
			t.Fatal(err)
		}
		label := raw("", "PATCH", "/api/v1/namespaces/NS", `{"metadata": {"labels": {"a": "b"}}}`)
		for _, ns := range namespaces[:2] {
			if err := notGuarded(label.do(t.Context(), client, ns)); err != nil {
				t.Errorf("%s: %v", ns, err)
			}
		}
		remove := raw("", "DELETE", "/api/v1/namespaces/NS", "") // of kube-system the API server itself refuses it
		if err := notGuarded(remove.do(t.Context(), client, "pipeops-system")); err != nil {
			t.Error(err)
		}
		if err := label.do(t.Context(), client, "default"); err != nil {
			t.Error(err)
		}
		mustKubectl(t, "", "label", "namespace", "default", "a-")
	})
}

// TestGuardFollowsTheNamespace applies the guard as an overlay with another namespace renders it.
func TestGuardFollowsTheNamespace(t *testing.T) {
	needs(t, "guard")
	dir := installation(t)
	overlay := filepath.Join(dir, "overlays", "other")
	write(t, filepath.Join(overlay, "kustomization.yaml"),
		"namespace: other\nresources: [../../base]\ncomponents: [../../components/guard]\n")
	policy := slices.DeleteFunc(documents(build(t, overlay)), func(doc string) bool {
		return !strings.Contains(doc, "name: pipeops-agent-guard")
	})
	// kustomize gives the policy a namespace, although it is in none. kubectl and the API server ignore it.
	mustKubectl(t, strings.Join(policy, "\n---\n"), "apply", "-f", "-")
	t.Cleanup(func() { mustKubectl(t, strings.Join(policy, "\n---\n"), "delete", "-f", "-") })
	apply(t, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "other"}}`)
	create := func(namespace string) error {
		_, err := kubectl(t, "", "create", "configmap", "a", "--dry-run=server", "-n", namespace,
			"--as=someone", "--as-group=system:masters", "--as-group=pipeops:tunnel")
		if err != nil && strings.Contains(err.Error(), guard) {
			return nil
		}
		return cmp.Or(err, errAllowed)
	}
	harness.Eventually(t, 30*time.Second, func() error { return create("other") })
	if err := create("kube-system"); err != nil {
		t.Error(err)
	}
	if err := create("pipeops-system"); !errors.Is(err, errAllowed) {
		t.Errorf("in a namespace that is not the agent's: %v", err)
	}
}

// registryPasses checks that the agent can write its registry, and that nothing else passes under its name.
func registryPasses(t *testing.T, agent, named *rest.Config) {
	ctx := t.Context()
	client, err := kubernetes.NewForConfig(agent)
	if err != nil {
		t.Fatal(err)
	}
	user, err := kubernetes.NewForConfig(named)
	if err != nil {
		t.Fatal(err)
	}
	secrets := client.CoreV1().Secrets("pipeops-system")
	registry, err := secrets.Get(ctx, "pipeops-agent-runners", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	registry.Data = map[string][]byte{"r-1": []byte("{}")}
	if err := notGuarded(func() error {
		_, err := user.CoreV1().Secrets("pipeops-system").Update(ctx, registry, metav1.UpdateOptions{})
		return err
	}()); err != nil {
		t.Errorf("a user: %v", err)
	}
	if _, err := secrets.Update(ctx, registry, metav1.UpdateOptions{}); err != nil {
		t.Error(err)
	}
	if err := notGuarded(secrets.Delete(ctx, registry.Name, metav1.DeleteOptions{})); err != nil {
		t.Errorf("delete: %v", err)
	}
	mustKubectl(t, "", "delete", "secret", registry.Name, "-n", "pipeops-system")
	create := func(namespace, name string, kind corev1.SecretType) error {
		_, err := client.CoreV1().Secrets(namespace).Create(ctx, &corev1.Secret{Type: kind, ObjectMeta: metav1.ObjectMeta{
			Name: name, Annotations: map[string]string{corev1.ServiceAccountNameKey: "pipeops-agent"}}},
			metav1.CreateOptions{})
		return err
	}
	for _, err := range []error{
		create("pipeops-system", registry.Name, corev1.SecretTypeServiceAccountToken),
		create("pipeops-system", "another", ""), create("kube-system", registry.Name, ""),
	} {
		if err := notGuarded(err); err != nil {
			t.Error(err)
		}
	}
	if err := create("pipeops-system", registry.Name, ""); err != nil {
		t.Error(err)
	}
}

// notGuarded returns nil if err is the guard's refusal.
func notGuarded(err error) error {
	switch {
	case err == nil:
		return errAllowed
	case apierrors.IsForbidden(err) && strings.Contains(err.Error(), guard) && strings.Contains(err.Error(), guardHint):
		return nil
	}
	return err
}
