// Package frpc holds all that the agent knows of the stock frp client: its configuration file, its admin API and its
// login. The agent never links frp's code; tests/tools/frp checks everything here against the stock binary.
package frpc

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/pipeops/vm-agent/frpc/secret"
)

// Config is the part of frpc.toml that the agent decides; the rest keeps frp's defaults. lease.json holds it as JSON.
type Config struct {
	ServerAddr string        `json:"server_addr"` // host name or IP of frps
	ServerPort int           `json:"server_port"`
	User       string        `json:"user,omitempty"` // frps puts it before the proxy's name, with a dot
	ClientID   string        `json:"client_id"`      // unique for each instance of the agent
	Protocol   string        `json:"protocol"`       // tcp, kcp, quic, websocket or wss
	ProxyURL   secret.Secret `json:"proxy_url,omitempty"`
	TLS        TLS           `json:"tls"`
	// AuthMethod is token or oidc. With token, frpc reads the credential once, at its start; with oidc it reads
	// TokenFile at every login.
	AuthMethod string        `json:"auth_method"`
	Token      secret.Secret `json:"token,omitempty"`      // frp's auth.token, or the token of OpenID Connect
	TokenFile  string        `json:"token_file,omitempty"` // of method oidc: holds Token
	// Metadatas go with every login; a plugin of frps checks the agent's own credential there.
	Metadatas map[string]secret.Secret `json:"metadatas,omitempty"`
	LogLevel  string                   `json:"log_level,omitempty"` // trace, debug, info, warn or error
	Admin     Admin                    `json:"admin"`
	Tunnel    Tunnel                   `json:"tunnel"`
}

// TLS is how the connection to frps is secured. It is always encrypted.
type TLS struct {
	CAFile             string `json:"ca_file,omitempty"`     // PEM file of the authorities for frps's certificate
	ServerName         string `json:"server_name,omitempty"` // empty: the server's address
	CertFile           string `json:"cert_file,omitempty"`
	KeyFile            string `json:"key_file,omitempty"`
	InsecureSkipVerify bool   `json:"insecure_skip_verify,omitempty"` // accept any certificate
}

// Admin is frpc's own API, on 127.0.0.1.
type Admin struct {
	Port     int           `json:"port"`
	User     string        `json:"user"`
	Password secret.Secret `json:"password"`
}

// Tunnel is the one frp proxy that leads to the agent.
type Tunnel struct {
	Name          string        `json:"name"` // unique on the whole frps
	Type          string        `json:"type"` // http, https or tcp
	Subdomain     string        `json:"subdomain,omitempty"`
	SubdomainHost string        `json:"subdomain_host,omitempty"` // of frps: the whole name is Subdomain.SubdomainHost
	CustomDomains []string      `json:"custom_domains,omitempty"`
	RemotePort    int           `json:"remote_port,omitempty"` // tcp only
	Group         string        `json:"group,omitempty"`       // instances of one agent share it
	GroupKey      secret.Secret `json:"group_key,omitempty"`
	LocalIP       string        `json:"local_ip"`
	LocalPort     int           `json:"local_port"`
	// HealthPath, with a query if any, is where frpc asks in plain HTTP every second whether to keep the tunnel
	// registered. Empty: the tunnel stays registered.
	HealthPath string `json:"health_path,omitempty"`
}

// Names returns the names by which callers reach the tunnel at frps, as far as they are known.
func (t Tunnel) Names() []string {
	names := slices.Clone(t.CustomDomains)
	if t.Subdomain != "" && t.SubdomainHost != "" {
		names = append(names, t.Subdomain+"."+t.SubdomainHost)
	}
	return names
}

// GivesUp returns what a tunnel of this type lacks compared with https. It is empty for https.
func (t Tunnel) GivesUp() string {
	return map[string]string{
		"http": "frps can read and alter all traffic, loses the answers to some writes, and slows down beyond five " +
			"callers at once; kubectl needs a TLS gateway in front of it",
		"tcp": "everybody on the way to frps can read and alter all traffic; kubectl needs a TLS gateway in front of it",
	}[t.Type]
}

