package frpc

import (
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// frps is a server that reads one login, and gives the answer to it; none if that is empty. The integration tests log
// in to a real one, which is never silent and speaks no old TLS.
func frps(t *testing.T, answer string, config *tls.Config) (c Config, logins <-chan map[string]any) {
	t.Helper()
	certificates := httptest.NewUnstartedServer(nil)
	certificates.StartTLS()
	certificates.Close()
	config.Certificates = certificates.TLS.Certificates
	socket, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = socket.Close() })
	got := make(chan map[string]any, 1)
	go func() {
		conn, err := socket.Accept()
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		var head [12 + 9]byte // of a frame of yamux, and of a message
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return
		}
		login := map[string]any{}
		_ = json.NewDecoder(io.LimitReader(conn, int64(binary.BigEndian.Uint64(head[13:])))).Decode(&login)
		got <- login
		if answer != "" {
			message := binary.BigEndian.AppendUint64([]byte{'1'}, uint64(len(answer)))
			message = append(message, answer...)
			frame := binary.BigEndian.AppendUint32([]byte{0, 0, 0, 0, 0, 0, 0, 1}, uint32(len(message)))
			_, _ = conn.Write(append(frame, message...))
		}
		_, _ = conn.Read(make([]byte, 1)) // until the client closes
	}()
	c = lease().Frpc
	c.ServerAddr, c.ServerPort, c.TLS.InsecureSkipVerify = "127.0.0.1", socket.Addr().(*net.TCPAddr).Port, true
	return c, got
}

func TestLoginReturnsTheVersionOrTheRefusal(t *testing.T) {
	c, logins := frps(t, `{"version":"0.71.0"}`, &tls.Config{})
	if version, err := Login(t.Context(), c); err != nil || version != "0.71.0" {
		t.Errorf("accepted: %q, %v", version, err)
	}
	if login := <-logins; login["privilege_key"] == "t" || login["metas"].(map[string]any)["lease"] != "l" {
		t.Errorf("the login is %v", login)
	}
	c, _ = frps(t, `{"version":"0.71.0","error":"no such agent"}`, &tls.Config{})
	if version, err := Login(t.Context(), c); version != "0.71.0" || !errors.Is(err, ErrRefused) ||
		!strings.Contains(err.Error(), "no such agent") {
		t.Errorf("refused: %q, %v", version, err)
	}
	c, _ = frps(t, `{"version":"0.71.0"}`, &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11})
	if _, err := Login(t.Context(), c); err == nil {
		t.Error("TLS 1.1 is spoken")
	}
}

// TestSilentFrpsEndsTheLogin: after five seconds.
func TestSilentFrpsEndsTheLogin(t *testing.T) {
	t.Parallel()
	c, _ := frps(t, "", &tls.Config{})
	begin := time.Now()
	if _, err := Login(t.Context(), c); err == nil || time.Since(begin) > 8*time.Second {
		t.Errorf("after %s: %v", time.Since(begin), err)
	}
}

func TestOutdatedFrpsIsNamed(t *testing.T) {
	for version, outdated := range map[string]bool{
		"0.70.9": true, "0.8.0": true, "0.71.0": false, "0.100.0": false, "1.0.0": false, "": false, "x": false,
	} {
		if got := Outdated(version); (got != "") != outdated {
			t.Errorf("%q: %q", version, got)
		}
	}
}

// TestStatusWithoutATunnelIsAnAnswer: so that frpc is not taken for one that does not run.
func TestStatusWithoutATunnelIsAnAnswer(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "{}")
	}))
	defer server.Close()
	admin := Admin{Port: server.Listener.Addr().(*net.TCPAddr).Port}
	if proxies, err := admin.Status(t.Context()); proxies == nil || len(proxies) != 0 || err != nil {
		t.Errorf("got %#v, %v", proxies, err)
	}
}
