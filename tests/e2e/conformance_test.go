package e2e

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/cert"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
)

// usualSpecs are conformance specs of kubectl, discovery, lists, writes and the way to pods, which take few seconds
// each. None holds a watch without starting it again when it ends, as it does when the agent restarts, and none
// resolves names.
const usualSpecs = `\[sig-cli\] Kubectl (client Kubectl|logs)|` +
	`\[sig-api-machinery\] (AggregatedDiscovery|Discovery|FieldValidation|Servers with support for|server version)|` +
	`\[sig-apps\] ReplicaSet should serve a basic image`

// TestConformance runs Kubernetes' own conformance specs through the tunnel, while the agent's two replicas are
// restarted again and again. By default it runs a few, on one node without a DNS server; if FOCUS is set, there
// are both a second node and DNS. `make conformance` sets
//
//	CONFORMANCE_FOCUS     a regular expression for the specs' names
//	CONFORMANCE_SKIP      the same, for specs to leave out
//	CONFORMANCE_ROLL      seconds from one restart of the Deployment to the next; 0: none
//	CONFORMANCE_IDENTITY  agent, or own: the specs run as a ServiceAccount with its own token
//	CONFORMANCE_DIRECT    if not empty, the specs do without the agent
//	CONFORMANCE_PROCS     how many specs run at once
//	CONFORMANCE_TIMEOUT   when to give up
//	CONFORMANCE_REPORT    file for the results, as Markdown, beside a .log of the specs
func TestConformance(t *testing.T) {
	t.Parallel() // it waits most of the time
	setting := func(name, usual string) string { return cmp.Or(os.Getenv("CONFORMANCE_"+name), usual) }
	roll, err := time.ParseDuration(setting("ROLL", "30") + "s")
	if err != nil {
		t.Fatal(err)
	}
	identity, direct := setting("IDENTITY", "agent"), setting("DIRECT", "") != ""
	focus := setting("FOCUS", "")
	machines, tools := []*cluster.Machine{node.Machine}, []string{"curl", "nc"}
	if focus != "" {
		if err := node.StartDNS(t.Context()); err != nil {
			t.Fatal(err)
		}
		machines, tools = append(machines, startWorker(t)), append(tools, "dig", "getent")
	}
	i := prepareBeside(t, func(o *controlplane.Options) { o.Identity = identity })
	kubeconfig := i.admin
	if !direct {
		kubeconfig = i.caller
		i.beAdministrator(identity)
		i.setting("PIPEOPS_ACCESS_IDENTITY=" + identity)
		i.components("high-availability")
		i.apply()
	}
	group := harness.NewGroup(t)
	i.importSpecImages(filepath.Join(group.Dir(), "images.tar"), machines, tools)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var rolling sync.WaitGroup
	rolls := 0
	if roll > 0 && !direct {
		rolling.Go(func() { rolls = i.roll(ctx, roll) })
	}
	begin := time.Now()
	// If unshare is killed, all that it has started is, too.
	run, err := group.Start("specs", nil, "unshare", "--pid", "--fork", "--kill-child", "--", harness.Binary(t, "ginkgo"),
		"--no-color", "--label-filter=Conformance", "--focus="+cmp.Or(focus, usualSpecs),
		"--skip="+setting("SKIP", `\[Slow\]`), "--procs="+setting("PROCS", "2"), "--timeout="+setting("TIMEOUT", "5m"),
		"--output-dir="+group.Dir(), "--json-report=report.json", harness.Binary(t, "e2e.test"), "--",
		"--provider=skeleton", "--kubeconfig="+kubeconfig, "--kubectl-path="+harness.Binary(t, "kubectl"),
		"--dump-logs-on-failure=false", "--disable-log-dump")
	if err != nil {
		t.Fatal(err)
	}
	code := run.ExitCode()
	took := time.Since(begin)
	stop()
	rolling.Wait()
	r, err := readResults(filepath.Join(group.Dir(), "report.json"))
	if err != nil {
		t.Fatal(err, run.Failed())
	}
	version, err := node.Client.Discovery().ServerVersion()
	if err != nil {
		t.Fatal(err)
	}
	way := "through the agent in identity " + identity
	if direct {
		way = "without the agent"
	}
	page := fmt.Sprintf("%s, Kubernetes %s, %d CPUs, %s: %.0f s, %d restarts of the Deployment\n\n%s",
		begin.Format(time.DateOnly), version.GitVersion, runtime.NumCPU(), way, took.Seconds(), rolls, r)
	t.Log(page)
	if file := setting("REPORT", ""); file != "" {
		if err := errors.Join(os.WriteFile(file, []byte(page), 0o600),
			os.WriteFile(file+".log", []byte(run.Log()), 0o600)); err != nil {
			t.Error(err)
		}
	}
	if code != 0 || r.count("passed", "") == 0 {
		t.Errorf("exit code %d: see the table above", code)
	}
}