// TOML renders frpc.toml. It fails only on text that is not UTF-8, which TOML cannot hold; the error names the key.
func (c Config) TOML() ([]byte, error) {
	var toml bytes.Buffer
	var invalid error
	set := func(key string, value any) { // except zero values; false is written
		if invalid == nil && !utf8.ValidString(fmt.Sprint(value)) {
			invalid = fmt.Errorf("frpc.toml: the value of %q is not valid UTF-8", key)
		}
		if text := render(value); !slices.Contains([]string{`""`, "0", "[]", "null"}, text) {
			fmt.Fprintf(&toml, "%s = %s\n", key, text)
		}
	}

	toml.WriteString("# Written by the PipeOps agent's bootstrap. Changes are lost. Holds secrets.\n")
	set("serverAddr", c.ServerAddr)
	set("serverPort", c.ServerPort)
	set("user", c.User)
	set("clientID", c.ClientID)
	// frpc's default is to exit when the first login fails; a tunnel must keep trying.
	set("loginFailExit", false)
	set("log.level", c.LogLevel)
	set("log.disablePrintColor", true)
	set("auth.method", c.AuthMethod)
	if c.AuthMethod == "oidc" {
		set("auth.oidc.tokenSource.type", "file")
		set("auth.oidc.tokenSource.file.path", c.TokenFile)
	} else {
		set("auth.token", c.Token.Reveal())
	}
	// A frps that requires these refuses an agent without them; any other ignores them.
	set("auth.additionalScopes", []string{"HeartBeats", "NewWorkConns"})
	for _, k := range slices.Sorted(maps.Keys(c.Metadatas)) { // from JSON, so they are UTF-8
		set("metadatas."+render(k), c.Metadatas[k].Reveal())
	}
	set("transport.protocol", c.Protocol)
	set("transport.proxyURL", c.ProxyURL.Reveal())
	// Measured with latency (tests/bench): with waiting work connections, the first calls after a login are answered
	// sooner; with the shorter interval, a frozen frps is noticed within 20 s, not 40.
	set("transport.poolCount", 5)
	set("transport.tcpMuxKeepaliveInterval", 10)
	// With multiplexing frpc sends no heartbeats by default, but a frps whose heartbeatTimeout is set waits for them.
	set("transport.heartbeatInterval", 30)
	set("transport.heartbeatTimeout", 90)
	set("transport.tls.trustedCaFile", c.TLS.CAFile)
	set("transport.tls.serverName", c.TLS.ServerName)
	set("transport.tls.certFile", c.TLS.CertFile)
	set("transport.tls.keyFile", c.TLS.KeyFile)
	set("webServer.addr", "127.0.0.1")
	set("webServer.port", c.Admin.Port)
	set("webServer.user", c.Admin.User)
	set("webServer.password", c.Admin.Password.Reveal())

	toml.WriteString("\n[[proxies]]\n")
	set("name", c.Tunnel.Name)
	set("type", c.Tunnel.Type)
	set("localIP", c.Tunnel.LocalIP)
	set("localPort", c.Tunnel.LocalPort)
	set("subdomain", c.Tunnel.Subdomain)
	set("customDomains", c.Tunnel.CustomDomains)
	set("remotePort", c.Tunnel.RemotePort)
	set("loadBalancer.group", c.Tunnel.Group)
	set("loadBalancer.groupKey", c.Tunnel.GroupKey.Reveal())
	if c.Tunnel.Type != "http" {
		// The PROXY header is the only way to learn the caller's address. With type http, X-Forwarded-For has it, and
		// frps sends requests of several callers over one connection.
		set("transport.proxyProtocolVersion", "v2")
	}
	// frpc registers the tunnel while the proxy accepts requests, and withdraws it when the proxy drains: running
	// streams go on, new requests go to another replica. It counts all failures, not consecutive ones, so that a
	// higher maxFailed would only delay the same result.
	if c.Tunnel.HealthPath != "" {
		set("healthCheck.type", "http")
		set("healthCheck.path", c.Tunnel.HealthPath)
		set("healthCheck.intervalSeconds", 1)
		set("healthCheck.timeoutSeconds", 5)
		set("healthCheck.maxFailed", 1)
	}
	return toml.Bytes(), invalid
}

// AdminPassword returns the admin API's password from an frpc.toml that TOML has rendered; empty if there is none.
func AdminPassword(toml []byte) (password secret.Secret) {
	_, after, _ := bytes.Cut(toml, []byte("\nwebServer.password = "))
	rendered, _, _ := bytes.Cut(after, []byte("\n"))
	_ = json.Unmarshal(rendered, &password) // the inverse of render
	return password
}

// escaped are the characters that JSON may hold as they are: DEL may not be in TOML, and '{' would be a template.
var escaped = strings.NewReplacer("\x7f", `\u007F`, "{", `\u007B`)

// render returns a value in the JSON that is also TOML. frp runs the file as a text/template first, so it holds no '{'.
// No value can start a line, so frp takes none for the "[common]" of its old format.
func render(value any) string {
	data, _ := json.Marshal(value) // fails for none of the types above
	return escaped.Replace(string(data))
}
