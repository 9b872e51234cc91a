// Package manifests tests what is in manifests/, with kustomize as kubectl has it and a real API server.
package manifests

import (
	"context"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

const source = "../../manifests"

var update = flag.Bool("update", false, "rewrite testdata, to be reviewed")

// api is the API server that all tests share, and the kubeconfig of its administrator.
var api struct {
	*cluster.Cluster

	kubeconfig string
}

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	flag.Parse()
	group, err := process.NewGroup()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer group.Close()
	if api.Cluster, err = cluster.Start(context.Background(), group); err == nil {
		api.kubeconfig = filepath.Join(group.Dir(), "admin.kubeconfig")
		err = cluster.WriteKubeconfig(api.kubeconfig, api.Config)
	}
	if err == nil { // once, because without a controller manager a namespace that was deleted does not go
		err = applyNamespace()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// applyNamespace applies the agent's namespace, which the base does not include.
func applyNamespace() error {
	binary, err := process.Binary("kubectl")
	if err != nil {
		return err
	}
	for _, how := range []string{"--server-side=false", "--server-side"} { // the tests do both
		if out, err := exec.Command(binary, "--kubeconfig", api.kubeconfig, "apply", how,
			"-f", filepath.Join(source, "components", "namespace", "namespace.yaml")).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
	}
	return nil
}

// kubectl runs the real kubectl to its end.
func kubectl(t *testing.T, stdin string, args ...string) (harness.Result, error) {
	t.Helper()
	// t.Context has ended when the cleanup runs.
	ctx := context.WithoutCancel(t.Context())
	return harness.Run(harness.Kubectl(ctx, t, t.TempDir(), api.kubeconfig, nil, args...), stdin)
}

// mustKubectl runs kubectl and expects success and nothing on stderr: a warning is a failure.
func mustKubectl(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	result, err := kubectl(t, stdin, args...)
	if err != nil || result.Stderr != "" {
		t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, result.Stderr)
	}
	return result.Stdout
}

// needs skips a test whose API server is too old for a component or for RestrictedV2, which happens in `make matrix`
// only.
func needs(t *testing.T, name string) {
	t.Helper()
	if !api.Supports(name) {
		t.Skipf("%s needs a newer Kubernetes", name)
	}
}

// supported returns a rendering without the guard if the API server is too old for it.
func supported(rendering string) string {
	return strings.Join(slices.DeleteFunc(documents(rendering), func(doc string) bool {
		return strings.Contains(doc, "\nkind: ValidatingAdmissionPolicy") && !api.Supports("guard")
	}), "\n---\n")
}

// userFiles are the files that a user writes beside a kustomization.
var userFiles = map[string]string{
	"agent.env": "PIPEOPS_AGENT_ID=agent-001\n", "agent-token": "your-agent-token\n",
	"frp-token": "your-frp-token\n", "group-key": "your-group-key\n", "frps-ca.crt": "a certificate\n",
	"ca.crt": "a certificate\n", "tls.crt": "a certificate\n", "tls.key": "a key\n",
}

// installation copies manifests/ to a temporary directory, with userFiles beside each kustomization.
func installation(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	tree, err := os.OpenRoot(source)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tree.Close() }()
	err = fs.WalkDir(tree.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || userFiles[d.Name()] != "" {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(dir, path), 0o700)
		}
		data, err := tree.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, path), data, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(kustomizations(t, dir, "Kustomization"), "docker") {
		for name, content := range userFiles {
			write(t, filepath.Join(dir, path, name), content)
		}
	}
	return dir
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// kustomizations returns the directories that hold a kustomization of the kind, Kustomization or Component.
func kustomizations(t *testing.T, dir, kind string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "kustomization.yaml" {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		var k struct{ Kind string }
		if err := yaml.Unmarshal(data, &k); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if k.Kind == kind {
			rel, err := filepath.Rel(dir, filepath.Dir(path))
			found = append(found, rel)
			return err
		}
		return nil
	})
	if err != nil || len(found) == 0 {
		t.Fatalf("no %s in %s: %v", kind, dir, err)
	}
	slices.Sort(found)
	return found
}
