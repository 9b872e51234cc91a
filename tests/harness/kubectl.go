package harness

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
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
	cmd := exec.CommandContext(ctx, Binary(t, "kubectl"), args...)
	cmd.Env = append([]string{"HOME=" + home, "KUBECONFIG=" + kubeconfig, "PATH=" + os.Getenv("PATH")}, env...)
	return cmd
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
