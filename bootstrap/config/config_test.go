package config

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
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

// TestMistakes: each mistake gives its own line, which names key and variable and what to do.
func TestMistakes(t *testing.T) {
	empty := file(t, "\n")
	for _, test := range []struct {
		name, file string
		env        map[string]string
		want       []string
	}{
		{"nothing at all", "", map[string]string{"PIPEOPS_AGENT_ID": "", "PIPEOPS_AGENT_TOKEN": ""}, []string{
			"agent.id (PIPEOPS_AGENT_ID): required: the id that the control plane gave this agent",
			"agent.token (PIPEOPS_AGENT_TOKEN): required: the token that the control plane gave this agent, here or in the file that agent.token_file (PIPEOPS_AGENT_TOKEN_FILE) names",
		}},
		{"unknown keys", "agent: {idd: x}\nfrp: {tls: {ca: x}}\nextra: 1\n", nil, []string{
			"agent.idd: unknown key: remove it or correct its name",
			"extra: unknown key: remove it or correct its name",
			"frp.tls.ca: unknown key: remove it or correct its name",
		}},
		{"duplicate key", "agent: {name: x, name: y}\n", nil, []string{`{file}: line 1: key "name" already set`}},
		{"not YAML", "agent: {", nil, []string{"{file}: is not YAML, at or before line 1"}},
		{"a secret that YAML trips over", "agent: {token: *hunter2}", nil, []string{"{file}: is not YAML: check its quotes, anchors and tags"}},
		{"not a mapping", "- a\n", nil, []string{"{file}: is not a mapping of keys to values"}},
		{"a section that is a value", "agent: x\n", nil, []string{"agent: is a section: give it keys"}},
		{"second document", "agent: {name: a}\n---\nagent: {name: b}\n", nil, []string{"{file}: holds a second document after ---: give one"}},
		{"texts of addresses", "", map[string]string{"PIPEOPS_FRP_SERVER_ADDR": "127.0.0.1:7000", "PIPEOPS_API_URL": "https://a:70000", "PIPEOPS_FRP_ADMIN_PORT": "9090"}, []string{
			`agent.api_url (PIPEOPS_API_URL): "70000" is not a port: give a number from 1 to 65535 (from the environment)`,
			`frp.server_addr (PIPEOPS_FRP_SERVER_ADDR): "127.0.0.1:7000" is not a host: give a name or an IP alone, the port has a setting of its own (from the environment)`,
			"frp.admin_port (PIPEOPS_FRP_ADMIN_PORT): is a port of the proxy too: choose another",
		}},
		{"wrong shapes", "agent: {id: {a: b}, name: [x]}\nfrp: {tunnel: {custom_domains: [1]}}\n", nil, []string{
			"agent.id (PIPEOPS_AGENT_ID): is a mapping: give one value",
			"agent.name (PIPEOPS_AGENT_NAME): is a list: give one value",
			"frp.tunnel.custom_domains (PIPEOPS_FRP_TUNNEL_CUSTOM_DOMAINS): item 1 of the list is not a text: put it in quotes",
		}},
		{"wrong types", "agent: {debug: maybe}\nfrp: {server_port: 70000}\nproxy: {drain_timeout: \"25\"}\n", nil, []string{
			`agent.debug (PIPEOPS_DEBUG): "maybe" is neither true nor false (from the file)`,
			`frp.server_port (PIPEOPS_FRP_SERVER_PORT): "70000" is not a port: give a number from 1 to 65535 (from the file)`,
			`proxy.drain_timeout (PIPEOPS_DRAIN_TIMEOUT): "25" is not a duration: give one such as 25s or 2m (from the file)`,
		}},
		{"texts that YAML takes for something else", "agent: {id: 007, name: no}\n", map[string]string{"PIPEOPS_AGENT_ID": ""}, []string{
			"agent.id (PIPEOPS_AGENT_ID): YAML takes it for a number: put it in quotes",
			"agent.name (PIPEOPS_AGENT_NAME): YAML takes it for a boolean: put it in quotes",
		}},
		{"unknown names", "", map[string]string{"PIPEOPS_LOG_LEVEL": "loud", "PIPEOPS_FRP_PROTOCOL": "udp", "PIPEOPS_AGENT_ID": "Not A Label", "PIPEOPS_LISTEN_ADDR": "8080"}, []string{
			`agent.id (PIPEOPS_AGENT_ID): "Not A Label" is not a DNS label: give at most 63 lower-case letters, digits and hyphens, a letter or digit at both ends (from the environment)`,
			`frp.protocol (PIPEOPS_FRP_PROTOCOL): "udp" is unknown: choose one of tcp, kcp, quic, websocket, wss (from the environment)`,
			`proxy.listen_addr (PIPEOPS_LISTEN_ADDR): "8080" is not an address to listen on: give host:port or :port (from the environment)`,
			`logging.level (PIPEOPS_LOG_LEVEL): "loud" is unknown: choose one of debug, info, warn, error (from the environment)`,
		}},
		{"token in the clear", "", map[string]string{"PIPEOPS_API_URL": "http://control.example"}, []string{
			"agent.api_url (PIPEOPS_API_URL): would send the agent's token in the clear: give https:// (http:// is for this host only) (from the environment)",
		}},
		{"token with a line break", "", map[string]string{"PIPEOPS_AGENT_TOKEN": "hunter2\n"}, []string{
			"agent.token (PIPEOPS_AGENT_TOKEN): holds a space, a line break or a character outside ASCII: copy the token again (from the environment)",
		}},
		{"password in a bad URL", "", map[string]string{"PIPEOPS_FRP_PROXY_URL": "hunter2@proxy"}, []string{
			"frp.proxy_url (PIPEOPS_FRP_PROXY_URL): is not a proxy's URL: give http://, socks5:// or ntlm:// with a host and port (from the environment)",
		}},
		{"contradictions", "kubernetes: {in_cluster: true, kubeconfig: x}\nfrp: {tunnel: {type: tcp, subdomain: s}, tls: {cert_file: c}}\n",
			map[string]string{"PIPEOPS_AGENT_TOKEN_FILE": empty, "PIPEOPS_METRICS_ADDR": "127.0.0.1:8080"}, []string{
				"agent.token (PIPEOPS_AGENT_TOKEN): contradicts agent.token_file: remove one of them",
				"frp.tls.cert_file (PIPEOPS_FRP_TLS_CERT_FILE): goes with frp.tls.key_file: set both or neither",
				"frp.tunnel.type (PIPEOPS_FRP_TUNNEL_TYPE): tcp has no domains: remove frp.tunnel.subdomain and frp.tunnel.custom_domains or change the type",
				"kubernetes.in_cluster: true contradicts kubernetes.kubeconfig (KUBECONFIG): remove one of them",
				"proxy.metrics_addr (PIPEOPS_METRICS_ADDR): is the same as proxy.listen_addr: choose another port",
			}},
		{"empty token file", "", map[string]string{"PIPEOPS_AGENT_TOKEN": "", "PIPEOPS_AGENT_TOKEN_FILE": empty}, []string{
			"agent.token_file (PIPEOPS_AGENT_TOKEN_FILE): " + empty + " is empty: write the secret into it",
		}},
		{"missing token file", "", map[string]string{"PIPEOPS_FRP_TOKEN_FILE": "/nonexistent"}, []string{
			"frp.token_file (PIPEOPS_FRP_TOKEN_FILE): open /nonexistent: no such file or directory: create the file or correct its path",
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			env := map[string]string{}
			for _, values := range []map[string]string{required, test.env} {
				for k, v := range values {
					env[k] = v
				}
			}
			path := file(t, test.file)
			_, err := Load(path, environment(env))
			var mistakes *Error
			if !errors.As(err, &mistakes) {
				t.Fatalf("got error %v", err)
			}
			for i, want := range test.want {
				test.want[i] = strings.ReplaceAll(want, "{file}", path)
			}
			if !reflect.DeepEqual(mistakes.Mistakes, test.want) {
				t.Errorf("got\n  %s\nwant\n  %s", strings.Join(mistakes.Mistakes, "\n  "), strings.Join(test.want, "\n  "))
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
