package config

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func environment(values map[string]string) func(string) string {
	return func(name string) string { return values[name] }
}

func file(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

var required = map[string]string{"PIPEOPS_AGENT_ID": "a1", "PIPEOPS_AGENT_TOKEN": "hunter2"}

func TestDefaults(t *testing.T) {
	c, err := Load("", environment(required))
	if err != nil {
		t.Fatal(err)
	}
	var want Config
	want.Agent.ID, want.Agent.Name, want.Agent.ClusterName = "a1", "a1", "a1"
	want.Agent.Instance, _ = os.Hostname()
	want.Agent.Token, want.Agent.APIURL = "hunter2", "https://api.pipeops.io"
	want.FRP.ServerAddr, want.FRP.ServerPort, want.FRP.AdminPort, want.FRP.Protocol = "frp.pipeops.io", 7000, 7400, "tcp"
	want.FRP.Tunnel.Type, want.FRP.Tunnel.Subdomain = "http", "a1"
	want.FRP.Tunnel.LocalIP, want.FRP.Tunnel.LocalPort = "127.0.0.1", 8080
	want.Proxy.ListenAddr, want.Proxy.MetricsAddr, want.Proxy.DrainTimeout = "127.0.0.1:8080", ":9090", 25*time.Second
	want.Kubernetes.Namespace, want.Runners.AllowedHosts = "pipeops-system", []string{"*.svc", "*.svc.cluster.local"}
	want.RunDir, want.Logging.Level, want.Logging.Format = "/var/run/pipeops", "info", "json"
	if !reflect.DeepEqual(*c, want) {
		t.Errorf("got  %+v\nwant %+v", *c, want)
	}
}

func TestSeedFile(t *testing.T) {
	c, err := Load("testdata/seed.yaml", environment(nil))
	if err != nil {
		t.Fatal(err)
	}
	if c.Agent.ID != "agent-001" || c.Agent.Name != "production-k8s-cluster" || c.Agent.ClusterName != "prod-cluster" ||
		c.Agent.Token.Reveal() != "your-agent-token" || c.FRP.Token.Reveal() != "your-frp-token" || !c.Kubernetes.InCluster {
		t.Errorf("got %+v", c)
	}
}

func TestEnvironmentOverFileOverDefault(t *testing.T) {
	path := file(t, "agent: {id: from-file, name: 'no', token: t}\nfrp: {server_port: 7001, tunnel: {custom_domains: [a.example, b.example]}}\nlogging: {level: warn}\n")
	c, err := Load(path, environment(map[string]string{"PIPEOPS_AGENT_ID": "from-env", "PIPEOPS_DEBUG": "true", "PIPEOPS_AGENT_NAME": ""}))
	if err != nil {
		t.Fatal(err)
	}
	if c.Agent.ID != "from-env" || c.Agent.Name != "no" || c.FRP.ServerPort != 7001 || c.FRP.AdminPort != 7400 || c.Logging.Level != "debug" ||
		!reflect.DeepEqual(c.FRP.Tunnel.CustomDomains, []string{"a.example", "b.example"}) || c.FRP.Tunnel.Subdomain != "" {
		t.Errorf("got %+v", c)
	}
}

func TestSecretFiles(t *testing.T) {
	c, err := Load("", environment(map[string]string{
		"PIPEOPS_AGENT_ID":           "a",
		"PIPEOPS_AGENT_TOKEN_FILE":   file(t, "hunter2\n"), // the line break at its end is not part of it
		"PIPEOPS_FRP_TOKEN_FILE":     file(t, "hunter3\n"),
		"PIPEOPS_FRP_PROXY_URL_FILE": file(t, "http://u:hunter2@proxy:3128\n"),
	}))
	if err != nil {
		t.Fatal(err)
	}
	if c.Agent.Token != "hunter2" || c.FRP.Token != "hunter3" || c.FRP.ProxyURL != "http://u:hunter2@proxy:3128" {
		t.Errorf("got %q, %q and %q", c.Agent.Token.Reveal(), c.FRP.Token.Reveal(), c.FRP.ProxyURL.Reveal())
	}
}

func TestHTTPSTunnelIsNamedAsHTTP(t *testing.T) {
	c, err := Load("", environment(map[string]string{"PIPEOPS_AGENT_ID": "a", "PIPEOPS_AGENT_TOKEN": "t", "PIPEOPS_FRP_TUNNEL_TYPE": "https"}))
	if err != nil {
		t.Fatal(err)
	}
	if tunnel := c.FRP.Tunnel; tunnel.Type != "https" || tunnel.Subdomain != "a" {
		t.Errorf("got %+v", tunnel)
	}
}

// TestMistakes: each file of the folder, with the environment in its comments, gives exactly the errors in its
// comments. {file} stands for its path.
func TestMistakes(t *testing.T) {
	const folder = "testdata/mistakes"
	entries, err := os.ReadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		t.Run(entry.Name(), func(t *testing.T) {
			path := filepath.Join(folder, entry.Name())
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			env, want := map[string]string{}, []string{}
			for line := range strings.Lines(string(content)) {
				line = strings.TrimSpace(line)
				if assignment, ok := strings.CutPrefix(line, "# env: "); ok {
					name, value, _ := strings.Cut(assignment, "=")
					env[name] = value
				}
				if message, ok := strings.CutPrefix(line, "# error: "); ok {
					want = append(want, strings.ReplaceAll(message, "{file}", path))
				}
			}
			_, err = Load(path, environment(env))
			var mistakes *Error
			if !errors.As(err, &mistakes) {
				t.Fatalf("got error %v", err)
			}
			if !slices.Equal(mistakes.Mistakes, want) {
				t.Errorf("got\n  %s\nwant\n  %s", strings.Join(mistakes.Mistakes, "\n  "), strings.Join(want, "\n  "))
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Error("the error holds a secret")
			}
		})
	}
}

