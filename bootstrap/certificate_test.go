package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// putAuthority writes ca.crt and ca.key into dir, as an operator's own tool may have made them.
func putAuthority(t *testing.T, dir string, template x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber, template.NotBefore = big.NewInt(1), time.Now().AddDate(-1, 0, 0)
	template.BasicConstraintsValid = true
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	put(t, dir, "ca.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	put(t, dir, "ca.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})))
}

func put(t *testing.T, dir, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// filesIn returns the names of the files in dir.
func filesIn(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

// TestCertificateEndsWithItsAuthority: callers would refuse a later one, and bootstrap would not warn of that.
func TestCertificateEndsWithItsAuthority(t *testing.T) {
	dir := t.TempDir()
	end := time.Now().Add(30 * 24 * time.Hour)
	putAuthority(t, dir, x509.Certificate{IsCA: true, NotAfter: end})
	if code, _, out := bootstrap(t, nil, "certificate", "--dir", dir, "a.example"); code != exitOK {
		t.Fatal(out)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
	if err != nil {
		t.Fatal(err)
	}
	if after := pair.Leaf.NotAfter; after.After(end) || after.Before(end.Add(-time.Hour)) {
		t.Errorf("the certificate ends at %s, its authority at %s", after, end)
	}
}

// TestCertificateIsNotMadeByWhatCannotSignIt: nobody could verify it.
func TestCertificateIsNotMadeByWhatCannotSignIt(t *testing.T) {
	for what, test := range map[string]struct {
		authority x509.Certificate
		says      string
	}{
		"expired":      {x509.Certificate{IsCA: true, NotAfter: time.Now().Add(-time.Minute)}, "expired"},
		"no authority": {x509.Certificate{NotAfter: time.Now().Add(time.Hour)}, "cannot sign"},
		"for other names": {x509.Certificate{IsCA: true, NotAfter: time.Now().Add(time.Hour),
			PermittedDNSDomainsCritical: true, PermittedDNSDomains: []string{"b.example"}}, "a.example"},
	} {
		dir := t.TempDir()
		putAuthority(t, dir, test.authority)
		code, _, out := bootstrap(t, nil, "certificate", "--dir", dir, "a.example")
		if code != exitFailed || !strings.Contains(out, test.says) || !strings.Contains(out, filepath.Join(dir, "ca.crt")) ||
			!slices.Equal(filesIn(t, dir), []string{"ca.crt", "ca.key"}) {
			t.Errorf("%s: %d, %q: %s", what, code, filesIn(t, dir), out)
		}
	}
}

// TestAuthorityIsNotReplacedUnasked: callers trust ca.crt, so where only its key is missing nobody is told to move it.
func TestAuthorityIsNotReplacedUnasked(t *testing.T) {
	for _, missing := range []string{"ca.key", "ca.crt"} {
		dir := t.TempDir()
		putAuthority(t, dir, x509.Certificate{IsCA: true, NotAfter: time.Now().Add(time.Hour)})
		if err := os.Remove(filepath.Join(dir, missing)); err != nil {
			t.Fatal(err)
		}
		code, _, out := bootstrap(t, nil, "certificate", "--dir", dir, "a.example")
		if code != exitFailed || strings.Contains(out, "away") || !strings.Contains(out, "put "+missing+" back") ||
			len(filesIn(t, dir)) != 1 {
			t.Errorf("without %s: %d, %q: %s", missing, code, filesIn(t, dir), out)
		}
	}
}

// TestBrokenAuthorityIsNamed: of several files, which one to look at.
func TestBrokenAuthorityIsNamed(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "ca.crt", "no PEM")
	put(t, dir, "ca.key", "no PEM")
	code, _, out := bootstrap(t, nil, "certificate", "--dir", dir, "a.example")
	if code != exitFailed || !strings.Contains(out, filepath.Join(dir, "ca.crt")) {
		t.Errorf("%d: %s", code, out)
	}
}

// TestCertificateOnAFullDisk leaves nothing half done: the next run would take it for an authority, or refuse to run.
func TestCertificateOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	signal.Ignore(syscall.SIGXFSZ)
	defer signal.Reset(syscall.SIGXFSZ)
	var before syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &before); err != nil {
		t.Fatal(err)
	}
	// The key is whole, the certificate with that of its authority is not.
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 1000, Max: before.Max}); err != nil {
		t.Fatal(err)
	}
	code, _, out := bootstrap(t, nil, "certificate", "--dir", dir, "a.example")
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &before); err != nil {
		t.Fatal(err)
	}
	if code != exitFailed || !strings.Contains(out, "tls.crt: file too large") || len(filesIn(t, dir)) > 0 {
		t.Errorf("%d, %q: %s", code, filesIn(t, dir), out)
	}
}

