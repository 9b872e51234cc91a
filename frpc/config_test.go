package frpc

import (
	"testing"

	"github.com/pipeops/vm-agent/frpc/secret"
)

// TestFrpcTOML: word for word, because each line decides who may read the traffic, or whether the tunnel comes back.
// tests/tools/frp has the stock frpc read it.
func TestFrpcTOML(t *testing.T) {
	c := Config{
		ServerAddr: "frp.example", ServerPort: 7000, User: "u", ClientID: "a.1", Protocol: "tcp", ProxyURL: "http://p:1",
		TLS:        TLS{CAFile: "/run/roots.crt", ServerName: "n", CertFile: "/c", KeyFile: "/k"},
		AuthMethod: "token", Token: "t{{x}}", Metadatas: map[string]secret.Secret{"b.c": "m"}, LogLevel: "warn",
		Admin: Admin{Port: 7400, User: "pipeops", Password: "p"},
		Tunnel: Tunnel{
			Name: "a.1", Type: "https", Subdomain: "a", CustomDomains: []string{"d.example"}, Group: "g", GroupKey: "gk",
			LocalIP: "127.0.0.1", LocalPort: 8080, HealthPath: "/ready?only=shutdown",
		},
	}
	const begin = `# Written by the PipeOps agent's bootstrap. Changes are lost. Holds secrets.
serverAddr = "frp.example"
serverPort = 7000
`
	const server = `webServer.addr = "127.0.0.1"
webServer.port = 7400
webServer.user = "pipeops"
webServer.password = "p"

[[proxies]]
name = "a.1"
`
	const transport = `transport.poolCount = 5
transport.tcpMuxKeepaliveInterval = 10
transport.heartbeatInterval = 30
transport.heartbeatTimeout = 90
`
	expect(t, c, begin+`user = "u"
clientID = "a.1"
loginFailExit = false
log.level = "warn"
log.disablePrintColor = true
auth.method = "token"
auth.token = "t\u007B\u007Bx}}"
auth.additionalScopes = ["HeartBeats","NewWorkConns"]
metadatas."b.c" = "m"
transport.protocol = "tcp"
transport.proxyURL = "http://p:1"
`+transport+`transport.tls.trustedCaFile = "/run/roots.crt"
transport.tls.serverName = "n"
transport.tls.certFile = "/c"
transport.tls.keyFile = "/k"
`+server+`type = "https"
localIP = "127.0.0.1"
localPort = 8080
subdomain = "a"
customDomains = ["d.example"]
loadBalancer.group = "g"
loadBalancer.groupKey = "gk"
transport.proxyProtocolVersion = "v2"
healthCheck.type = "http"
healthCheck.path = "/ready?only=shutdown"
healthCheck.intervalSeconds = 1
healthCheck.timeoutSeconds = 5
healthCheck.maxFailed = 1
`)
	expect(t, Config{
		ServerAddr: "frp.example", ServerPort: 7000, ClientID: "a.1", Protocol: "wss",
		AuthMethod: "oidc", Token: "not here", TokenFile: "/run/frp.token",
		Admin:  Admin{Port: 7400, User: "pipeops", Password: "p"},
		Tunnel: Tunnel{Name: "a.1", Type: "http", Subdomain: "a", LocalIP: "127.0.0.1", LocalPort: 8080},
	}, begin+`clientID = "a.1"
loginFailExit = false
log.disablePrintColor = true
auth.method = "oidc"
auth.oidc.tokenSource.type = "file"
auth.oidc.tokenSource.file.path = "/run/frp.token"
auth.additionalScopes = ["HeartBeats","NewWorkConns"]
transport.protocol = "wss"
`+transport+server+`type = "http"
localIP = "127.0.0.1"
localPort = 8080
subdomain = "a"
`)
}

func expect(t *testing.T, c Config, want string) {
	t.Helper()
	toml, err := c.TOML()
	if err != nil || string(toml) != want {
		t.Errorf("got %s (%v), want %s", toml, err, want)
	}
}
