// Package chaos breaks every part of the whole path in turn, in pairs and at random, under callers that account for
// every write, event and byte. It needs root: its tests run in a network and a mount namespace of their own.
//
// `make chaos` runs it whole, for hours; results are in tests/CHAOS.md.
package chaos

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const inside = "CHAOS_INSIDE"

// The main thread, by which others find this process's network namespace, runs nothing but main: no goroutine that
// enters another namespace.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	if os.Getenv(inside) != "" {
		klog.SetSlogLogger(slog.New(slog.DiscardHandler)) // client-go logs each broken stream
		os.Exit(m.Run())
	}
	// The child ends with this thread. Its mounts must not reach this machine.
	self := exec.Command("sh", append([]string{"-c", `mount --make-rprivate / && ip link set lo up && exec "$@"`, "sh",
		os.Args[0]}, os.Args[1:]...)...)
	self.Env = append(os.Environ(), inside+"=1")
	self.Stdin, self.Stdout, self.Stderr = os.Stdin, os.Stdout, os.Stderr
	self.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := self.Run(); err != nil {
		if code := self.ProcessState.ExitCode(); code > 0 {
			os.Exit(code)
		}
		fmt.Fprintf(os.Stderr, "chaos: %v: run as root\n", err)
		os.Exit(1)
	}
}
