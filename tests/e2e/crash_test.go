package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// crash starts a node with a pod and waits to be killed. The kernel keeps connections whose peers are silent, and with
// them the network namespace, for minutes after their processes have ended: so the node's become silent.
func crash() int {
	ctx := context.Background()
	group, err := process.NewGroup()
	if err == nil {
		node, err = cluster.StartNode(ctx, group)
	}
	if err == nil {
		if _, err = createPod(ctx, "default", pod("sleeps", "sleep infinity"), corev1.PodRunning); err != nil {
			err = fmt.Errorf("%w\n%s", err, node.Report())
		}
	}
	if err == nil {
		err = node.Command(ctx, "iptables", "-I", "OUTPUT", "-j", "DROP").Run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(group.Dir(), node.HostIP)
	select {}
}

// TestNothingIsLeftAfterACrash kills a process that runs a node with a pod, with a signal that it cannot handle.
func TestNothingIsLeftAfterACrash(t *testing.T) {
	cmd, line, err := process.Crashing()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	dir, hostIP, _ := strings.Cut(line, " ")
	ran := descendants(cmd.Process.Pid, map[int]bool{})
	if len(ran) < 20 {
		t.Errorf("%d processes run: not all of the node's are seen", len(ran))
	}
	if findLeftovers(dir, hostIP) == nil {
		t.Error("findLeftovers does not find the running node")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	eventually(t, func() error {
		for pid := range ran {
			if process.Alive(pid) {
				return fmt.Errorf("process %d is still there", pid)
			}
		}
		return findLeftovers(dir, hostIP)
	})
}

// findLeftovers returns an error that names what a node has left outside its namespaces.
func findLeftovers(dir, hostIP string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is still there", dir)
	}
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return err
	}
	for _, address := range addresses {
		if strings.HasPrefix(address.String(), hostIP+"/") {
			return fmt.Errorf("the interface with %s is still there", address)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if strings.Contains(string(mounts), dir) {
		return fmt.Errorf("mounts below %s are still there", dir)
	}
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		if cgroups, _ := filepath.Glob(pattern + filepath.Base(dir) + "-*"); len(cgroups) > 0 {
			return fmt.Errorf("cgroups are still there: %v", cgroups)
		}
	}
	return nil
}

// descendants adds the processes below pid to found, and returns it.
func descendants(pid int, found map[int]bool) map[int]bool {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, path := range threads {
		children, _ := os.ReadFile(path) // the process may have ended
		for _, field := range strings.Fields(string(children)) {
			child, _ := strconv.Atoi(field)
			found[child] = true
			descendants(child, found)
		}
	}
	return found
}
