package integration

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/elazarl/goproxy"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// ownServer is a stock frps that an operator runs, with all its protocols.
type ownServer struct {
	bind, kcp, quic, http, https, tcp int // ports; tcp is for a tunnel of that type
	caFile, certFile, keyFile         string
}

// newOwnServer starts a frps that requires heartbeats, and a credential with every message. It requires a client
// certificate if clientCA is set, and TLS if force is set.
func newOwnServer(t *testing.T, w *world, force bool, clientCA string) ownServer {
	t.Helper()
	dir := filepath.Dir(w.cp.CAFile)
	s := ownServer{caFile: w.cp.CAFile, certFile: filepath.Join(dir, "server.crt"),
		keyFile: filepath.Join(dir, "server.key")}
	for _, port := range []*int{&s.bind, &s.kcp, &s.quic, &s.http, &s.https, &s.tcp} {
		var err error
		if *port, err = process.FreePort(); err != nil {
			t.Fatal(err)
		}
	}
	certificates := map[string]any{"force": force, "certFile": s.certFile, "keyFile": s.keyFile}
	if clientCA != "" {
		certificates["trustedCaFile"] = clientCA
	}
	data, err := json.Marshal(map[string]any{
		"bindAddr": "127.0.0.1", "bindPort": s.bind, "kcpBindPort": s.kcp, "quicBindPort": s.quic,
		"proxyBindAddr": "127.0.0.1",
		"vhostHTTPPort": s.http, "vhostHTTPSPort": s.https, "subDomainHost": "example.internal",
		"auth":      map[string]any{"token": "the-right-token", "additionalScopes": []string{"HeartBeats", "NewWorkConns"}},
		"transport": map[string]any{"tls": certificates, "heartbeatTimeout": 35},
	})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(w.group.Dir(), "own-frps.json")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := w.group.Start("own-frps", nil, harness.Binary(t, "frps"), "-c", path); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return process.Listening(fmt.Sprintf("127.0.0.1:%d", s.bind)) })
	return s
}

