package harness

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// World is a control plane and one agent of it. Both end with the test.
type World struct {
	Group        *process.Group
	ControlPlane *controlplane.ControlPlane
	Agent        *agent.Agent
}

// NewWorld starts a control plane, and prepares an agent that reaches its API server by kubeconfig. The agent is not
// started. If the test fails, the ends of all logs are shown.
func NewWorld(t *testing.T, kubeconfig string, options ...func(*controlplane.Options)) *World {
	t.Helper()
	group := NewGroup(t)
	log, err := os.Create(filepath.Join(group.Dir(), "controlplane.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	o := controlplane.Options{
		Group: group, Agents: map[string]string{AgentID: AgentToken}, Log: slog.New(slog.NewTextHandler(log, nil)),
	}
	for _, option := range options {
		option(&o)
	}
	w := &World{Group: group}
	if w.ControlPlane, err = controlplane.Start(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.ControlPlane.Close)
	if w.Agent, err = agent.New(group, w.ControlPlane, AgentID, AgentToken, kubeconfig); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			showLogs(t, group)
		}
	})
	return w
}

// showLogs shows the end of each process's log.
func showLogs(t *testing.T, group *process.Group) {
	t.Helper()
	logs, _ := filepath.Glob(filepath.Join(group.Dir(), "*.log"))
	for _, name := range logs {
		data, _ := os.ReadFile(name)
		lines := strings.Split(string(data), "\n")
		t.Logf("%s:\n%s", filepath.Base(name), strings.Join(lines[max(0, len(lines)-15):], "\n"))
	}
}
