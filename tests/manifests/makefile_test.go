package manifests

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pipeops/vm-agent/tests/harness"
)

// TestMakeSaysWhatItsArgumentsLack calls make as one does by mistake: it says so before it does anything.
func TestMakeSaysWhatItsArgumentsLack(t *testing.T) {
	for _, c := range [][]string{
		{"push"}, {"push", "REGISTRY= "}, {"push", "REGISTRY=registry.example.com/a b"}, {"mirror", "REGISTRY=a b"},
	} {
		make := exec.Command("make", c...)
		make.Dir = harness.Root(t)
		out, err := make.CombinedOutput()
		if err == nil || !strings.Contains(string(out), "say where to, without spaces: make "+c[0]+" REGISTRY=") {
			t.Errorf("make %q: %v: %s", c, err, out)
		}
	}
}

// TestMatrixLeavesNothingOfAFailure prepares a row of `make matrix` for versions that cannot be had.
func TestMatrixLeavesNothingOfAFailure(t *testing.T) {
	for version, want := range map[string]string{
		"master": "no version of three numbers", "v0.71": "no version of three numbers",
		"v0.71.0": "module lookup disabled by GOPROXY=off",
	} {
		dir := t.TempDir()
		matrix := exec.Command(filepath.Join(harness.Root(t), "tests", "tools", "matrix"),
			"github.com/fatedier/frp@"+version, filepath.Join(dir, "row"), "cmd/frps")
		matrix.Env = append(os.Environ(), "GOPROXY=off", "GOMODCACHE="+filepath.Join(dir, "cache"))
		out, err := matrix.CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("matrix %s: %v: %s", version, err, out)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "row", "*")); left != nil {
			t.Errorf("matrix %s left %s", version, left)
		}
	}
}