// TestEveryProtocolReachesFrps sends a request to the API server through the stock frpc and frps: with each protocol,
// with the hops that may stand between, and with each type of tunnel.
func TestEveryProtocolReachesFrps(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		prepare func(t *testing.T, w *world) (s ownServer, env []string)
		through string // type of the tunnel; http if empty
	}{
		{"tcp with a client certificate", func(t *testing.T, w *world) (ownServer, []string) {
			s := newOwnServer(t, w, true, w.cp.CAFile)
			return s, []string{"PIPEOPS_FRP_TLS_CERT_FILE=" + s.certFile, "PIPEOPS_FRP_TLS_KEY_FILE=" + s.keyFile}
		}, ""},
		{"kcp", func(t *testing.T, w *world) (ownServer, []string) {
			s := newOwnServer(t, w, true, "")
			return s, []string{"PIPEOPS_FRP_PROTOCOL=kcp", fmt.Sprintf("PIPEOPS_FRP_SERVER_PORT=%d", s.kcp)}
		}, ""},
		{"quic", func(t *testing.T, w *world) (ownServer, []string) {
			s := newOwnServer(t, w, true, "")
			return s, []string{"PIPEOPS_FRP_PROTOCOL=quic", fmt.Sprintf("PIPEOPS_FRP_SERVER_PORT=%d", s.quic)}
		}, ""},
		{"websocket", func(t *testing.T, w *world) (ownServer, []string) {
			return newOwnServer(t, w, true, ""), []string{"PIPEOPS_FRP_PROTOCOL=websocket"}
		}, ""},
		{"wss to a web server before frps", func(t *testing.T, w *world) (ownServer, []string) {
			s := newOwnServer(t, w, false, "") // the web server terminates TLS
			front := httptest.NewUnstartedServer(httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http",
				Host: fmt.Sprintf("127.0.0.1:%d", s.bind)}))
			certificate, err := tls.LoadX509KeyPair(s.certFile, s.keyFile)
			if err != nil {
				t.Fatal(err)
			}
			front.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12}
			front.StartTLS()
			t.Cleanup(front.Close)
			_, port, _ := net.SplitHostPort(front.Listener.Addr().String())
			return s, []string{"PIPEOPS_FRP_PROTOCOL=wss", "PIPEOPS_FRP_SERVER_PORT=" + port}
		}, ""},
		{"a corporate proxy", func(t *testing.T, w *world) (ownServer, []string) {
			s := newOwnServer(t, w, true, "")
			corporate := goproxy.NewProxyHttpServer()
			var passed atomic.Int32
			credential := "Basic " + base64.StdEncoding.EncodeToString([]byte("agent:hunter2"))
			corporate.OnRequest().HandleConnect(goproxy.FuncHttpsHandler(func(host string, ctx *goproxy.ProxyCtx) (
				*goproxy.ConnectAction, string,
			) {
				if ctx.Req.Header.Get("Proxy-Authorization") != credential {
					return goproxy.RejectConnect, host
				}
				passed.Add(1)
				return goproxy.OkConnect, host
			}))
			server := httptest.NewServer(corporate)
			t.Cleanup(func() {
				server.Close()
				if passed.Load() == 0 {
					t.Error("the tunnel went past the proxy")
				}
			})
			return s, []string{"PIPEOPS_FRP_PROXY_URL=http://agent:hunter2@" + server.Listener.Addr().String()}
		}, ""},
		{"a tunnel of type https", func(t *testing.T, w *world) (ownServer, []string) {
			return newOwnServer(t, w, true, ""), []string{"PIPEOPS_FRP_TUNNEL_TYPE=https",
				"PIPEOPS_FRP_TUNNEL_CUSTOM_DOMAINS=agent.example.test"}
		}, "https"},
		{"a tunnel of type tcp", func(t *testing.T, w *world) (ownServer, []string) {
			s := newOwnServer(t, w, true, "")
			return s, []string{"PIPEOPS_FRP_TUNNEL_TYPE=tcp", fmt.Sprintf("PIPEOPS_FRP_TUNNEL_REMOTE_PORT=%d", s.tcp)}
		}, "tcp"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			s, env := test.prepare(t, w)
			w.agent.Env = append(w.agent.Env, "PIPEOPS_FRP_TOKEN=the-right-token",
				"PIPEOPS_API_URL=https://"+harness.FreeAddr(t), "PIPEOPS_FRP_TUNNEL_TYPE=http",
				"PIPEOPS_FRP_SERVER_ADDR=127.0.0.1", fmt.Sprintf("PIPEOPS_FRP_SERVER_PORT=%d", s.bind))
			w.agent.Env = append(w.agent.Env, env...)
			w.startAgent()
			transport := &http.Transport{}
			t.Cleanup(transport.CloseIdleConnections)
			base := "http://" + agentID + ".example.internal"
			port := s.http
			switch test.through {
			case "tcp":
				port = s.tcp
			case "https":
				port, base = s.https, "https://agent.example.test"
				trusted := x509.NewCertPool()
				trusted.AppendCertsFromPEM([]byte(w.file(frpc.CertFile)))
				transport.TLSClientConfig = &tls.Config{RootCAs: trusted, MinVersion: tls.VersionTLS12}
			}
			transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
			}
			resp, body := exchange(t, &http.Client{Transport: transport}, http.MethodGet, base+"/api/k8s/version",
				http.Header{"Authorization": {"Bearer " + agentToken}}, "")
			if resp.StatusCode != http.StatusOK || !strings.Contains(body, "gitVersion") ||
				resp.Header.Get("Pipeops-Agent") != agentID {
				t.Errorf("%s: %s", resp.Status, body)
			}
			doctor, err := w.agent.Command("doctor")
			if err != nil {
				t.Fatal(err)
			}
			<-doctor.Done()
			want := "\nok       frps            127.0.0.1:"
			if test.name == "kcp" || test.name == "quic" {
				want = "\nskipped  frps            127.0.0.1:"
			}
			tunnel := "\nwarning  tunnel " // kubectl sends no token in clear
			if test.through == "https" {
				tunnel = "\nok       tunnel "
			}
			if !strings.Contains(doctor.Log(), want) || !strings.Contains(doctor.Log(), tunnel) || doctor.ExitCode() != 0 {
				t.Errorf("doctor says:\n%s", doctor.Log())
			}
		})
	}
}

// TestUnwritableRunDirectoryIsReported uses a run directory that is full, read-only or another user's. The error says
// so, and no file is half written.
func TestUnwritableRunDirectoryIsReported(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for name, test := range map[string]struct{ prepare, want string }{
		"full":      {`mount -t tmpfs -o size=4k tmpfs "$PIPEOPS_RUN_DIR"`, "no space left on device"},
		"read-only": {`mount -t tmpfs -o ro tmpfs "$PIPEOPS_RUN_DIR"`, "read-only file system"},
		"another's": {`chmod 500 "$PIPEOPS_RUN_DIR" && set -- setpriv --bounding-set=-all --inh-caps=-all "$@"`, "permission denied"},
	} {
		t.Run(name, func(t *testing.T) {
			const script = ` && { "$@"; code=$?; for f in "$PIPEOPS_RUN_DIR"/* "$PIPEOPS_RUN_DIR"/.??*; do ` +
				`[ -e "$f" ] && echo "left: $f"; done; exit $code; }`
			p, err := w.group.Start("volume-"+name, append(w.agent.Env, "PIPEOPS_RUN_DIR="+t.TempDir()), "unshare", "--user",
				"--map-root-user", "--mount",
				"sh", "-c", test.prepare+script, "sh", harness.Binary(t, "bootstrap"), "--once")
			if err != nil {
				t.Fatal(err)
			}
			if code := p.ExitCode(); code != 1 || !strings.Contains(p.Log(), "write the run directory: ") ||
				!strings.Contains(p.Log(), test.want) {
				t.Errorf("exit code %d, want 1 and %q:\n%s", code, test.want, p.Log())
			}
			if strings.Contains(p.Log(), "left: ") && (name != "full" || strings.Contains(p.Log(), "/"+frpc.ConfigFile+"\n")) {
				t.Errorf("something is left:\n%s", p.Log())
			}
		})
	}
}