func TestMissingFile(t *testing.T) {
	_, err := Load("/nonexistent.yaml", environment(required))
	if err == nil || !strings.Contains(err.Error(), "open /nonexistent.yaml: no such file or directory: correct --config or create the file") {
		t.Errorf("got %v", err)
	}
}

func TestPrintedConfigHoldsNoSecret(t *testing.T) {
	c, err := Load("", environment(map[string]string{
		"PIPEOPS_AGENT_ID": "a", "PIPEOPS_AGENT_TOKEN": "hunter2", "PIPEOPS_FRP_TOKEN": "hunter2", "PIPEOPS_FRP_PROXY_URL": "http://u:hunter2@proxy:3128",
	}))
	if err != nil {
		t.Fatal(err)
	}
	if out := fmt.Sprintf("%v %+v %#v", *c, *c, *c); strings.Contains(out, "hunter2") {
		t.Errorf("printed %s", out)
	}
}

// TestSettingsAreDistinct: a row that is copied and not changed would shadow another.
func TestSettingsAreDistinct(t *testing.T) {
	seen := map[string]bool{"": true}
	for _, s := range settings {
		if seen[s.key] || s.env != "" && seen[s.env] || s.doc == "" {
			t.Errorf("%s (%s): a second time, or without a description", s.key, s.env)
		}
		seen[s.key], seen[s.env] = true, true
	}
}

var update = flag.Bool("update", false, "write the table of settings to the README")

// TestDocumentation: the README shows the table of settings, and no other.
func TestDocumentation(t *testing.T) {
	const path, begin, end = "../README.md", "-update` -->\n", "<!-- end of settings -->"
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, found := strings.Cut(string(data), begin)
	_, tail, foundEnd := strings.Cut(rest, end)
	if !found || !foundEnd {
		t.Fatalf("%s lacks the marks around the table", path)
	}
	table := "| key | variable | default | meaning |\n| --- | --- | --- | --- |\n"
	code := func(s string) string {
		if s == "" {
			return ""
		}
		return "`" + s + "`"
	}
	for _, s := range settings {
		table += fmt.Sprintf("| %s | %s | %s | %s |\n", code(s.key), code(s.env), code(s.def), s.doc)
	}
	want := head + begin + table + end + tail
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
	} else if want != string(data) {
		t.Errorf("the table in %s is not that of settings.go: run with -update", path)
	}
}
