// Package frp pins the stock frp for the tests, and proves that frp reads what package frpc writes.
package frp

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/fatedier/frp/pkg/config"
	v1 "github.com/fatedier/frp/pkg/config/v1"
	"github.com/google/go-cmp/cmp"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/secret"
)

// everyField compares unexported fields too: frp's types have some.
var everyField = cmp.Exporter(func(reflect.Type) bool { return true })

// hostile are values that have another meaning somewhere on the way: in TOML, in the text/template that frp
// runs first, or in the detection of frp's old INI format.
var hostile = map[string]string{
	"quotes":     `"'"""'''`,
	"backslash":  `C:\new\table\`,
	"newlines":   "a\nb\r\nc\r",
	"control":    "\x00\x01\x08\t\x0b\x1f\x7f\u0080\u2028",
	"template":   `{{ .Envs.HOME }}{{"x"}}{{`,
	"ini":        "[common]",
	"ini line":   "x\n[common]\nserver_addr = 1.2.3.4\n",
	"toml":       "\"\nserverAddr = \"evil\"\n[[proxies]]\n",
	"comment":    "a # b ; c",
	"emoji":      "🦊 naïve 中文",
	"64 KiB":     strings.Repeat("x", 64<<10),
	"assignment": "a = b",
	"blanks":     "  a  ",
	"env":        "$HOME ${HOME} %(x)s",
}

// with returns a configuration that has value in every text.
func with(value string) frpc.Config {
	return frpc.Config{
		ServerAddr: value, ServerPort: 7000, User: value, ClientID: value, Protocol: "tcp", AuthMethod: "token",
		ProxyURL: secret.Secret(value), Token: secret.Secret(value), LogLevel: value,
		TLS:       frpc.TLS{CAFile: value, ServerName: value, CertFile: value, KeyFile: value},
		Metadatas: map[string]secret.Secret{"key": secret.Secret(value), value: "value"},
		Admin:     frpc.Admin{Port: 7400, User: value, Password: secret.Secret(value)},
		Tunnel: frpc.Tunnel{
			Name: value, Type: "http", Subdomain: value, CustomDomains: []string{value, "b"},
			Group: value, GroupKey: secret.Secret(value), LocalIP: value, LocalPort: 8080, HealthPath: value,
		},
	}
}

// readBack returns what frp's own loader reads from c's file.
func readBack(t *testing.T, c frpc.Config) (*v1.ClientConfig, error) {
	t.Helper()
	toml, err := c.TOML()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(t.TempDir(), frpc.ConfigFile)
	if err := os.WriteFile(path, toml, 0o600); err != nil {
		t.Fatal(err)
	}
	if config.DetectLegacyINIFormatFromFile(path) {
		t.Errorf("frp takes the file for its old INI format:\n%.2000s", toml)
	}
	got := &v1.ClientConfig{}
	if err := config.LoadConfigureFromFile(path, got, true); err != nil {
		t.Errorf("frp cannot read the file: %v\n%.2000s", err, toml)
	}
	return got, nil
}

// want returns c in frp's own types.
func want(c frpc.Config) *v1.ClientConfig {
	no := false
	metadatas := map[string]string{}
	for k, v := range c.Metadatas {
		metadatas[k] = v.Reveal()
	}
	w := &v1.ClientConfig{ClientCommonConfig: v1.ClientCommonConfig{
		ServerAddr: c.ServerAddr, ServerPort: c.ServerPort, User: c.User, ClientID: c.ClientID, LoginFailExit: &no,
		Log:       v1.LogConfig{Level: c.LogLevel, DisablePrintColor: true},
		Auth:      v1.AuthClientConfig{Method: "token", Token: c.Token.Reveal()},
		Metadatas: metadatas,
		WebServer: v1.WebServerConfig{Addr: "127.0.0.1", Port: c.Admin.Port, User: c.Admin.User,
			Password: c.Admin.Password.Reveal()},
	}}
	if c.AuthMethod == "oidc" {
		w.Auth = v1.AuthClientConfig{Method: "oidc", OIDC: v1.AuthOIDCClientConfig{
			TokenSource: &v1.ValueSource{Type: "file", File: &v1.FileSource{Path: c.TokenFile}},
		}}
	}
	w.Auth.AdditionalScopes = []v1.AuthScope{v1.AuthScopeHeartBeats, v1.AuthScopeNewWorkConns}
	w.Transport.HeartbeatInterval, w.Transport.HeartbeatTimeout = 30, 90
	w.Transport.Protocol = c.Protocol
	w.Transport.ProxyURL = c.ProxyURL.Reveal()
	w.Transport.PoolCount, w.Transport.TCPMuxKeepaliveInterval = 5, 10
	w.Transport.TLS.TLSConfig = v1.TLSConfig{
		CertFile: c.TLS.CertFile, KeyFile: c.TLS.KeyFile, TrustedCaFile: c.TLS.CAFile, ServerName: c.TLS.ServerName,
	}
	base := v1.ProxyBaseConfig{
		Name: c.Tunnel.Name, Type: c.Tunnel.Type,
		LoadBalancer: v1.LoadBalancerConfig{Group: c.Tunnel.Group, GroupKey: c.Tunnel.GroupKey.Reveal()},
		ProxyBackend: v1.ProxyBackend{LocalIP: c.Tunnel.LocalIP, LocalPort: c.Tunnel.LocalPort},
	}
	if c.Tunnel.HealthPath != "" {
		base.HealthCheck = v1.HealthCheckConfig{
			Type: "http", Path: c.Tunnel.HealthPath, IntervalSeconds: 1, TimeoutSeconds: 5, MaxFailed: 1,
		}
	}
	if c.Tunnel.Type != "http" {
		base.Transport.ProxyProtocolVersion = "v2"
	}
	var proxy v1.ProxyConfigurer
	switch c.Tunnel.Type {
	case "http":
		proxy = &v1.HTTPProxyConfig{ProxyBaseConfig: base, DomainConfig: v1.DomainConfig{
			SubDomain: c.Tunnel.Subdomain, CustomDomains: c.Tunnel.CustomDomains,
		}}
	case "https":
		proxy = &v1.HTTPSProxyConfig{ProxyBaseConfig: base, DomainConfig: v1.DomainConfig{
			SubDomain: c.Tunnel.Subdomain, CustomDomains: c.Tunnel.CustomDomains,
		}}
	case "tcp":
		proxy = &v1.TCPProxyConfig{ProxyBaseConfig: base, RemotePort: c.Tunnel.RemotePort}
	}
	w.Visitors = []v1.TypedVisitorConfig{}
	w.Proxies = []v1.TypedProxyConfig{{Type: c.Tunnel.Type, ProxyConfigurer: proxy}}
	return w
}

// check compares what frp reads with c.
func check(t *testing.T, c frpc.Config) {
	t.Helper()
	got, err := readBack(t, c)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want(c), got, everyField); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestFrpReadsWhatTheAgentWrites(t *testing.T) {
	for name, value := range hostile {
		t.Run(name, func(t *testing.T) { check(t, with(value)) })
	}
	t.Run("https and oidc", func(t *testing.T) {
		c := with("x")
		c.Tunnel.Type, c.AuthMethod, c.TokenFile = "https", "oidc", "/a file"
		check(t, c)
	})
	t.Run("tcp", func(t *testing.T) {
		c := with("x")
		c.Tunnel = frpc.Tunnel{Name: "n", Type: "tcp", RemotePort: 20001, LocalIP: "127.0.0.1", LocalPort: 1}
		check(t, c)
	})
}

func TestInvalidUTF8IsRefused(t *testing.T) {
	_, err := with("a\xffb").TOML()
	if err == nil || !strings.Contains(err.Error(), `"serverAddr" is not valid UTF-8`) {
		t.Errorf("got error %v", err)
	}
}

func FuzzFrpReadsWhatTheAgentWrites(f *testing.F) {
	for _, value := range hostile {
		f.Add(value)
	}
	f.Fuzz(func(t *testing.T, value string) {
		if value == "" || !utf8.ValidString(value) {
			return // empty: frp's default applies; invalid: refused
		}
		check(t, with(value))
	})
}

// TestStockFrpcAcceptsTheConfiguration runs the validation of the binary that users run.
func TestStockFrpcAcceptsTheConfiguration(t *testing.T) {
	binary := filepath.Join("..", "..", "..", ".build", "bin", "frpc")
	if _, err := os.Stat(binary); err != nil {
		t.Fatalf("%v: make tools builds it", err)
	}
	verify := func(t *testing.T, c frpc.Config) {
		t.Helper()
		c.LogLevel = "info"
		c.TLS = frpc.TLS{ServerName: c.TLS.ServerName}
		c.Tunnel.LocalIP = "127.0.0.1"
		toml, err := c.TOML()
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), frpc.ConfigFile)
		if err := os.WriteFile(path, toml, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(binary, "verify", "-c", path).CombinedOutput(); err != nil {
			t.Errorf("frpc verify: %v\n%s", err, out)
		}
	}
	for name, value := range hostile {
		t.Run(name, func(t *testing.T) {
			c := with(value)
			c.Tunnel.Subdomain, c.Tunnel.CustomDomains = "agent-001", nil
			verify(t, c)
		})
	}
	t.Run("https", func(t *testing.T) {
		c := with("x")
		c.Tunnel.Type, c.Tunnel.Subdomain, c.Tunnel.CustomDomains = "https", "agent-001", nil
		verify(t, c)
	})
	t.Run("tcp", func(t *testing.T) {
		c := with("x")
		c.Tunnel = frpc.Tunnel{Name: "n", Type: "tcp", RemotePort: 20001, LocalPort: 1}
		verify(t, c)
	})
}
