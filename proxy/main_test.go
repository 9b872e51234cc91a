package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const token = "hunter2"

func TestExitCodesOfTheCommandLine(t *testing.T) {
	for _, test := range []struct {
		args []string
		env  map[string]string
		code int
		want string
	}{
		{[]string{"--help"}, nil, exitOK, "Usage: proxy"},
		{[]string{"--version"}, nil, exitOK, `"contract":"1"`},
		{[]string{"extra"}, nil, exitUsage, `unknown argument "extra"`},
		{nil, nil, exitUsage, "agent.token (PIPEOPS_AGENT_TOKEN): required"},
		{nil, map[string]string{"PIPEOPS_AGENT_ID": "a", "PIPEOPS_AGENT_TOKEN": token, "KUBECONFIG": "/nonexistent"}, exitUsage, "no way to the Kubernetes API server"},
	} {
		var out bytes.Buffer
		code := run(t.Context(), test.args, test.env, &out, &out)
		if code != test.code || !strings.Contains(out.String(), test.want) || strings.Contains(out.String(), token) {
			t.Errorf("%v: exit code %d, want %d; output, want %q:\n%s", test.args, code, test.code, test.want, out.String())
		}
	}
}

// TestKillChildrenKillsGrandchildren: a credential plugin, and the processes it has started, end with the proxy.
func TestKillChildrenKillsGrandchildren(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pids")
	const script = `sh -c 'sleep 1000 & echo $$ $! >'"$0"'.new; mv "$0".new "$0"; wait' "$0"; exit 0`
	parent := exec.Command("sh", "-c", script, file)
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	var pids []int
	eventually(t, func() bool {
		data, err := os.ReadFile(file)
		for _, field := range strings.Fields(string(data)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
		return err == nil
	})
	killChildren(os.Getpid())
	_ = parent.Wait()
	for _, pid := range pids {
		eventually(t, func() bool {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			return syscall.Kill(pid, 0) != nil || err == nil && strings.Contains(string(stat), ") Z ")
		})
	}
}

// eventually waits up to 10 s until a condition holds.
func eventually(t *testing.T, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the condition does not hold after 10 s")
		}
	}
}
