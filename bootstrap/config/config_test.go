package config

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func file(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

var required = map[string]string{"PIPEOPS_AGENT_ID": "a1", "PIPEOPS_AGENT_TOKEN": "hunter2"}

func TestDefaultsAreComplete(t *testing.T) {
	c, err := Load("", required)
	if err != nil {
		t.Fatal(err)
	}
	var want Config
	want.Agent.ID, want.Agent.Name, want.Agent.ClusterName = "a1", "a1", "a1"
	want.Agent.Instance, _ = os.Hostname()
	want.Agent.Token, want.Agent.TokenOverlap, want.Agent.APIURL = "hunter2", 5*time.Minute, "https://api.pipeops.io"
	want.FRP.ServerAddr, want.FRP.ServerPort, want.FRP.AdminPort, want.FRP.Protocol = "frp.pipeops.io", 7000, 7400, "tcp"
	want.FRP.Tunnel.Type, want.FRP.Tunnel.Subdomain = "https", "a1"
	want.FRP.Tunnel.LocalIP, want.FRP.Tunnel.LocalPort = "127.0.0.1", 8080
	want.Proxy.ListenAddr, want.Proxy.MetricsAddr, want.Proxy.DrainTimeout = "127.0.0.1:8080", ":9090", 25*time.Second
	want.Kubernetes.Namespace, want.Runners.AllowedHosts = "pipeops-system", []string{"*.svc", "*.svc.cluster.local"}
	want.Access = Access{Identity: "agent", Prefix: "pipeops:", OwnNamespace: "closed"}
	want.RunDir, want.Logging.Level, want.Logging.Format = "/var/run/pipeops", "info", "json"
	if !reflect.DeepEqual(*c, want) {
		t.Errorf("got  %+v\nwant %+v", *c, want)
	}
}

func TestSeedFile(t *testing.T) {
	c, err := Load("testdata/seed.yaml", nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.Agent.ID != "agent-001" || c.Agent.Name != "production-k8s-cluster" || c.Agent.ClusterName != "prod-cluster" ||
		c.Agent.Token.Reveal() != "your-agent-token" || c.FRP.Token.Reveal() != "your-frp-token" || !c.Kubernetes.InCluster {
		t.Errorf("got %+v", c)
	}
}

// TestSeedEnvironment: the variables that the project started with.
func TestSeedEnvironment(t *testing.T) {
	c, err := Load("", map[string]string{
		"PIPEOPS_AGENT_ID": "agent-001", "PIPEOPS_AGENT_NAME": "production-k8s-cluster",
		"PIPEOPS_AGENT_TOKEN": "your-agent-token", "PIPEOPS_API_URL": "https://control.example",
		"PIPEOPS_FRP_SERVER_ADDR": "frp.example", "PIPEOPS_FRP_SERVER_PORT": "7001",
		"PIPEOPS_FRP_TOKEN": "your-frp-token", "KUBECONFIG": "/path/to/kubeconfig",
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.Agent.ID != "agent-001" || c.Agent.Name != "production-k8s-cluster" || c.Agent.Token != "your-agent-token" ||
		c.Agent.APIURL != "https://control.example" || c.FRP.ServerAddr != "frp.example" || c.FRP.ServerPort != 7001 ||
		c.FRP.Token != "your-frp-token" || c.Kubernetes.Kubeconfig != "/path/to/kubeconfig" {
		t.Errorf("got %+v", c)
	}
}

func TestEnvironmentOverFileOverDefault(t *testing.T) {
	path := file(t, "agent: {id: from-file, name: 'no', token: t}\n"+
		"frp: {server_port: 7001, tunnel: {custom_domains: [a.example, b.example]}}\nlogging: {level: warn}\n")
	c, err := Load(path, map[string]string{
		"PIPEOPS_AGENT_ID": "from-env", "PIPEOPS_DEBUG": "true", "PIPEOPS_AGENT_NAME": "",
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.Agent.ID != "from-env" || c.Agent.Name != "no" ||
		c.FRP.ServerPort != 7001 || c.FRP.AdminPort != 7400 || c.Logging.Level != "debug" ||
		!reflect.DeepEqual(c.FRP.Tunnel.CustomDomains, []string{"a.example", "b.example"}) || c.FRP.Tunnel.Subdomain != "" {
		t.Errorf("got %+v", c)
	}
}

func TestSecretsAreReadFromFiles(t *testing.T) {
	c, err := Load("", map[string]string{
		"PIPEOPS_AGENT_ID":           "a",
		"PIPEOPS_AGENT_TOKEN_FILE":   file(t, "hunter2\n"), // the line break at its end is not part of it
		"PIPEOPS_FRP_TOKEN_FILE":     file(t, "hunter3\n"),
		"PIPEOPS_FRP_PROXY_URL_FILE": file(t, "http://u:hunter2@proxy:3128\n"),
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.Agent.Token != "hunter2" || c.FRP.Token != "hunter3" || c.FRP.ProxyURL != "http://u:hunter2@proxy:3128" {
		t.Errorf("got %q, %q and %q", c.Agent.Token.Reveal(), c.FRP.Token.Reveal(), c.FRP.ProxyURL.Reveal())
	}
}

func TestTokenOverlapMayBeZero(t *testing.T) {
	for value, want := range map[string]time.Duration{"0": 0, "0s": 0, "90s": 90 * time.Second} {
		c, err := Load("", map[string]string{
			"PIPEOPS_AGENT_ID": "a", "PIPEOPS_AGENT_TOKEN": "t", "PIPEOPS_AGENT_TOKEN_OVERLAP": value,
		})
		if err != nil || c.Agent.TokenOverlap != want {
			t.Errorf("%s: %+v, %v", value, c, err)
		}
	}
}

// TestRemovedSecretDiffersFromUnreadableSecret: a secret that somebody has removed is told from one that cannot be
// read.
func TestRemovedSecretDiffersFromUnreadableSecret(t *testing.T) {
	path := file(t, "hunter2")
	c, err := Load("", map[string]string{"PIPEOPS_AGENT_ID": "a", "PIPEOPS_AGENT_TOKEN_FILE": path})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name     string
		change   func() error
		noSecret bool
	}{
		{"empty", func() error { return os.WriteFile(path, nil, 0o600) }, true},
		{"blank", func() error { return os.WriteFile(path, []byte(" \n"), 0o600) }, true},
		{"no token", func() error { return os.WriteFile(path, []byte("a b"), 0o600) }, false},
		{"removed", func() error { return os.Remove(path) }, true},
		{"a directory", func() error { return os.Mkdir(path, 0o700) }, false},
	} {
		if err := test.change(); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Agent.CurrentToken(); err == nil || errors.Is(err, ErrNoSecret) != test.noSecret {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

// TestRelativePathsOfExistingFilesAreAccepted: those of files that there are need no ./ before them. Of the
// kubeconfigs of a list, some may be missing.
func TestRelativePathsOfExistingFilesAreAccepted(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.WriteFile("a file", []byte("hunter2"), 0o600); err != nil {
		t.Fatal(err)
	}
	kubeconfigs := "a file:/missing:~/.kube/config:"
	c, err := Load("", map[string]string{
		"PIPEOPS_AGENT_ID": "a", "PIPEOPS_AGENT_TOKEN_FILE": "a file", "KUBECONFIG": kubeconfigs,
		"PIPEOPS_API_CA_FILE": "/" + strings.Repeat("x", 4095),
	})
	if err != nil || c.Agent.Token != "hunter2" || c.Agent.TokenFile != "a file" ||
		c.Kubernetes.Kubeconfig != kubeconfigs {
		t.Errorf("got %+v, %v", c, err)
	}
	for _, value := range []string{"missing:/missing", "/missing:apiVersion: v1", "/" + strings.Repeat("hunter2", 1000)} {
		_, err := Load("", map[string]string{
			"PIPEOPS_AGENT_ID": "a", "PIPEOPS_AGENT_TOKEN_FILE": "a file", "KUBECONFIG": value,
		})
		if err == nil || strings.Contains(err.Error(), value) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%.20s…: %v", value, err)
		}
	}
}

func TestHTTPSTunnelHasTheSubdomainOfTheAgent(t *testing.T) {
	c, err := Load("", map[string]string{
		"PIPEOPS_AGENT_ID": "a", "PIPEOPS_AGENT_TOKEN": "t", "PIPEOPS_FRP_TUNNEL_TYPE": "https",
	})
	if err != nil {
		t.Fatal(err)
	}
	if tunnel := c.FRP.Tunnel; tunnel.Type != "https" || tunnel.Subdomain != "a" || !c.FRP.TypeConfigured {
		t.Errorf("got %+v", tunnel)
	}
}

// TestEveryMistakeIsReported: each file of the folder, with the environment in its comments, gives exactly the errors
// in its comments. {file} stands for its path.
func TestEveryMistakeIsReported(t *testing.T) {
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
			_, err = Load(path, env)
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
			var out strings.Builder
			if got := Describe(&out, path, env); !reflect.DeepEqual(got, err) || out.Len() > 0 {
				t.Errorf("Describe gives the error %v, and writes %q", got, out.String())
			}
		})
	}
}

func TestListWithoutACheckTakesAnyItem(t *testing.T) {
	var c Config
	list := setting{field: func(c *Config) any { return &c.Runners.AllowedHosts }}
	if err := list.set(&c, "a, b"); err != nil || !slices.Equal(c.Runners.AllowedHosts, []string{"a", "b"}) {
		t.Errorf("got %q, %v", c.Runners.AllowedHosts, err)
	}
}

func TestMissingConfigurationFileIsReported(t *testing.T) {
	_, err := Load("/nonexistent.yaml", required)
	const want = "open /nonexistent.yaml: no such file or directory: correct --config or create the file"
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v", err)
	}
}

func TestPrintedConfigHoldsNoSecret(t *testing.T) {
	c, err := Load("", map[string]string{
		"PIPEOPS_AGENT_ID": "a", "PIPEOPS_AGENT_TOKEN": "hunter2", "PIPEOPS_FRP_TOKEN": "hunter2",
		"PIPEOPS_FRP_PROXY_URL": "http://u:hunter2@proxy:3128",
	})
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

// TestDescribedConfigurationLoadsAgain: what is printed is a configuration file for the same configuration, but for
// the secrets.
func TestDescribedConfigurationLoadsAgain(t *testing.T) {
	tokenFile, proxyFile := file(t, "hunter2\n"), file(t, "http://u:hunter2@proxy:3128\n")
	putBack := strings.NewReplacer(
		`proxy_url: "[redacted]"`, `proxy_url: "http://u:hunter2@proxy:3128"`,
		`token: "[redacted]"`, `token: "hunter2"`)
	for name, test := range map[string]struct {
		file string
		env  map[string]string
		want []string // lines, with their spaces folded
	}{
		"defaults": {"", required, []string{
			`agent.id: "a1" # environment PIPEOPS_AGENT_ID`,
			`agent.name: "a1" # derived from agent.id`,
			`agent.token: "[redacted]" # environment PIPEOPS_AGENT_TOKEN`,
			`agent.api_url: "https://api.pipeops.io" # default`,
			`frp.server_port: 7000 # default`,
			`frp.token: "" # not set`,
			`frp.tunnel.subdomain: "a1" # derived from agent.id`,
			`frp.tunnel.custom_domains: [] # not set`,
			`frp.tunnel.remote_port: # not set`,
			`runners.allowed_hosts: ["*.svc", "*.svc.cluster.local"] # default`,
		}},
		"file and environment": {`
agent: {id: a1, name: "B\u00fcro \"7\" # \x7f\t[redacted]", instance: pod-1, token: hunter2,
  api_url: "https://control.example/", debug: true}
frp: {server_addr: "", token: hunter2, proxy_url: "http://u:hunter2@proxy:3128", tls: {cert_file: ./c, key_file: /k},
  tunnel: {type: https, custom_domains: [a.example, b.example]}}
proxy: {drain_timeout: 90s}
logging: {level: warn}
`, map[string]string{"PIPEOPS_RUNNERS_ALLOWED_HOSTS": "*.SVC , 10.0.0.1"}, []string{
			`agent.token: "[redacted]" # file {file}`,
			`agent.api_url: "https://control.example" # file {file}`,
			`frp.server_addr: "frp.pipeops.io" # default`,
			`frp.proxy_url: "[redacted]" # file {file}`,
			`frp.tunnel.subdomain: "" # not set`,
			`frp.tunnel.custom_domains: ["a.example", "b.example"] # file {file}`,
			`proxy.drain_timeout: "1m30s" # file {file}`,
			`runners.allowed_hosts: ["*.svc", "10.0.0.1"] # environment PIPEOPS_RUNNERS_ALLOWED_HOSTS`,
			`logging.level: "debug" # derived from agent.debug`,
		}},
		"secrets in files": {"frp: {tunnel: {type: tcp, remote_port: 6000}}\n" +
			"runners: {allowed_hosts: []}\n", map[string]string{
			"PIPEOPS_AGENT_ID": "a1", "PIPEOPS_AGENT_TOKEN_FILE": tokenFile, "PIPEOPS_FRP_TOKEN_FILE": tokenFile,
			"PIPEOPS_FRP_PROXY_URL_FILE": proxyFile,
		}, []string{
			`agent.token: # [redacted], from agent.token_file`,
			`agent.token_file: "` + tokenFile + `" # environment PIPEOPS_AGENT_TOKEN_FILE`,
			`frp.token: # [redacted], from frp.token_file`,
			`frp.proxy_url: # [redacted], from frp.proxy_url_file`,
			`frp.tunnel.remote_port: 6000 # file {file}`,
			`runners.allowed_hosts: [] # file {file}`,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			path := file(t, test.file)
			want, err := Load(path, test.env)
			if err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			if err := Describe(&out, path, test.env); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(out.String(), "hunter2") {
				t.Error("a secret is printed")
			}
			got, err := Load(file(t, putBack.Replace(out.String())), nil)
			if err != nil {
				t.Fatal(err)
			}
			want.FRP.TypeConfigured = true // now it is in the file
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
			var lines []string
			for line := range strings.Lines(out.String()) {
				lines = append(lines, strings.Join(strings.Fields(line), " "))
			}
			for _, line := range test.want {
				if line = strings.ReplaceAll(line, "{file}", path); !slices.Contains(lines, line) {
					t.Errorf("lacks the line %s", line)
				}
			}
			if t.Failed() {
				t.Log(out.String())
			}
		})
	}
}

var update = flag.Bool("update", false, "write the table of settings to the README, and the example")

// TestDocumentation: the README's table and the example show the settings, and no others.
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
	placeholders := map[string]string{"agent.id": "agent-001", "agent.token": "your-agent-token"}
	example := asFile(func(name string, s setting) string {
		doc, c := "# "+s.doc, &Config{}
		if s.env != "" {
			doc += " (" + s.env + ")"
		}
		if placeholder := placeholders[s.key]; placeholder != "" {
			return doc + "\n" + name + ": " + strconv.Quote(placeholder)
		}
		if s.def != "" {
			if err := s.set(c, s.def); err != nil {
				t.Error(err)
			}
		}
		value := s.yaml(c)
		if strings.HasPrefix(value, `"`) { // a duration stays as the table has it
			value = strconv.Quote(s.def)
		}
		return doc + "\n#" + strings.TrimSpace(name+": "+value)
	})
	for path, want := range map[string]string{
		path:        head + begin + table + end + tail,
		examplePath: "# Every setting, and its default behind a #.\n" + example,
	} {
		if *update {
			if err := os.WriteFile(path, []byte(want), 0o600); err != nil {
				t.Fatal(err)
			}
		} else if data, _ := os.ReadFile(path); want != string(data) {
			t.Errorf("%s does not show what settings.go holds: run with -update", path)
		}
	}
}

// asFile returns a configuration file with the entry of each setting, in the sections of its key.
func asFile(entry func(name string, s setting) string) string {
	var file strings.Builder
	last := ""
	for _, s := range settings {
		sections := strings.Split(s.key, ".")
		depth := len(sections) - 1
		for d, section := range sections[:depth] {
			if !strings.HasPrefix(last, strings.Join(sections[:d+1], ".")+".") {
				fmt.Fprintf(&file, "%*s%s:\n", 2*d, "", section)
			}
		}
		for text := range strings.SplitSeq(entry(sections[depth], s), "\n") {
			fmt.Fprintf(&file, "%*s%s\n", 2*depth, "", text)
		}
		last = s.key
	}
	return file.String()
}

const examplePath = "../config.example.yaml"

// TestExampleShowsTheDefaults: the example loads, and what it shows as defaults are the defaults.
func TestExampleShowsTheDefaults(t *testing.T) {
	got, err := Load(examplePath, nil)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(examplePath)
	if err != nil {
		t.Fatal(err)
	}
	whole := regexp.MustCompile(`(?m)^( *)#(\w)`).ReplaceAllString(string(data), "$1$2")
	want, err := Load(file(t, whole), nil)
	if err != nil {
		t.Fatal(err)
	}
	got.FRP.TypeConfigured = true // as without the #
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}
