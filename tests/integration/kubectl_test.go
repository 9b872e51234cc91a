package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

const configMap = `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"thing"},"data":{"a":"%s"}}`

// TestKubectlPrintsTheSameThroughTheTunnel compares kubectl's output through the tunnel with its output directly from
// the API server, with the same rights. It runs alone, because it reads the objects of all namespaces.
func TestKubectlPrintsTheSameThroughTheTunnel(t *testing.T) {
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

// TestChangesWorkTheSameThroughTheTunnel makes the same changes directly and through the tunnel, each in a namespace
// of its own, and compares kubectl's output.
func TestChangesWorkTheSameThroughTheTunnel(t *testing.T) {
	t.Parallel()
	w := connected(t)
	const (
		deployment = `{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"d"},"spec":{
			"replicas":%d,"selector":{"matchLabels":{"a":"b"}},
			"template":{"metadata":{"labels":{"a":"b"}},"spec":{"containers":[{"name":"c","image":"i"}]}}}}`
		odd = `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"odd"},"data":{},"nonsense":1}`
	)
	big := fmt.Sprintf(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"big"},"data":{"a":%q}}`,
		strings.Repeat("0123456789abcdef", 60<<10)) // 960 KiB
	steps := []struct{ command, stdin string }{
		{"apply --server-side -f -", fmt.Sprintf(deployment, 1)},
		{"diff -f -", fmt.Sprintf(deployment, 2)},
		{"apply --server-side --field-manager other -f -", fmt.Sprintf(deployment, 3)}, // a conflict
		{"scale deployment d --replicas 5", ""},
		{"wait --for=jsonpath={.spec.replicas}=5 deployment/d --timeout=5s", ""},
		{"wait --for=condition=Available deployment/d --timeout=1s", ""}, // no controller makes it available
		{"rollout history deployment d", ""},
		{"set image deployment d c=other", ""},
		{"patch deployment d --type json -p [{\"op\":\"remove\",\"path\":\"/spec/replicas\"}]", ""},
		{"label deployment d x=y", ""},
		{"annotate deployment d x=y", ""},
		{"get deployment d -o jsonpath={.spec.replicas}{.metadata.labels}{.metadata.annotations}", ""},
		{"create --validate=warn -f -", odd},
		{"create --validate=strict -f -", odd},
		{"create -f -", big},
		{"get configmap big -o yaml --show-managed-fields=false -o jsonpath={.data}", ""},
		{"create secret generic s --from-literal=a=b", ""},
		{"get secret s -o go-template={{.data.a}}", ""},
		{"create serviceaccount sa", ""},
		{"create rolebinding rb --clusterrole=view --serviceaccount=default:sa", ""},
		{"auth can-i list pods", ""},
		{"get deployments,configmaps,secrets,rolebindings", ""},
		{"get all --chunk-size=1 -o name", ""},
		{"delete deployment d --cascade=background", ""},
		{"delete configmap --all", ""},
		{"delete -f -", big}, // gone
		{"get events", ""},
	}
	output := map[string][]harness.Result{}
	for _, kubeconfig := range []string{w.direct, w.caller} {
		ns := w.namespace()
		for _, step := range steps {
			r := withoutAges(w.kubectl(kubeconfig, step.stdin, append(strings.Fields(step.command), "-n", ns)...))
			for _, unique := range []*regexp.Regexp{
				regexp.MustCompile(ns), regexp.MustCompile(`(LIVE|MERGED)-\d+`),
				regexp.MustCompile(`\d{4}-\d\d-\d\d[T ][0-9:.]+( \+0000)?`),
				regexp.MustCompile(`uid: \S+`), regexp.MustCompile(`resourceVersion: \S+`),
			} {
				r.Stdout, r.Stderr = unique.ReplaceAllString(r.Stdout, "X"), unique.ReplaceAllString(r.Stderr, "X")
			}
			output[kubeconfig] = append(output[kubeconfig], r)
		}
	}
	succeeded := 0
	for i, step := range steps {
		if diff := cmp.Diff(output[w.direct][i], output[w.caller][i]); diff != "" {
			t.Errorf("%s (-direct +tunnel):\n%s", step.command, diff)
		}
		if output[w.direct][i].Code == 0 {
			succeeded++
		}
	}
	if want := len(steps) - 5; succeeded != want { // diff, the conflict, no controller makes it available, strict, gone
		for i, step := range steps {
			t.Logf("%s: %.300v", step.command, output[w.direct][i])
		}
		t.Errorf("%d steps succeeded, want %d", succeeded, want)
	}
}

// TestKubectlProxyWorksThroughTheTunnel runs kubectl proxy with the caller's kubeconfig.
func TestKubectlProxyWorksThroughTheTunnel(t *testing.T) {
	t.Parallel()
	w := connected(t)
	p := w.startKubectl("kubectl-proxy", "proxy", "--port=0", "--append-server-path")
	var found []string
	eventually(t, func() error {
		if found = regexp.MustCompile(`Starting to serve on (\S+)`).FindStringSubmatch(p.Log()); found == nil {
			return errors.New(p.Log())
		}
		return nil
	})
	resp, body := get(t, http.DefaultClient, "http://"+found[1]+"/api/v1/namespaces/default", nil)
	if resp.StatusCode != http.StatusOK || !strings.Contains(body, `"name":"default"`) {
		t.Errorf("%s: %s", resp.Status, body)
	}
}

// withoutAges replaces the ages in a table, which change between two commands.
func withoutAges(r harness.Result) harness.Result {
	r.Stdout = regexp.MustCompile(`\s+(\d+[smhd])+\b`).ReplaceAllString(r.Stdout, " AGE")
	return r
}

// TestBuiltPartsReportTheirVersion checks that Kubernetes was built with its version. A build from a module reports
// v0.0.0.
func TestBuiltPartsReportTheirVersion(t *testing.T) {
	t.Parallel()
	w := connected(t)
	var versions map[string]struct{ GitVersion, Major, Minor string }
	// The checks below report what is missing.
	_ = json.Unmarshal([]byte(w.mustKubectl("version", "-o", "json")), &versions)
	for _, part := range []string{"clientVersion", "serverVersion"} {
		if v := versions[part]; v.Major == "" || !strings.HasPrefix(v.GitVersion, "v"+v.Major+"."+v.Minor+".") {
			t.Errorf("%s is %+v", part, v)
		}
	}
}

// TestWatchShowsApplyAndDelete follows one object from its creation to its deletion with one watch.
func TestWatchShowsApplyAndDelete(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	watch := w.startKubectl("watch", "get", "configmap", "-n", ns, "-w", "--output-watch-events", "--no-headers",
		"-o", "jsonpath={.type} {.object.metadata.name} {.object.data.a}{\"\\n\"}")
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
	w.mustKubectl("delete", "configmap", "thing", "-n", ns)
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

// TestTunnelRecoversFromEveryKilledHop kills one hop after the other. The same kubeconfig works again when the hop is
// back.
func TestTunnelRecoversFromEveryKilledHop(t *testing.T) {
	t.Parallel()
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
			return process.Poll(t.Context(), 10*time.Second, nil, func() error { // the control plane restarts it
				if pid := w.cp.FrpsPid(); pid == 0 || pid == frpsPid {
					return errors.New("frps has not been restarted")
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

// TestAbsentAgentIsNotReportedAsNotFound checks the gateway. frps answers 404 for an agent that is not connected, and
// kubectl would take that for an object that does not exist.
func TestAbsentAgentIsNotReportedAsNotFound(t *testing.T) {
	t.Parallel()
	w := newWorld(t) // its agent has never started
	for _, command := range []string{
		"delete pod x --ignore-not-found",
		"wait --for=delete pod/x --timeout=1s",
		"get pods",
	} {
		t.Run(command, func(t *testing.T) {
			t.Parallel() // kubectl retries ten times, a second apart
			r := w.kubectl(w.caller, "", strings.Fields(command)...)
			if r.Code == 0 || !strings.Contains(r.Stderr,
				`agent "agent-001" is not connected to the control plane: look at its pod's bootstrap and frpc logs`) {
				t.Errorf("got %+v", r)
			}
		})
	}
}
