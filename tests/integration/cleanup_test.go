package integration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// crash starts a cluster and waits to be killed.
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

// TestNothingIsLeftAfterACrash kills a process that runs a cluster, with a signal that it cannot handle.
func TestNothingIsLeftAfterACrash(t *testing.T) {
	t.Parallel()
	cmd, dir, err := process.Crashing()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
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
			if process.Alive(pid) {
				return fmt.Errorf("process %d is still there", pid)
			}
		}
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s is still there", dir)
		}
		return nil
	})
}
