package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"k8s.io/client-go/tools/clientcmd"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

// Result is what a command printed, and its exit code.
type Result struct {
	Stdout, Stderr string
	Code           int // -1 if it was ended by a signal or did not start
}

// Kubectl prepares the real kubectl. It sees PATH and env only, so that the caller's environment does not decide how a
// test goes; it keeps its caches in home.
func Kubectl(ctx context.Context, t *testing.T, home, kubeconfig string, env []string, args ...string) *exec.Cmd {
	t.Helper()
	if n := slices.Index(args, "--raw") + 1; n > 0 {
		args = slices.Clone(args)
		args[n] = rawPrefix(t, kubeconfig) + args[n]
	}
	cmd := exec.CommandContext(ctx, Binary(t, "kubectl"), args...)
	cmd.Env = append([]string{"HOME=" + home, "KUBECONFIG=" + kubeconfig, "PATH=" + os.Getenv("PATH")}, env...)
	return cmd
}

// kubectlMinor returns the minor version of kubectl, 1.minor.
var kubectlMinor = sync.OnceValues(func() (int, error) {
	binary, err := process.Binary("kubectl")
	if err != nil {
		return 0, err
	}
	out, err := exec.Command(binary, "version", "--client", "-o", "json").Output()
	if err != nil {
		return 0, err
	}
	var version struct{ ClientVersion struct{ Minor string } }
	if err := json.Unmarshal(out, &version); err != nil {
		return 0, err
	}
	return strconv.Atoi(version.ClientVersion.Minor)
})

// rawPrefix returns what must precede a path after --raw: before 1.34, kubectl takes it from the root of the server,
// and leaves out the path in the server's URL (Kubernetes #131165).
func rawPrefix(t *testing.T, kubeconfig string) string {
	t.Helper()
	minor, err := kubectlMinor()
	if err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil || minor >= 34 { // the kubeconfig of a test may name no server
		return ""
	}
	server, err := url.Parse(config.Host)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(server.Path, "/")
}

// Run runs a command to its end. It returns an error, with what the command printed to stderr, if the exit code is not
// 0.
func Run(cmd *exec.Cmd, stdin string) (Result, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, stderr.String())
	}
	return Result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}, err
}
