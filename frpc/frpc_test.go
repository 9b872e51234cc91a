package frpc

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/frpc/secret"
)

func lease() Lease {
	return Lease{
		IssuedAt: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), ExpiresAt: time.Date(2026, 1, 3, 0, 0, 0, 0, time.UTC),
		Frpc: Config{
			ServerAddr: "frp.example", ServerPort: 7000, ClientID: "a.1", Protocol: "tcp",
			AuthMethod: "token", Token: "t", Metadatas: map[string]secret.Secret{"lease": "l"},
			Admin:  Admin{Port: 7400, User: "u", Password: "p"},
			Tunnel: Tunnel{Name: "a.1", Type: "http", Subdomain: "a", LocalIP: "127.0.0.1", LocalPort: 8080},
		},
	}
}

func TestLeaseIsWrittenForItsReadersOnly(t *testing.T) {
	dir := t.TempDir()
	want := lease()
	for range 2 { // the second write replaces files that are there
		if _, err := want.Write(dir); err != nil {
			t.Fatal(err)
		}
	}
	got, err := ReadLease(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(*got, want) {
		t.Errorf("got %+v, want %+v", *got, want)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		names = append(names, f.Name())
		info, err := f.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", f.Name(), info.Mode())
		}
	}
	if !reflect.DeepEqual(names, []string{ConfigFile, LeaseFile}) {
		t.Errorf("the directory holds %v", names)
	}
}

// TestWriteRestoresOnlyMissingOrChangedFiles: what is removed or changed is written again, and nothing else is.
func TestWriteRestoresOnlyMissingOrChangedFiles(t *testing.T) {
	dir, l := t.TempDir(), lease()
	l.Frpc.AuthMethod, l.Frpc.TokenFile, l.Certificate, l.Key = "oidc", "/f", []byte("certificate"), []byte("key")
	all := []string{TokenFile, KeyFile, CertFile, LeaseFile, ConfigFile}
	if written, err := l.Write(dir); err != nil || !reflect.DeepEqual(written, all) {
		t.Fatalf("wrote %v, %v", written, err)
	}
	for _, name := range all {
		path := filepath.Join(dir, name)
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, harm := range []func() error{
			func() error { return os.Remove(path) },
			func() error { return os.WriteFile(path, []byte("{"), 0o600) },
		} {
			if err := harm(); err != nil {
				t.Fatal(err)
			}
			written, err := l.Write(dir)
			if got, _ := os.ReadFile(path); err != nil || !reflect.DeepEqual(written, []string{name}) ||
				!bytes.Equal(got, want) {
				t.Errorf("%s: wrote %v, %v, %q", name, written, err, got)
			}
		}
	}
	if written, err := l.Write(dir); err != nil || written != nil {
		t.Errorf("wrote %v without need, %v", written, err)
	}
}

func TestAdminPasswordIsReadBack(t *testing.T) {
	for _, want := range []secret.Secret{
		"p", "", "<&>", `a"b\c{{.}}'#=`, "\x00\x1f\x7f\n\u0080\u2028🦊", "webServer.password = \"x\"",
	} {
		c := lease().Frpc
		c.User, c.Token, c.Admin.Password = "webServer.password = \"y\"", "\nwebServer.password = \"y\"", want
		toml, err := c.TOML()
		if err != nil {
			t.Fatal(err)
		}
		if got := AdminPassword(toml); got != want {
			t.Errorf("got %q, want %q", got.Reveal(), want.Reveal())
		}
	}
	for _, broken := range []string{"", "serverAd", "webServer.password = ", `webServer.password = "half a pass`} {
		if got := AdminPassword([]byte(broken)); got != "" {
			t.Errorf("%q: got %q", broken, got.Reveal())
		}
	}
}

func TestFailedWriteLeavesTheOldFiles(t *testing.T) {
	dir := t.TempDir()
	old := lease()
	if _, err := old.Write(dir); err != nil {
		t.Fatal(err)
	}
	bad := lease()
	bad.Frpc.Token = "\xff"
	if _, err := bad.Write(dir); err == nil {
		t.Fatal("a token that is not UTF-8 was written")
	}
	if got, err := ReadLease(dir); err != nil || got.Frpc.Token != old.Frpc.Token {
		t.Errorf("the old lease is gone: %+v, %v", got, err)
	}
	if _, err := old.Write(filepath.Join(dir, "missing")); err == nil {
		t.Error("no error for a directory that does not exist")
	}
}

func TestUnreadableLeaseIsReported(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadLease(dir); err == nil || !strings.Contains(err.Error(), "bootstrap has not run") {
		t.Errorf("missing file: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, LeaseFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadLease(dir); err == nil || !strings.Contains(err.Error(), "is not a lease") {
		t.Errorf("broken file: %v", err)
	}
}

// TestAdminErrorsHoldNoPassword covers what a real frpc does not do; the integration tests speak to a real one.
func TestAdminErrorsHoldNoPassword(t *testing.T) {
	for _, test := range []struct {
		name    string
		handler http.HandlerFunc
		want    string
	}{
		{"refused", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnauthorized) }, "401 Unauthorized to GET /api/status"},
		{"not JSON", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>")) }, "status is not JSON"},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := httptest.NewServer(test.handler)
			defer server.Close()
			_, port, err := net.SplitHostPort(server.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			admin := Admin{User: "u", Password: "hunter2"}
			if admin.Port, err = strconv.Atoi(port); err != nil {
				t.Fatal(err)
			}
			if _, err := admin.Status(t.Context()); err == nil || !strings.Contains(err.Error(), test.want) ||
				strings.Contains(err.Error(), "hunter2") {
				t.Errorf("got error %v, want %q", err, test.want)
			}
		})
	}
}

