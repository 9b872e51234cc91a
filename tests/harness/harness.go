// Package harness starts the real parts that a test needs, and stops them when the test ends. Its subpackages do the
// work, and serve programs that are not tests too.
package harness

import (
	"net"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// The agent of a World, and its token.
const (
	AgentID    = "agent-001"
	AgentToken = "the-agents-token"
)

// Eventually polls until ready returns nil. After timeout it fails the test with ready's last error.
func Eventually(t *testing.T, timeout time.Duration, ready func() error) {
	t.Helper()
	if err := process.Poll(t.Context(), timeout, nil, ready); err != nil {
		t.Fatal(err)
	}
}

// NewGroup returns a group of processes that is closed when the test ends.
func NewGroup(t *testing.T) *process.Group {
	t.Helper()
	group, err := process.NewGroup()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(group.Close)
	return group
}

// Binary returns the path of a program that make has built.
func Binary(t *testing.T, name string) string {
	t.Helper()
	path, err := process.Binary(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Root returns the top of the repository.
func Root(t *testing.T) string {
	t.Helper()
	root, err := process.Root()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// FreeAddr returns an address of 127.0.0.1 that nobody listens on.
func FreeAddr(t *testing.T) string {
	t.Helper()
	addr, err := process.FreeAddr()
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

// SilentAddr returns an address of 127.0.0.1 that accepts connections and says nothing, until the test ends.
func SilentAddr(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	return listener.Addr().String()
}

// StartAgent starts an agent and waits until it is ready.
func StartAgent(t *testing.T, a *agent.Agent) {
	t.Helper()
	err := a.Start()
	if err == nil {
		err = a.WaitReady(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
}
