package integration

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/pipeops/vm-agent/tests/cluster"
	"github.com/pipeops/vm-agent/tests/process"
)

// crashVariable makes this binary start a cluster and wait to be killed.
const crashVariable = "PIPEOPS_TEST_CRASH"

func crash() int {
	group, err := process.NewGroup()
	if err == nil {
		_, err = cluster.Start(context.Background(), group)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(group.Dir())
	select {}
}

// TestNothingIsLeftAfterACrash kills a process that runs a cluster, as no handler of its own can notice.
func TestNothingIsLeftAfterACrash(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashVariable+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	line, _, err := bufio.NewReader(out).ReadLine()
	if err != nil {
		t.Fatal(err)
	}
	dir := string(line)
	files, err := os.ReadDir(filepath.Join(dir, "pids"))
	if err != nil || len(files) != 2 {
		t.Fatalf("%d processes run (%v), want etcd and kube-apiserver", len(files), err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	eventually(t, func() error {
		for _, f := range files {
			pid, err := strconv.Atoi(f.Name())
			if err != nil {
				return err
			}
			// A process whose new parent does not wait for it stays as a zombie.
			stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) && !strings.Contains(string(stat), ") Z ") {
				return fmt.Errorf("process %d is still there", pid)
			}
		}
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s is still there", dir)
		}
		return nil
	})
}
