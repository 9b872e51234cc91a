package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// page is one page of the manifests, or two. The tests run its commands word for word.
type page struct {
	blocks [][]string // consecutive commands; a command within a sentence is a block of its own

	mu  sync.Mutex
	ran map[string]bool // by command
}

func (p *page) run(commands ...string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range commands {
		p.ran[c] = true
	}
}

// within matches the commands within sentences.
var within = regexp.MustCompile("`((?:cp|ctr|docker|kubectl|make) [^`]+)`")

func readPage(t *testing.T, names ...string) *page {
	t.Helper()
	p := &page{ran: map[string]bool{}}
	for _, name := range names {
		data, err := os.ReadFile(filepath.Join(harness.Root(t), "manifests", name))
		if err != nil {
			t.Fatal(err)
		}
		p.read(string(data))
	}
	return p
}

// read adds the commands of a file.
func (p *page) read(text string) {
	var block []string
	more, fenced := false, false // whether the last command continues; whether it is a file's content
	for line := range strings.Lines(text + "\n") {
		code, indented := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "    ")
		fenced = fenced != strings.HasPrefix(line, "```")
		indented = indented && !fenced
		switch {
		case indented && more:
			block[len(block)-1] += "\n" + code
		case indented:
			block = append(block, code)
		case len(block) > 0:
			p.blocks, block = append(p.blocks, block), nil
		}
		more = indented && strings.HasSuffix(code, `\`)
		if !indented {
			for _, match := range within.FindAllStringSubmatch(line, -1) {
				p.blocks = append(p.blocks, []string{match[1]})
			}
		}
	}
}

// command returns the page's command that equals words, or else the first that begins with them.
func (p *page) command(t *testing.T, words string) string {
	t.Helper()
	all := slices.Concat(p.blocks...)
	for _, matches := range []func(c string) bool{
		func(c string) bool { return c == words },
		func(c string) bool { return strings.HasPrefix(c, words) },
	} {
		if n := slices.IndexFunc(all, matches); n >= 0 {
			p.run(all[n])
			return all[n]
		}
	}
	t.Fatalf("the page has no command that begins with %q", words)
	return ""
}

// block returns the commands of a block of the page, from the one that begins with words to the last.
func (p *page) block(t *testing.T, words string) string {
	t.Helper()
	block, n := p.find(t, words)
	p.run(block[n:]...)
	return strings.Join(block[n:], "\n")
}

// whole returns all commands of the block with the one that begins with words.
func (p *page) whole(t *testing.T, words string) string {
	t.Helper()
	block, _ := p.find(t, words)
	p.run(block...)
	return strings.Join(block, "\n")
}

func (p *page) find(t *testing.T, words string) (block []string, n int) {
	t.Helper()
	command := p.command(t, words)
	for _, block := range p.blocks {
		if n := slices.Index(block, command); n >= 0 {
			return block, n
		}
	}
	panic("a command in no block")
}

// shell runs commands in a directory, with programs of its own first in PATH.
type shell struct {
	t   *testing.T
	dir string
	env []string
}

func newShell(t *testing.T, dir string, env ...string) *shell {
	t.Helper()
	bin := filepath.Join(dir, "bin")
	path := "PATH=" + bin + ":" + filepath.Dir(harness.Binary(t, "kubectl")) + ":" +
		filepath.Join(harness.Root(t), ".build", "bin") + ":" + os.Getenv("PATH")
	return &shell{t, dir, append([]string{path, "HOME=" + dir}, env...)}
}

// program adds a script under the given name to PATH.
func (s *shell) program(name, script string) {
	s.t.Helper()
	path := filepath.Join(s.dir, "bin", name)
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o700)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *shell) run(command string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute) // t.Context has ended when the cleanup runs
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-ec", command)
	cmd.Dir, cmd.Env = s.dir, s.env
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return string(out), err
}

func (s *shell) must(command string) string {
	s.t.Helper()
	begin := time.Now()
	out, err := s.run(command)
	s.t.Logf("%4.1f s: %s", time.Since(begin).Seconds(), command)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

// TestEveryCommandOfTheInstallPageWorks runs each command of the install page and of the one on operations, and checks
// that it does what the page says.
func TestEveryCommandOfTheInstallPageWorks(t *testing.T) {
	p := readPage(t, "README.md", "OPERATIONS.md")
	var ran atomic.Int32
	parts := map[string]func(*testing.T, *page){
		"cluster": installOnCluster, "registry": pushImages,
		"docker": func(t *testing.T, p *page) { // not in parallel: they use the same ports
			t.Run("compose", func(t *testing.T) { runByCompose(t, p) })
			t.Run("run", func(t *testing.T) { runByDocker(t, p) })
		},
	}
	passed := t.Run("by", func(t *testing.T) {
		for name, part := range parts {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				part(t, p)
				ran.Add(1)
			})
		}
	})
	if !passed || int(ran.Load()) != len(parts) { // -run may have selected some
		return
	}
	// `make e2e` itself and .ci/run have run these.
	for _, words := range []string{"make images", "make release", "make release VERSION", "make verify-images"} {
		p.command(t, words)
	}
	// TestOwnFrps and TestHighAvailabilityLosesNoCall run these.
	for _, words := range []string{replacePods, deleteEvicted, deleteLost} {
		p.block(t, words)
	}
	p.allRan(t)
}

// allRan checks that a test has run each command of the page.
func (p *page) allRan(t *testing.T) {
	t.Helper()
	for _, c := range slices.Concat(p.blocks...) {
		if !p.ran[c] {
			t.Errorf("no test runs %s", c)
		}
	}
}

// installOnCluster installs the agent, upgrades it, rotates its token, applies an overlay with every component, and
// removes everything.
func installOnCluster(t *testing.T, p *page) {
	i := prepare(t)
	sh := newShell(t, filepath.Dir(i.dir), "KUBECONFIG="+i.admin)
	do := func(words string) string {
		t.Helper()
		return sh.must(p.command(t, words))
	}
	callers := func(token string) {
		t.Helper()
		if err := agent.WriteCaller(i.caller, i.cp, agentID, token); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			_, err := i.run(i.caller, "", nil, "get", "nodes")
			return err
		})
	}
	const rollout = "kubectl -n pipeops-system rollout status"
	newVersion := i.previousVersion()

	if _, err := sh.run(p.command(t, "kubectl apply -k manifests")); err == nil ||
		!strings.Contains(err.Error(), "agent.env: no such file") {
		t.Errorf("without its files: %v", err)
	}
	// Nobody has edited it. What follows replaces what it has installed.
	sh.must("kubectl kustomize manifests/overlays/install > install.yaml")
	do("kubectl apply -f install.yaml")
	eventually(t, func() error {
		out := do("kubectl -n pipeops-system describe pods")
		if !strings.Contains(out, "Exit Code:    2") || !strings.Contains(out, "YOUR-AGENT-ID") {
			return fmt.Errorf("describe pods: %s", out)
		}
		return nil
	})
	do("echo PIPEOPS_AGENT_ID=")
	settings := "PIPEOPS_AGENT_ID=" + agentID + "\nPIPEOPS_API_URL=" + i.cp.APIURL +
		"\nPIPEOPS_API_CA_FILE=/etc/pipeops/tls/ca.crt\nPIPEOPS_FRP_TLS_CA_FILE=/etc/pipeops/tls/ca.crt\n"
	i.write("agent.env", settings)
	do("(umask 077; echo your-agent-token")
	i.cp.SetAgent(agentID, "your-agent-token")
	do("kubectl apply -k manifests")
	eventually(t, func() error { // the CA is missing
		out := do("kubectl -n pipeops-system describe pods")
		if !strings.Contains(out, "Exit Code:    2") || !strings.Contains(out, "/etc/pipeops/tls/ca.crt") {
			return fmt.Errorf("describe pods: %s", out)
		}
		return nil
	})
	sh.must("cp manifests/overlays/test/ca.crt .")
	do("kubectl -n pipeops-system create secret generic pipeops-agent-tls")
	do(rollout)
	if out := do("kubectl -n kube-node-lease"); !strings.Contains(out, cluster.NodeName) {
		t.Errorf("the clocks of the nodes: %s", out)
	}
	out := do("kubectl -n pipeops-system exec deployment/pipeops-agent -c bootstrap")
	if strings.Contains(out, "failed") || strings.Contains(out, "skipped") {
		t.Errorf("doctor:\n%s", out)
	}
	if out := do("kubectl -n pipeops-system logs"); !strings.Contains(out, "lease") {
		t.Errorf("bootstrap's log:\n%s", out)
	}
	callers("your-agent-token")

	// An upgrade, and its rollback.
	version := func() string { // and settings
		return i.mustKubectl(i.admin, "-n", "pipeops-system", "get", "deployment/pipeops-agent", "-o",
			"jsonpath={.spec.template.spec.containers[0].image} {.spec.template.spec.containers[0].envFrom[0].configMapRef.name}")
	}
	before := version()
	newVersion()
	i.write("agent.env", settings+"PIPEOPS_LOG_LEVEL=debug\n")
	// The load writes.
	i.mustKubectl(i.admin, "create", "clusterrolebinding", "upgrade", "--clusterrole", "edit",
		"--serviceaccount", "pipeops-system:pipeops-agent")
	t.Cleanup(func() {
		_, _ = i.run(i.admin, "", nil, "delete", "clusterrolebinding", "upgrade", "--ignore-not-found")
	})
	l, stop := startLoad(t, i, "your-agent-token")
	do("kubectl apply -k manifests")
	do(rollout)
	stop()
	if len(l.errors)+len(l.raw) > 0 {
		t.Errorf("during the upgrade of %d calls %d failed, such as: %v",
			l.calls.Load(), len(l.errors)+len(l.raw), slices.Concat(l.errors, l.raw)[0])
	}
	upgraded := strings.Fields(version())
	for n, field := range strings.Fields(before) {
		if upgraded[n] == field {
			t.Errorf("after the upgrade the pods have %v, before %s", upgraded, before)
		}
	}
	do("kubectl -n pipeops-system rollout undo")
	do(rollout)
	if version() != before {
		t.Errorf("after the rollback the pods have %s, before %s", version(), before)
	}
	callers("your-agent-token")
	i.write("agent.env", settings)
	do("kubectl apply -k manifests")
	do(rollout)
	callers("your-agent-token")

	pods := func() string { // with the restarts of their proxies
		return i.mustKubectl(i.admin, "-n", "pipeops-system", "get", "pods", "-o",
			`jsonpath={range .items[*]}{.metadata.name}: {.status.containerStatuses[*].restartCount}{"\n"}{end}`)
	}
	eventually(t, func() error { // the previous pods drain
		if before = pods(); strings.Count(before, "\n") != 1 {
			return fmt.Errorf("there are %s", before)
		}
		return nil
	})
	i.cp.SetAgent(agentID, "another-agent-token")
	sh.must(p.block(t, "(umask 077; echo another-agent-token"))
	// The kubelet polls for changed Secrets. Callers must not poll: a caller that is refused too often is blocked for a
	// minute.
	if err := process.Poll(t.Context(), 2*time.Minute, nil, func() error {
		log, err := i.run(i.admin, "", nil, "-n", "pipeops-system", "logs", "deployment/pipeops-agent", "-c", "proxy")
		if err == nil && !strings.Contains(log, "agent token changed") {
			err = errors.New("the pod still has the old token")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	callers("another-agent-token")
	if after := pods(); after != before {
		t.Errorf("pods and restarts of the proxy: %s, before %s", after, before)
	}
	i.runbooks(sh)
	do(rollout)
	i.move(p, sh, "another-agent-token")
	callers("another-agent-token")

	if _, err := i.run(i.admin, cluster.PrometheusOperatorKinds, nil, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := i.run(i.admin, cluster.PrometheusOperatorKinds, nil, "delete", "-f", "-"); err != nil {
			t.Error(err)
		}
	})
	if _, err := i.run(i.admin, cluster.PrometheusOperatorKinds, nil,
		"wait", "--for", "condition=Established", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	objects := func() []string {
		names := strings.Fields(i.mustKubectl(i.admin, "-n", "pipeops-system", "get", "-o", "name",
			"-l", "app.kubernetes.io/part-of=pipeops", clusterKinds()+",roles,rolebindings,"+
				"secrets,configmaps,poddisruptionbudgets,networkpolicies,podmonitors,prometheusrules,serviceaccounts,deployments"))
		return slices.DeleteFunc(names, func(name string) bool { // current and previous settings
			return strings.HasPrefix(name, "configmap/pipeops-agent-") && name != "configmap/pipeops-agent-dashboard" &&
				name != "configmap/pipeops-agent-access"
		})
	}
	base := objects()
	i.write("overlays/test/agent-token", "another-agent-token\n")
	i.patches = i.openPorts()
	i.components("manage-all-namespaces", "cluster-admin", "read-cluster-kinds", "deploy", "guard", "access", "runners",
		"high-availability", "network-policy", "priority", "monitoring")
	sh.must(strings.ReplaceAll(p.command(t, "kubectl apply -k manifests/overlays/NAME"), "NAME", "test"))
	do(rollout)
	refused := func() error { // the switch
		out, err := i.run(i.caller, "", nil, "get", "nodes")
		if err != nil && strings.Contains(err.Error(), "pipeops-agent-access") {
			return nil
		}
		return errors.Join(fmt.Errorf("the switch does not refuse: %s", out), err)
	}
	eventually(t, refused)
	closing := p.command(t, "kubectl -n pipeops-system patch configmap pipeops-agent-access")
	sh.must(strings.ReplaceAll(closing, "none", "all"))
	eventually(t, func() error {
		out, err := i.run(i.caller, "", nil, "auth", "can-i", "create", "clusterroles")
		if err == nil && out != "yes\n" {
			err = errors.New("cluster-admin grants nothing")
		}
		return err
	})
	added := 19
	if node.Supports("guard") {
		added += 3
		if out, err := i.run(i.caller, "", nil, "-n", "kube-system", "create", "configmap", "a"); err == nil ||
			!strings.Contains(err.Error(), "pipeops-agent-guard") {
			t.Errorf("the guard: %s, %v", out, err)
		}
	}
	i.assignRunner("another-agent-token")
	saved := func() string {
		return i.mustKubectl(i.admin, "-n", "pipeops-system", "get", "-o", "jsonpath={.items[*].data}",
			"configmap/pipeops-agent-access", "secret/pipeops-agent-runners")
	}
	data := saved()
	sh.must(p.block(t, "(umask 077; kubectl -n pipeops-system get -o yaml"))
	sh.must(closing)
	eventually(t, refused)
	if with := objects(); len(with) != len(base)+added {
		t.Errorf("with all components there are %v", with)
	}
	do("kubectl apply -k manifests")
	do(rollout)
	// named is not installed: the gateway of these tests names nobody.
	removal := strings.ReplaceAll(p.whole(t, "kubectl delete clusterrolebinding pipeops-agent-manage"),
		"pipeops-agent-named", "pipeops-agent-named --ignore-not-found")
	if !node.Supports("guard") {
		removal = strings.Replace(removal, "kubectl delete validatingadmissionpolicy,", "true ", 1)
	}
	sh.must(removal)
	if diff := cmp.Diff(base, objects()); diff != "" {
		t.Errorf("after the components were removed (-before +after)\n%s", diff)
	}

	sh.must(p.block(t, "kubectl delete clusterrole,clusterrolebinding,priorityclass -l"))
	if out := i.mustKubectl(i.admin, "get", "namespace,clusterrole,clusterrolebinding,priorityclass",
		"-l", "app.kubernetes.io/part-of=pipeops", "-o", "name"); out != "" {
		t.Errorf("left: %s", out)
	}
	if out, err := i.run(i.caller, "", nil, "get", "--raw", "/version"); err == nil ||
		!strings.Contains(err.Error(), "is not connected to the control plane") {
		t.Errorf("the tunnel: %s, %v", out, err)
	}

	sh.must(strings.ReplaceAll(p.block(t, "kubectl apply -f manifests/components/namespace"),
		"-k manifests", "-k manifests/overlays/test"))
	do(rollout)
	callers("another-agent-token") // so the switch is open, as it was
	if restored := saved(); restored != data || !strings.Contains(data, "r1") {
		t.Errorf("restored: %s, saved: %s", restored, data)
	}
}

// runbooks runs the commands of the alerts' runbooks, for a pod whose token was rotated a moment ago.
func (i *installed) runbooks(sh *shell) {
	i.t.Helper()
	data, err := os.ReadFile(filepath.Join(i.dir, "components", "monitoring", "runbooks.md"))
	if err != nil {
		i.t.Fatal(err)
	}
	pod := i.mustKubectl(i.admin, "-n", "pipeops-system", "get", "pods", "-o", "jsonpath={.items[*].metadata.name}")
	var read, fix []string
	for _, match := range within.FindAllStringSubmatch(string(data), -1) {
		command := strings.NewReplacer("POD", pod, "NODE", cluster.NodeName, "CALLERS", i.caller).Replace(match[1])
		switch {
		case slices.Contains(slices.Concat(read, fix), command):
		case strings.Contains(command, " delete pod "):
			fix = slices.Insert(fix, 0, command)
		case strings.Contains(command, " rollout "):
			fix = append(fix, command)
		default:
			read = append(read, command)
		}
	}
	if len(read) < 15 || len(fix) < 3 {
		i.t.Fatalf("the runbooks have %d commands to read and %d to fix", len(read), len(fix))
	}
	// Commands that find nothing while the agent works.
	nothing := regexp.MustCompile(`"status":5|authentication failed|what the owner|"outcome":|grep -v True`)
	// There is no previous container, the timeout is too short, and the component access is not installed yet.
	expected := regexp.MustCompile(`previous terminated container|timed out waiting|"pipeops-agent-access" not found`)
	for _, command := range slices.Concat(read, fix) {
		if nothing.MatchString(command) { // check that kubectl accepts it
			command, _, _ = strings.Cut(command, "|")
		}
		eventually(i.t, func() error { // frpc's start may not be in the log yet
			_, err := sh.run(command)
			if err != nil && expected.MatchString(err.Error()) {
				return nil
			}
			return err
		})
	}
}
