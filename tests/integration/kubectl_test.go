package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pipeops/vm-agent/tests/process"
)

const configMap = `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"thing"},"data":{"a":"%s"}}`

// TestKubectlCannotTell compares what a person sees of kubectl through the tunnel and straight at the API
// server, with the same rights.
func TestKubectlCannotTell(t *testing.T) {
	w := connected(t)
	ns := w.namespace()
	if r := w.kubectl(w.direct, fmt.Sprintf(configMap, "1"), "apply", "-n", ns, "-f", "-"); r.Code != 0 {
		t.Fatal(r.Stderr)
	}
	for _, command := range []string{
		"get pods -A",
		"get pods -A -o json",
		"get namespace kube-system -o yaml",
		"get configmaps -n " + ns + " -o wide --no-headers -o name",
		"get configmap thing -n " + ns + " -o yaml",
		"get configmap missing -n " + ns,
		"get nonsense",
		"get clusterroles --chunk-size 5 -o name",
		"delete pod missing -n " + ns,
		"delete pod missing -n " + ns + " --ignore-not-found",
		"auth can-i --list",
		"auth can-i create pods",
		"auth whoami -o jsonpath={.status.userInfo.username}",
		"api-resources",
		"api-versions",
		"explain pod.spec.containers.image",
		"version -o yaml",
		"get --raw /readyz?verbose",
		"get --raw /openapi/v3",
		"describe configmap thing -n " + ns,
		"create namespace Not_A_Name",
	} {
		t.Run(command, func(t *testing.T) {
			args := strings.Fields(command)
			want := withoutAges(w.kubectl(w.direct, "", args...))
			got := withoutAges(w.kubectl(w.caller, "", args...))
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-direct +tunnel):\n%s", diff)
			}
		})
	}
}

// withoutAges blanks the ages in a table, which go on between one command and the next.
func withoutAges(r result) result {
	r.Stdout = regexp.MustCompile(`\s+(\d+[smhd])+\b`).ReplaceAllString(r.Stdout, " AGE")
	return r
}

// TestVersionsAreTold: what is built from a module must be told its version, or clients see v0.0.0.
func TestVersionsAreTold(t *testing.T) {
	w := connected(t)
	var versions map[string]struct{ GitVersion, Major, Minor string }
	_ = json.Unmarshal([]byte(w.must("version", "-o", "json")), &versions) // what is missing is told below
	for _, part := range []string{"clientVersion", "serverVersion"} {
		if v := versions[part]; v.Major == "" || !strings.HasPrefix(v.GitVersion, "v"+v.Major+"."+v.Minor+".") {
			t.Errorf("%s is %+v", part, v)
		}
	}
}

// TestApplyWatchDelete follows one object through its life with a watch that is open all the while.
func TestApplyWatchDelete(t *testing.T) {
	w := connected(t)
	ns := w.namespace()
	watch, err := w.group.Start("watch", []string{"KUBECONFIG=" + w.caller}, w.binary("kubectl"),
		"get", "configmap", "-n", ns, "-w", "--output-watch-events", "--no-headers", "-o", "jsonpath={.type} {.object.metadata.name} {.object.data.a}{\"\\n\"}")
	if err != nil {
		t.Fatal(err)
	}
	seen := func(line string) {
		t.Helper()
		eventually(t, func() error {
			if !strings.Contains(watch.Log(), line+"\n") {
				return fmt.Errorf("the watch has not shown %q:\n%s", line, watch.Log())
			}
			return nil
		})
	}
	for _, step := range []struct{ value, kubectl, event string }{
		{"1", "configmap/thing created", "ADDED thing 1"},
		{"2", "configmap/thing configured", "MODIFIED thing 2"},
		{"2", "configmap/thing unchanged", "MODIFIED thing 2"},
	} {
		r := w.kubectl(w.caller, fmt.Sprintf(configMap, step.value), "apply", "-n", ns, "-f", "-")
		if strings.TrimSpace(r.Stdout) != step.kubectl || r.Code != 0 {
			t.Fatalf("apply: got %+v, want %q", r, step.kubectl)
		}
		seen(step.event)
	}
	w.must("delete", "configmap", "thing", "-n", ns)
	seen("DELETED thing 2")
	if r := w.kubectl(w.direct, "", "get", "configmap", "thing", "-n", ns); r.Code == 0 {
		t.Error("the object is still there")
	}
	select {
	case <-watch.Done():
		t.Errorf("the watch has ended: %v", watch.Failed())
	default:
	}
}

// TestEveryHopRestarts kills one hop after the other. The same kubeconfig works again when it is back.
func TestEveryHopRestarts(t *testing.T) {
	w := connected(t)
	frpsPid := w.cp.FrpsPid()
	for _, hop := range []struct {
		name string
		kill func() error
	}{
		{"frpc", func() error { w.agent.Frpc.Kill(); return w.agent.StartFrpc() }},
		{"proxy", func() error { w.agent.Proxy.Kill(); return w.agent.StartProxy() }},
		{"frps", func() error {
			p, err := os.FindProcess(frpsPid)
			if err != nil {
				return err
			}
			if err := p.Kill(); err != nil {
				return err
			}
			return process.Poll(t.Context(), 10*time.Second, nil, func() error { // the control plane starts it again
				if pid := w.cp.FrpsPid(); pid == 0 || pid == frpsPid {
					return errors.New("frps has not been started again")
				}
				return nil
			})
		}},
	} {
		t.Run(hop.name, func(t *testing.T) {
			if err := hop.kill(); err != nil {
				t.Fatal(err)
			}
			// kubectl gives up by itself ten seconds after the gateway's first 503.
			eventually(t, func() error {
				if r := w.kubectl(w.caller, "", "get", "namespace", "default", "-o", "name"); r.Stdout != "namespace/default\n" {
					return fmt.Errorf("kubectl: %+v", r)
				}
				return nil
			})
		})
	}
}

// TestAwayIsNotNotFound holds the gateway to its promise: frps answers 404 for an agent that is away, and
// kubectl must not take that for an object that does not exist.
func TestAwayIsNotNotFound(t *testing.T) {
	w := newWorld(t) // its agent has never started
	for _, command := range []string{
		"delete pod x --ignore-not-found",
		"wait --for=delete pod/x --timeout=1s",
		"get pods",
	} {
		t.Run(command, func(t *testing.T) {
			t.Parallel() // kubectl tries ten times, a second apart
			r := w.kubectl(w.caller, "", strings.Fields(command)...)
			if r.Code == 0 || !strings.Contains(r.Stderr, `agent "agent-001" is not connected to the control plane: look at its pod's bootstrap and frpc logs`) {
				t.Errorf("got %+v", r)
			}
		})
	}
}
