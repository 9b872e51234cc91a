package manifests

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/pipeops/vm-agent/tests/harness/cluster"
)

// TestNamedImpersonatesListedNames impersonates with a token of the agent's ServiceAccount, by each variant of named.
func TestNamedImpersonatesListedNames(t *testing.T) {
	aggregate(t)
	base := variants(t)["base"]
	apply(t, base)
	for _, ns := range []string{"team-a", "team-b"} {
		apply(t, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "`+ns+`"}}`)
	}
	example := string(read(t, filepath.Join(source, "components", "named", "developers.yaml")))
	apply(t, example)
	t.Cleanup(func() { mustKubectl(t, example, "delete", "-f", "-") })
	kubeconfig := filepath.Join(t.TempDir(), "agent.kubeconfig")
	if err := cluster.WriteKubeconfig(kubeconfig, asAgent(t)); err != nil {
		t.Fatal(err)
	}
	const (
		alice  = "--as=pipeops:alice@example.com"
		tunnel = "--as-group=pipeops:tunnel"
		group  = "--as-group=pipeops:developers"
	)
	// as returns what kubectl says, if something forbids the command.
	as := func(t *testing.T, command string, names ...string) string {
		t.Helper()
		args := append(append(names, "--kubeconfig", kubeconfig), strings.Fields(command)...)
		result, err := kubectl(t, "", args...)
		switch {
		case err == nil:
			return ""
		case strings.Contains(result.Stderr, "orbidden"):
			return result.Stderr
		case strings.Contains(result.Stderr, `pods "none" not found`):
			return ""
		}
		t.Fatalf("%s: %v", command, err)
		return ""
	}
	list := func(namespace string) string { return "get --raw /api/v1/namespaces/" + namespace + "/pods" }
	others := []string{"--as=pipeops:bob@example.com", "--as=system:kube-controller-manager", "--as=system:node:a"}
	use := func(t *testing.T) {
		for _, command := range []string{"get pods -n team-a", "create configmap new -n team-a",
			"label configmap new -n team-a a=b", "delete configmap new -n team-a", "exec none -n team-a -- id",
			"port-forward pod/none 8080 -n team-a", "get --raw /version", "get --raw /apis", "api-resources",
			"auth can-i create pods/exec -n team-a", "auth whoami"} {
			if said := as(t, command, alice, group, tunnel); said != "" {
				t.Errorf("%s: %s", command, said)
			}
		}
		for _, test := range []struct {
			namespace, forbidden string // the user whom the API server forbids it
			names                []string
		}{
			// RBAC decides for the person.
			{"team-b", `User "pipeops:alice@example.com" cannot list`, []string{alice, group, tunnel}},
			{"team-a", `User "pipeops:alice@example.com" cannot list`, []string{alice, tunnel}},
			// Names that nobody listed.
			{"team-a", account + `" cannot impersonate`, []string{alice, group, tunnel, "--as-group=pipeops:admins"}},
			{"team-a", account + `" cannot impersonate`, []string{alice, "--as-group=system:masters"}},
			{"team-a", account + `" cannot impersonate`, []string{alice, group, tunnel, "--as-uid=1"}},
			{"team-a", account + `" cannot impersonate`, []string{"--as=system:serviceaccount:kube-system:default"}},
		} {
			if said := as(t, list(test.namespace), test.names...); !strings.Contains(said, test.forbidden) {
				t.Errorf("pods of %s as %v: %q", test.namespace, test.names, said)
			}
		}
	}
	for _, name := range []string{"named", "named-constrained"} {
		t.Run(name, func(t *testing.T) {
			needs(t, name)
			with(t, name)
			use(t)
			for _, other := range others {
				if said := as(t, list("team-a"), other); !strings.Contains(said, account+`" cannot impersonate`) {
					t.Errorf("%s: %q", other, said)
				}
			}
		})
		t.Run(name+" with all users", func(t *testing.T) {
			needs(t, name)
			dir := installation(t)
			overlay := filepath.Join(dir, "overlays", "all")
			write(t, filepath.Join(overlay, "kustomization.yaml"), "resources: [../../base]\ncomponents: [../../components/"+
				name+"]\npatches:\n- target: {kind: ClusterRole, name: pipeops-agent-named}\n  patch: |-\n"+
				"    - {op: remove, path: /rules/1/resourceNames}\n")
			rendering := build(t, overlay)
			apply(t, rendering)
			t.Cleanup(func() { removeAdded(t, base, rendering) })
			use(t)
			for _, other := range others { // this is the risk
				said := as(t, "get --raw /version", other, group, tunnel)
				refused := name == "named-constrained" && other == "--as=system:node:a"
				if (said != "") != refused {
					t.Errorf("%s: %q", other, said)
				}
			}
		})
	}
}
