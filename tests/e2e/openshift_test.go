package e2e

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pipeops/vm-agent/tests/harness/cluster"
)

// TestOneArbitraryUserRunsTheAgent installs the component openshift under the rules of restricted-v2: all containers
// run as the user whom admission has given them, and the tunnel works.
func TestOneArbitraryUserRunsTheAgent(t *testing.T) {
	if !node.Supports("RestrictedV2") {
		t.Skip("RestrictedV2 needs a newer Kubernetes")
	}
	i := prepare(t)
	if _, err := i.run(i.admin, cluster.RestrictedV2, nil, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := i.run(i.admin, cluster.RestrictedV2, nil, "delete", "-f", "-"); err != nil {
			t.Error(err)
		}
	})
	i.components("openshift")
	i.mustKubectl(i.admin, "apply", "-f", "manifests/components/namespace/namespace.yaml")
	eventually(t, func() error { // the API server loads policies a moment later
		out, err := i.run(i.admin, "", nil, "-n", "pipeops-system", "run", "a", "--image", "a", "--dry-run=server",
			"-o", "yaml", `--overrides={"spec": {"securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
			"containers": [{"name": "a", "image": "a", "securityContext": {
			"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}]}}`)
		if err == nil && !strings.Contains(out, fmt.Sprint("fsGroup: ", cluster.OpenShiftUser)) {
			err = fmt.Errorf("the policy is not in force: %s", out)
		}
		return err
	})
	i.apply()
	i.mustKubectl(i.caller, "get", "nodes")
	processes, err := node.Command(t.Context(), "ps", "-C", "bootstrap,frpc,proxy", "-o", "uid=,comm=").CombinedOutput()
	if err != nil {
		t.Fatal(err, string(processes))
	}
	users := map[string]string{}
	for _, match := range regexp.MustCompile(`(\d+) (\S+)`).FindAllStringSubmatch(string(processes), -1) {
		users[match[2]] = match[1]
	}
	user := fmt.Sprint(cluster.OpenShiftUser)
	if diff := cmp.Diff(map[string]string{"bootstrap": user, "frpc": user, "proxy": user}, users); diff != "" {
		t.Errorf("users of the containers (-want +got)\n%s", diff)
	}
}