// TestLoginNamesTheStageThatFailed covers servers that are no frps; the integration tests log in to a real one.
func TestLoginNamesTheStageThatFailed(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("SSH-2.0-OpenSSH_9.2\r\n"))
			_ = conn.Close()
		}
	}()
	c := lease().Frpc
	c.ServerAddr, c.ServerPort = "127.0.0.1", listener.Addr().(*net.TCPAddr).Port
	if _, err := Login(t.Context(), c); err == nil || !strings.Contains(err.Error(), "fails the TLS handshake") {
		t.Errorf("a server that speaks no TLS: %v", err)
	}
	web := httptest.NewUnstartedServer(http.NotFoundHandler())
	web.Config.ReadTimeout = 100 * time.Millisecond // a frame of frp looks like the start of a request
	web.StartTLS()
	defer web.Close()
	c.ServerPort = web.Listener.Addr().(*net.TCPAddr).Port
	if _, err := Login(t.Context(), c); err == nil ||
		!strings.Contains(err.Error(), "presents a certificate signed by an unknown authority") {
		t.Errorf("a server that cannot be verified: %v", err)
	}
	c.TLS.InsecureSkipVerify = true
	if _, err := Login(t.Context(), c); err == nil || !strings.Contains(err.Error(), "does not answer a login") {
		t.Errorf("a web server: %v", err)
	}
	strict := httptest.NewUnstartedServer(http.NotFoundHandler())
	strict.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	strict.StartTLS()
	defer strict.Close()
	c.ServerPort = strict.Listener.Addr().(*net.TCPAddr).Port
	const want = "does not accept the agent's client certificate (tls: certificate required)"
	if _, err := Login(t.Context(), c); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("a server that requires a client certificate: %v", err)
	}
	c.Protocol = "kcp"
	if _, err := Login(t.Context(), c); err == nil || !strings.Contains(err.Error(), "see frpc's log") {
		t.Errorf("another protocol: %v", err)
	}
}

func TestLeaseHoldsSecretsInTheClear(t *testing.T) {
	data, err := json.Marshal(lease())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(data), `"token":"t"`) {
		t.Errorf("got %s", data)
	}
}

// TestRemoveLoginLeavesNothingToLogInWith: nothing is left that frpc could log in with.
func TestRemoveLoginLeavesNothingToLogInWith(t *testing.T) {
	dir, l := t.TempDir(), lease()
	l.Frpc.AuthMethod, l.Frpc.TokenFile = "oidc", filepath.Join(dir, TokenFile)
	if _, err := l.Write(dir); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := RemoveLogin(dir); err != nil {
			t.Fatal(err)
		}
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 || files[0].Name() != LeaseFile {
		t.Errorf("left: %v, %v", files, err)
	}
}

// TestStopReportsAStuckFrpc: a frpc that has been told to stop and is still there is stuck.
func TestStopReportsAStuckFrpc(t *testing.T) {
	t.Parallel()
	for _, stuck := range []bool{false, true} {
		var server *httptest.Server
		server = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodPost || r.URL.Path != "/api/stop" {
				t.Errorf("asked %s %s", r.Method, r.URL)
			}
			if !stuck {
				go server.CloseClientConnections()
			}
		}))
		defer server.Close()
		admin := Admin{Port: server.Listener.Addr().(*net.TCPAddr).Port}
		begin := time.Now()
		if err := admin.Stop(t.Context()); errors.Is(err, ErrStuck) != stuck || time.Since(begin) > 8*time.Second {
			t.Errorf("stuck %v: after %s: %v", stuck, time.Since(begin), err)
		}
		server.Close()
		if err := admin.Stop(t.Context()); err == nil || errors.Is(err, ErrStuck) {
			t.Errorf("nobody listens: %v", err)
		}
	}
}

// TestWebSocketReadsAndWritesFrames: frames of all sizes, split and with control frames between.
func TestWebSocketReadsAndWritesFrames(t *testing.T) {
	here, there := net.Pipe()
	defer func() { _ = here.Close(); _ = there.Close() }()
	frames := []byte{
		0x02, 3, 'a', 'b', 'c', 0x89, 2, 'p', 'p', 0x80, 126, 0, 2, 'd', 'e', 0x82, 0,
		0x82, 127, 0, 0, 0, 0, 0, 0, 0, 1, 'f',
	}
	go func() { _, _ = there.Write(frames) }()
	socket := &webSocket{Conn: here, reader: bufio.NewReader(here)}
	got := make([]byte, 6)
	if _, err := io.ReadFull(socket, got); err != nil || string(got) != "abcdef" {
		t.Errorf("read %q, %v", got, err)
	}
	go func() { _, _ = socket.Write([]byte("xyz")) }()
	got = make([]byte, 11)
	if _, err := io.ReadFull(there, got); err != nil || string(got) != "\x82\xfe\x00\x03\x00\x00\x00\x00xyz" {
		t.Errorf("wrote %q, %v", got, err)
	}
}
