package manifests

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pipeops/vm-agent/tests/harness/cluster"
)

// TestEveryWayToApplyAgrees applies each object client-side, then server-side, also as another tool would,
// and client-side again. No way conflicts with another, and none of them changes anything the second time.
func TestEveryWayToApplyAgrees(t *testing.T) {
	apply(t, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-a"}}`)
	apply(t, tenantNamespace)
	apply(t, cluster.PrometheusOperatorKinds)
	mustKubectl(t, cluster.PrometheusOperatorKinds, "wait", "--for", "condition=Established", "-f", "-")
	withKinds(t)
	all := variants(t)
	for _, path := range []string{".", "overlays/edge", "overlays/production", "overlays/tenant", gitops,
		"every component", "every component of a second agent", "components/named-constrained"} {
		rendering := all[path]
		switch path {
		case "every component":
			rendering = build(t, everyComponent(t, "pipeops-system"))
		case "every component of a second agent":
			rendering = build(t, everyComponent(t, "second", "suffix"))
		}
		t.Run(path, func(t *testing.T) {
			// Without a controller manager, a namespace that is deleted stays in termination.
			objects := strings.Join(slices.DeleteFunc(documents(rendering), func(doc string) bool {
				return strings.Contains(doc, "kind: Namespace\n")
			}), "\n---\n")
			remove := func() { mustKubectl(t, objects, "delete", "--ignore-not-found", "-f", "-") }
			remove()
			t.Cleanup(remove)
			for _, how := range [][]string{
				{"apply"}, {"apply", "--server-side"}, {"apply", "--server-side", "--field-manager=gitops"}, {"apply"},
			} {
				mustKubectl(t, rendering, append(how, "-f", "-")...)
				before := versions(t, rendering)
				mustKubectl(t, rendering, append(how, "-f", "-")...)
				if after := versions(t, rendering); after != before {
					t.Errorf("the second %s writes (-before +after):\n%s", how, cmp.Diff(before, after))
				}
			}
			apply(t, rendering) // the next test applies the Namespace server-side
			mustKubectl(t, rendering, "diff", "-f", "-")
			mustKubectl(t, rendering, "diff", "--server-side", "-f", "-")
		})
	}
}

// versions returns the resource version of each object of a rendering.
func versions(t *testing.T, rendering string) string {
	t.Helper()
	return mustKubectl(t, rendering, "get", "-f", "-",
		"-o", `jsonpath={range .items[*]}{.kind}/{.metadata.name} {.metadata.resourceVersion}{"\n"}{end}`)
}
