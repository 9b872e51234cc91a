package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/frpc"
)

// writeCertificate puts a certificate for agent-001 into dir, as bootstrap does, and returns it.
func writeCertificate(t *testing.T, dir string, serial int64) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), DNSNames: []string{"agent-001"}, NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []struct {
		name, kind string
		der        []byte
	}{{frpc.KeyFile, "PRIVATE KEY", keyDER}, {frpc.CertFile, "CERTIFICATE", der}} {
		path := filepath.Join(dir, file.name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: file.kind, Bytes: file.der}), 0o600); err != nil {
			t.Fatal(err)
		}
		// The file system's clock may be coarse.
		if err := os.Chtimes(path, time.Time{}, time.Unix(serial, 0)); err != nil {
			t.Fatal(err)
		}
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}

// TestTunnelListenerServesTLSAndPlainHTTP: the first byte decides. New connections get a new certificate, and open ones
// continue.
func TestTunnelListenerServesTLSAndPlainHTTP(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	quiet := slog.New(slog.DiscardHandler)
	s, _, _ := newTest(t, token)
	dir := s.config.RunDir
	server := newHTTPServer(t.Context(), tunnel, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_, _ = io.WriteString(w, r.Proto+" "+string(body))
	}), quiet)
	go func() {
		_ = server.Serve(s.bound(tunnel, listener.(*net.TCPListener), (&certificates{runDir: dir, log: quiet}).config()))
	}()
	t.Cleanup(func() { _ = server.Close() })

	caller := func(trusted *x509.Certificate) *http.Client {
		pool := x509.NewCertPool()
		if trusted != nil {
			pool.AddCert(trusted)
		}
		transport := &http.Transport{
			TLSClientConfig:   &tls.Config{RootCAs: pool, ServerName: "agent-001", MinVersion: tls.VersionTLS12},
			ForceAttemptHTTP2: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "tcp", listener.Addr().String())
			},
		}
		t.Cleanup(transport.CloseIdleConnections)
		return &http.Client{Transport: transport}
	}
	say := func(client *http.Client, url string) error {
		resp, err := client.Post(url, "text/plain", strings.NewReader("hello"))
		if err != nil {
			return err
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		if want := map[bool]string{true: "HTTP/2.0 hello", false: "HTTP/1.1 hello"}[resp.TLS != nil]; string(body) != want {
			t.Errorf("%s answers %q, %v", url, body, err)
		}
		return err
	}
	plain := caller(nil)
	if err := say(plain, "http://agent-001"); err != nil {
		t.Error(err)
	}
	if err := say(caller(nil), "https://agent-001"); err == nil {
		t.Error("TLS without a certificate")
	}
	first := writeCertificate(t, dir, 1)
	early := caller(first)
	if err := say(early, "https://agent-001"); err != nil {
		t.Error(err)
	}
	second := writeCertificate(t, dir, 2)
	for name, client := range map[string]*http.Client{"the open connection": early, "a new one": caller(second)} {
		if err := say(client, "https://agent-001"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := say(caller(first), "https://agent-001"); err == nil {
		t.Error("new connections get the old certificate")
	}
	// While bootstrap writes both files, the key does not match the certificate.
	if err := os.WriteFile(filepath.Join(dir, frpc.CertFile), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := say(caller(second), "https://agent-001"); err != nil {
		t.Errorf("while bootstrap writes: %v", err)
	}
	if err := say(plain, "http://agent-001"); err != nil {
		t.Error(err)
	}
}