// TestFlagsMayFollowTheNames: as most command lines have it.
func TestFlagsMayFollowTheNames(t *testing.T) {
	for _, args := range []string{
		"certificate a.example --dir DIR b.example", "certificate a.example b.example --dir=DIR",
	} {
		dir := t.TempDir()
		code, _, out := bootstrap(t, nil, strings.Fields(strings.Replace(args, "DIR", dir, 1))...)
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
		if code != exitOK || err != nil || !slices.Equal(pair.Leaf.DNSNames, []string{"a.example", "b.example"}) {
			t.Errorf("%s: %d, %v: %s", args, code, err, out)
		}
	}
}

// TestCheckAndDoctorWarnOfTheCertificate: before callers see that it has ended, and without any other mistake.
func TestCheckAndDoctorWarnOfTheCertificate(t *testing.T) {
	dir := t.TempDir()
	putAuthority(t, dir, x509.Certificate{IsCA: true, NotAfter: time.Now().Add(10*24*time.Hour + time.Hour)})
	if code, _, out := bootstrap(t, nil, "certificate", "--dir", dir, "a.example"); code != exitOK {
		t.Fatal(out)
	}
	env := environment(t, "https://127.0.0.1:1")
	env["PIPEOPS_FRP_TUNNEL_TYPE"], env["PIPEOPS_FRP_TOKEN"] = "https", "token-of-frps"
	env["PIPEOPS_FRP_SERVER_ADDR"], env["PIPEOPS_FRP_SERVER_PORT"] = "127.0.0.1", "1"
	for key, says := range map[string]string{"tls.key": "expires in 10 days", "ca.key": "cannot be used"} {
		env["PIPEOPS_PROXY_TLS_CERT_FILE"] = filepath.Join(dir, "tls.crt")
		env["PIPEOPS_PROXY_TLS_KEY_FILE"] = filepath.Join(dir, key)
		const setting = "proxy.tls.cert_file (PIPEOPS_PROXY_TLS_CERT_FILE)"
		code, _, out := bootstrap(t, env, "--check")
		if code != exitOK || !strings.Contains(out, "bootstrap: warning: "+setting) || !strings.Contains(out, says) ||
			!strings.Contains(out, `agent.id: "agent-001"`) {
			t.Errorf("%d: %s", code, out)
		}
		_, _, out = bootstrap(t, env, "doctor")
		if first, _, _ := strings.Cut(out, "\n"); !strings.HasPrefix(first, "warning  configuration") ||
			!strings.Contains(first, setting) || !strings.Contains(first, says) {
			t.Errorf("doctor: %s", out)
		}
	}
}

// TestCertificateForAnotherNameIsWarnedOf: after a rotation, callers are refused, and all else looks well.
func TestCertificateForAnotherNameIsWarnedOf(t *testing.T) {
	env := environment(t, "https://control.example")
	env["PIPEOPS_FRP_TUNNEL_TYPE"], env["PIPEOPS_FRP_TUNNEL_SUBDOMAIN_HOST"] = "https", "k8s.example"
	for name, warned := range map[string]bool{
		"agent-001.k8s.example": false, "*.k8s.example": false, "b.k8s.example": true,
	} {
		dir := t.TempDir()
		if code, _, out := bootstrap(t, nil, "certificate", "--dir", dir, name); code != exitOK {
			t.Fatal(out)
		}
		env["PIPEOPS_PROXY_TLS_CERT_FILE"] = filepath.Join(dir, "tls.crt")
		env["PIPEOPS_PROXY_TLS_KEY_FILE"] = filepath.Join(dir, "tls.key")
		code, _, out := bootstrap(t, env, "--check")
		if says := "is not for agent-001.k8s.example: callers refuse it"; code != exitOK ||
			strings.Contains(out, says) != warned || strings.Contains(out, "warning") != warned {
			t.Errorf("%s: %d: %s", name, code, out)
		}
	}
}