// beAdministrator gives the callers all rights: as the agent, or in identity own as a ServiceAccount of their own.
func (i *installed) beAdministrator(identity string) {
	i.t.Helper()
	ctx := i.t.Context()
	caller := "pipeops-agent"
	if identity == "own" {
		caller = "administrator"
		account, err := node.Account(ctx, i.ns, caller)
		if err == nil {
			err = agent.WriteCaller(i.caller, i.cp, agentID, account.BearerToken)
		}
		if err != nil {
			i.t.Fatal(err)
		}
	}
	bindings := node.Client.RbacV1().ClusterRoleBindings()
	if _, err := bindings.Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: i.ns},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: i.ns, Name: caller}},
	}, metav1.CreateOptions{}); err != nil {
		i.t.Fatal(err)
	}
	i.t.Cleanup(func() {
		if err := bindings.Delete(context.Background(), i.ns, metav1.DeleteOptions{}); err != nil {
			i.t.Error(err)
		}
	})
}

// roll restarts the Deployment until ctx ends, and returns how often. It waits for no rollout but the last.
func (i *installed) roll(ctx context.Context, every time.Duration) (rolls int) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			i.rollout()
			return rolls
		case <-tick.C:
			if _, err := i.run(i.admin, "", nil, "-n", i.ns, "rollout", "restart", "deployment/pipeops-agent"); err != nil {
				i.t.Error(err)
			}
			rolls++
		}
	}
}

