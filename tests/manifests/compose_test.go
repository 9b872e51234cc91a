package manifests

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/dotenv"
	"github.com/google/go-cmp/cmp"

	"github.com/pipeops/vm-agent/bootstrap/config"
)

// TestComposeRunsTheSameAsThePod loads the file with Compose's own loader, and compares it with the pod.
func TestComposeRunsTheSameAsThePod(t *testing.T) {
	dir := installation(t)
	// Compose sets this variable, but its loader does not.
	dotenv.RegisterFormat("raw", func(r io.Reader, _ string, vars map[string]string, _ func(string) (string, bool)) error {
		data, err := io.ReadAll(r)
		for line := range strings.Lines(string(data)) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			vars[name] = value
		}
		return err
	})
	options, err := cli.NewProjectOptions([]string{filepath.Join(dir, "docker", "compose.yaml")})
	if err != nil {
		t.Fatal(err)
	}
	project, err := options.LoadProject(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	type part struct {
		Image  string
		Memory int64
		Args   []string
	}
	got, want := map[string]part{}, map[string]part{}
	for name, s := range project.Services {
		args := append([]string(s.Entrypoint), s.Command...)
		if name == "bootstrap" {
			args = []string{"/bootstrap"} // the image's default
		}
		got[name] = part{s.Image, int64(s.MemLimit), args}
		if !s.ReadOnly || s.User != "65532:65532" || len(s.CapDrop) != 1 || s.CapDrop[0] != "ALL" || s.Restart != "always" {
			t.Errorf("%s may do too much, or stays away when it ends", name)
		}
	}
	pod := deployments(t, build(t, filepath.Join(dir, "base")))[0].Spec.Template.Spec
	grace := time.Duration(*pod.TerminationGracePeriodSeconds) * time.Second
	if stop := project.Services["proxy"].StopGracePeriod; stop == nil || time.Duration(*stop) != grace {
		t.Errorf("Compose gives the proxy %v to stop, the pod %s", stop, grace)
	}
	defaults, err := config.Load("", map[string]string{"PIPEOPS_AGENT_ID": "agent-001", "PIPEOPS_AGENT_TOKEN": "a-token"})
	if err != nil || defaults.Proxy.DrainTimeout+5*time.Second > grace {
		t.Errorf("the drain takes %s of %s, %v", defaults.Proxy.DrainTimeout, grace, err)
	}
	for _, c := range containers(pod) {
		want[c.Name] = part{c.Image, c.Resources.Limits.Memory().Value(), append(c.Command, c.Args...)}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the pod and Compose differ (-pod +compose)\n%s", diff)
	}
	if id := project.Services["proxy"].Environment["PIPEOPS_AGENT_ID"]; id == nil || *id != "agent-001" {
		t.Error("agent.env does not reach the proxy")
	}
	if err := os.Remove(filepath.Join(dir, "docker", "agent.env")); err != nil {
		t.Fatal(err)
	}
	if _, err := options.LoadProject(t.Context()); err == nil ||
		!regexp.MustCompile(`env file .*/docker/agent\.env not found`).MatchString(err.Error()) {
		t.Errorf("without agent.env: %v", err)
	}
	readme := string(read(t, filepath.Join(source, "README.md"))) + string(read(t, filepath.Join(source, "OPERATIONS.md")))
	for _, image := range regexp.MustCompile(`docker\.io/[^/]+/[^:]+:\S+`).FindAllString(readme, -1) {
		if frpc, _, _ := strings.Cut(got["frpc"].Image, "@"); image != got["proxy"].Image && image != frpc {
			t.Errorf("the pages name %s", image)
		}
	}
	for name, service := range project.Services {
		want := fmt.Sprintf("--memory %dm", service.MemLimit>>20)
		if limit := service.Environment["GOMEMLIMIT"]; limit != nil {
			want += " -e GOMEMLIMIT=" + *limit
		}
		if !regexp.MustCompile(`\$run --name pipeops-` + name + `( \S+ \S+)* ` + want + `( |$)`).MatchString(readme) {
			t.Errorf("the README does not run %s with %s, as Compose does", name, want)
		}
	}
}

// TestFrpImageHasTheTestedVersion compares the version of the frpc image with the version that the tests run.
func TestFrpImageHasTheTestedVersion(t *testing.T) {
	data, err := os.ReadFile("../tools/frp/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	version := regexp.MustCompile(`github.com/fatedier/frp (v\S+)`).FindStringSubmatch(string(data))
	if version == nil {
		t.Fatal("tools/frp/go.mod names no version")
	}
	image := regexp.MustCompile(`docker.io/fatedier/frpc:` + regexp.QuoteMeta(version[1]) + `(@|\n)`)
	if !image.MatchString(build(t, filepath.Join(source, "base"))) {
		t.Errorf("the frpc image is not of version %s", version[1])
	}
}