// importSpecImages builds the images of the specs, as far as their programs are here, and imports them into the
// machines by the names that e2e.test has for them. Their tools are busybox's and this machine's bash; agnhost has this
// machine's tools, too.
func (i *installed) importSpecImages(archive string, machines []*cluster.Machine, tools []string) {
	t := i.t
	t.Helper()
	list := exec.CommandContext(t.Context(), harness.Binary(t, "e2e.test"), "--list-images")
	names, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	file := func(path string) []byte {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	layer := func(files map[string][]byte, links map[string]string, setuid ...string) cluster.Layer {
		made, err := cluster.NewLayer(files, links, setuid...)
		if err != nil {
			t.Fatal(err)
		}
		return made
	}
	applets, err := exec.CommandContext(t.Context(), "/bin/busybox", "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	links := map[string]string{}
	for _, applet := range strings.Fields(string(applets)) {
		if applet != "busybox" {
			links["/bin/"+applet] = "busybox"
		}
	}
	shell := map[string][]byte{"/bin/busybox": file("/bin/busybox"), "/tmp/": nil, "/uploads/": nil,
		"/etc/passwd": []byte("root:x:0:0:root:/:/bin/sh\nuser-defined-in-image:x:1000:1000::/:/bin/sh\n"),
		"/etc/group": []byte("root:x:0:\nuser-defined-in-image:x:1000:\n" +
			"group-defined-in-image:x:50000:user-defined-in-image\n")}
	busybox := layer(shell, links)
	// borrow adds programs of this machine, with their libraries.
	borrow := func(files map[string][]byte, programs ...string) map[string][]byte {
		for _, name := range programs {
			program, err := exec.LookPath(name)
			if err != nil {
				t.Fatal(err)
			}
			libraries, err := exec.CommandContext(t.Context(), "ldd", program).Output()
			if err != nil {
				t.Fatal(err)
			}
			files["/bin/"+name] = file(program)
			for _, library := range regexp.MustCompile(`/\S+`).FindAllString(string(libraries), -1) {
				files[library] = file(library)
			}
		}
		return files
	}
	// Debian's busybox hides variables with a dash in their name, so sh is bash; but specs know its messages, so /bin/sh
	// is not.
	bash := layer(borrow(map[string][]byte{}, "bash"), map[string]string{"/usr/bin/sh": "/bin/bash"})
	certificate, key, err := cert.GenerateSelfSignedCertKey("localhost", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	programs := map[string][]byte{"/agnhost": file(harness.Binary(t, "agnhost")),
		"/localhost.crt": certificate, "/localhost.key": key}
	// busybox's shell would prefer its own nc, which lacks options.
	agnhost := []cluster.Layer{busybox, bash, layer(borrow(programs, tools...),
		map[string]string{"/agnhost-2": "agnhost", "/bin/sh": "bash"})}
	pauses := cluster.ImageConfig{Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}}
	serves := cluster.ImageConfig{Entrypoint: pauses.Entrypoint, Cmd: []string{"test-webserver"}}
	images := map[string]cluster.Image{
		"agnhost":           {Layers: agnhost, Config: pauses},
		"glibc-dns-testing": {Layers: agnhost, Config: pauses},
		"nginx":             {Layers: agnhost, Config: serves},
		"nonroot": {Layers: agnhost,
			Config: cluster.ImageConfig{User: "1234", Entrypoint: pauses.Entrypoint, Cmd: pauses.Cmd}},
		"nonewprivs": {Layers: []cluster.Layer{layer(map[string][]byte{
			"/bin/nnp": file(harness.Binary(t, "nonewprivs"))}, nil, "/bin/nnp")},
			Config: cluster.ImageConfig{Cmd: []string{"nnp"}}},
		"busybox": {Layers: []cluster.Layer{busybox, bash}, Config: cluster.ImageConfig{Cmd: []string{"sh"}}},
		"pause":   {Layers: []cluster.Layer{busybox}, Config: cluster.ImageConfig{Entrypoint: []string{"sleep", "infinity"}}},
		"etcd": {Layers: []cluster.Layer{layer(map[string][]byte{"/usr/local/bin/etcd": file(harness.Binary(t, "etcd"))},
			nil)}},
		"sample-apiserver": {Layers: []cluster.Layer{layer(map[string][]byte{
			"/sample-apiserver": file(harness.Binary(t, "sample-apiserver"))}, nil)},
			Config: cluster.ImageConfig{Entrypoint: []string{"/sample-apiserver"}}},
	}
	for _, name := range []string{"kitten", "nautilus"} {
		data := layer(map[string][]byte{"/data.json": []byte(`{"image": "` + name + `.jpg"}`)}, nil)
		images[name] = cluster.Image{Layers: append(slices.Clone(agnhost), data), Config: serves}
	}
	for _, reference := range strings.Fields(string(names)) {
		name, _, _ := strings.Cut(path.Base(reference), ":")
		if image, ok := images[name]; ok {
			image.References = append(image.References, reference)
			images[name] = image
		}
	}
	err = cluster.WriteImages(archive, slices.Collect(maps.Values(images))...)
	for _, m := range machines {
		if err == nil {
			err = m.ImportImage(t.Context(), archive)
		}
	}
	if err == nil {
		err = os.Remove(archive)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// results are what ginkgo reports of the specs that it was to run.
type results struct {
	selected int
	specs    []spec // that it began to run
}

type spec struct {
	ContainerHierarchyTexts []string
	LeafNodeType            string
	LeafNodeText            string
	State                   string
	RunTime                 time.Duration
	Failure                 struct{ Message string }
}

func (s spec) name() string {
	return strings.TrimSuffix(strings.Join(append(s.ContainerHierarchyTexts, s.LeafNodeText), " "), " [Conformance]")
}

// group returns the Special Interest Group that owns the spec.
func (s spec) group() string {
	group, _, _ := strings.Cut(strings.TrimPrefix(s.name(), "["), "]")
	return group
}

// cause returns the beginning of the message, in one line.
func (s spec) cause() string {
	words := []rune(strings.ReplaceAll(strings.Join(strings.Fields(s.Failure.Message), " "), "|", `\|`))
	return string(words[:min(len(words), 300)])
}

func readResults(file string) (*results, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var suites []struct {
		PreRunStats struct{ SpecsThatWillRun int }
		SpecReports []spec
	}
	if err := json.Unmarshal(data, &suites); err != nil {
		return nil, err
	}
	r := &results{}
	for _, suite := range suites {
		r.selected += suite.PreRunStats.SpecsThatWillRun
		for _, s := range suite.SpecReports {
			filteredOut := s.State == "pending" || s.State == "skipped" && s.Failure.Message == ""
			if node := s.LeafNodeType != "It" && s.State == "passed"; !filteredOut && !node {
				r.specs = append(r.specs, s)
			}
		}
	}
	slices.SortFunc(r.specs, func(a, b spec) int { return strings.Compare(a.name(), b.name()) })
	return r, nil
}

func (r *results) count(state, group string) (n int) {
	for _, s := range r.specs {
		if s.State == state && (group == "" || s.group() == group) {
			n++
		}
	}
	return n
}

// String returns the results as Markdown.
func (r *results) String() string {
	var b strings.Builder
	total := map[string]int{"": len(r.specs)}
	for _, s := range r.specs {
		total[s.group()]++
	}
	b.WriteString("| group | passed | failed | skipped |\n|---|---:|---:|---:|\n")
	for _, group := range slices.Sorted(maps.Keys(total)) {
		passed, skipped := r.count("passed", group), r.count("skipped", group)
		fmt.Fprintf(&b, "| %s | %d | %d | %d |\n", cmp.Or(group, "all"), passed, total[group]-passed-skipped, skipped)
	}
	if left := r.selected - len(r.specs); left > 0 {
		fmt.Fprintf(&b, "\n%d more were not begun in time.\n", left)
	}
	b.WriteString("\n| spec | result | seconds | cause |\n|---|---|---:|---|\n")
	for _, s := range r.specs {
		if s.State != "passed" {
			fmt.Fprintf(&b, "| %s | %s | %.0f | %s |\n", s.name(), s.State, s.RunTime.Seconds(), s.cause())
		}
	}
	b.WriteString("\nPassed, with the seconds that each took:\n\n")
	for _, s := range r.specs {
		if s.State == "passed" {
			fmt.Fprintf(&b, "- %s: %.1f\n", s.name(), s.RunTime.Seconds())
		}
	}
	return b.String()
}
