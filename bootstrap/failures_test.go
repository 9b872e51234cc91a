package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/secret"
)

// serveTLS runs a control plane for localhost whose certificate ends at end, and returns its URL and the file of
// the authority that has signed it.
func serveTLS(t *testing.T, name string, end time.Time) (url, caFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: end.Add(-48 * time.Hour), NotAfter: end,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(answer(200, "application/json", `{"frp_token":"f"}`))
	certificate := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12}
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	caFile = filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return strings.Replace(server.URL, "127.0.0.1", "localhost", 1), caFile
}

// TestConnectionErrorsNameCauseAndNextStep: each fault between the agent and the control plane, and the error for it.
func TestConnectionErrorsNameCauseAndNextStep(t *testing.T) {
	good, goodCA := serveTLS(t, "localhost", time.Now().Add(time.Hour))
	wrongName, wrongNameCA := serveTLS(t, "other.example", time.Now().Add(time.Hour))
	expired, expiredCA := serveTLS(t, "localhost", time.Now().Add(-time.Hour))
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	silent, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts, and nobody says a word
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = closed.Close()
	for _, test := range []struct {
		name, url, caFile string
		code              int
		want              []string
	}{
		{"none", good, goodCA, exitOK, nil},
		{"dns", "https://control.invalid", "", exitFailed, []string{
			"the control plane at https://control.invalid cannot be found: lookup control.invalid",
			"check agent.api_url (PIPEOPS_API_URL) and the cluster's DNS"}},
		{"refused", "https://" + closed.Addr().String(), "", exitFailed, []string{
			"cannot be reached: dial tcp " + closed.Addr().String() + ": connect: connection refused: check agent.api_url"}},
		{"timeout", "https://" + silent.Addr().String(), "", exitFailed, []string{
			"does not answer: context deadline exceeded: check agent.api_url (PIPEOPS_API_URL), and that the network allows HTTPS connections to it"}},
		{"no TLS", strings.Replace(plain.URL, "http:", "https:", 1), "", exitFailed, []string{
			"does not speak TLS: check the port in agent.api_url"}},
		{"unknown authority", good, "", exitFailed, []string{
			`presents a certificate signed by an unknown authority (subject "CN=localhost" for localhost, issued by "CN=localhost", valid from `,
			"set agent.ca_file (PIPEOPS_API_CA_FILE) to the file of its authority"}},
		{"wrong name", wrongName, wrongNameCA, exitFailed, []string{
			`presents a certificate for another name than localhost (subject "CN=other.example" for other.example, `,
			"check agent.api_url (PIPEOPS_API_URL)"}},
		{"expired", expired, expiredCA, exitFailed, []string{
			"presents a certificate that is not valid at ", `(subject "CN=localhost" for localhost, `,
			"renew it, or correct the clock of this host or its"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			env := environment(t, test.url)
			env["PIPEOPS_API_CA_FILE"] = test.caFile
			code, lastError, output := bootstrap(t, env, "--once", "--timeout", "3s")
			if code != test.code {
				t.Errorf("exit code %d, want %d:\n%s", code, test.code, output)
			}
			for _, want := range test.want {
				if !strings.Contains(lastError, want) {
					t.Errorf("the last line says %q\nwant %q", lastError, want)
				}
			}
		})
	}
}

// TestBrokenRunDirectoryIsReported: files of a killed bootstrap do no harm, and missing ones are named.
func TestBrokenRunDirectoryIsReported(t *testing.T) {
	server := httptest.NewServer(answer(200, "application/json", `{"frp_token":"f"}`))
	defer server.Close()
	env := environment(t, server.URL)
	dir := env["PIPEOPS_RUN_DIR"]
	leftover := filepath.Join(dir, "."+frpc.ConfigFile+".new")
	for name, content := range map[string]string{
		leftover: "half a fi", filepath.Join(dir, frpc.LeaseFile): "{", filepath.Join(dir, frpc.ConfigFile): "serverAd",
	} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if code, _, output := bootstrap(t, env, "ready"); code != exitFailed || !strings.Contains(output, "is not a lease") {
		t.Errorf("half-written files are taken for ready: %d %s", code, output)
	}
	if code, _, output := bootstrap(t, env, "--once"); code != exitOK {
		t.Fatal(output)
	}
	if _, err := os.Stat(leftover); err == nil {
		t.Error("the leftover is still there")
	}
	if code, _, output := bootstrap(t, env, "ready"); code != exitOK {
		t.Errorf("not ready: %s", output)
	}
	if err := os.Remove(filepath.Join(dir, frpc.ConfigFile)); err != nil {
		t.Fatal(err)
	}
	code, _, output := bootstrap(t, env, "ready")
	if code != exitFailed || !strings.Contains(output, frpc.ConfigFile+": no such file") {
		t.Errorf("ready without frpc.toml: %s", output)
	}
	env["PIPEOPS_RUN_DIR"] = leftover // not there
	code, lastError, _ := bootstrap(t, env, "--once")
	if code != exitFailed || !strings.Contains(lastError, "open the run directory: ") ||
		!strings.Contains(lastError, "check run_dir (PIPEOPS_RUN_DIR)") {
		t.Errorf("exit code %d: %s", code, lastError)
	}
}

// TestSecondBootstrapForARunDirectoryIsRefused: a second would change frpc's password for the first. It is refused
// before it sends a request to the control plane; doctor and the probe are not.
func TestSecondBootstrapForARunDirectoryIsRefused(t *testing.T) {
	asked := atomic.Int32{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		answer(200, "application/json", `{"frp_token":"f"}`)(w, r)
	}))
	defer server.Close()
	env := environment(t, server.URL)
	env["PIPEOPS_FRP_SERVER_ADDR"] = "127.0.0.1" // doctor knocks there
	if code, _, output := bootstrap(t, env, "--once"); code != exitOK {
		t.Fatal(output)
	}
	dir, err := os.Open(env["PIPEOPS_RUN_DIR"]) // as another bootstrap holds it
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	before := asked.Load()
	for _, args := range [][]string{{"--once"}, nil} {
		code, lastError, output := bootstrap(t, env, args...)
		if code != exitFailed || !strings.Contains(lastError, "lock the run directory "+env["PIPEOPS_RUN_DIR"]) {
			t.Errorf("%v: exit code %d: %s", args, code, output)
		}
	}
	if asked.Load() != before {
		t.Error("the refused bootstrap asked for a lease")
	}
	if code, _, output := bootstrap(t, env, "ready"); code != exitOK {
		t.Errorf("ready: %s", output)
	}
	if _, _, output := bootstrap(t, env, "doctor"); strings.Contains(output, "another bootstrap") {
		t.Errorf("doctor: %s", output)
	}
	_ = dir.Close()
	if code, _, output := bootstrap(t, env, "--once"); code != exitOK {
		t.Errorf("after the first has ended: %s", output)
	}
}

// TestAdminPasswordSurvivesBrokenFiles, because frpc may still run with it.
func TestAdminPasswordSurvivesBrokenFiles(t *testing.T) {
	server := httptest.NewServer(answer(200, "application/json", `{"frp_token":"f"}`))
	defer server.Close()
	env := environment(t, server.URL)
	dir := env["PIPEOPS_RUN_DIR"]
	write := func(name, content string) func() error {
		return func() error { return os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600) }
	}
	remove := func(name string) func() error { return func() error { return os.Remove(filepath.Join(dir, name)) } }
	var want secret.Secret
	for _, harm := range []func() error{
		func() error { return nil }, write(frpc.LeaseFile, "{"), remove(frpc.LeaseFile),
		write(frpc.ConfigFile, "serverAd"), remove(frpc.ConfigFile),
	} {
		if err := harm(); err != nil {
			t.Fatal(err)
		}
		if code, _, output := bootstrap(t, env, "--once"); code != exitOK {
			t.Fatal(output)
		}
		lease, err := frpc.ReadLease(dir)
		if err != nil {
			t.Fatal(err)
		}
		if want == "" {
			want = lease.Frpc.Admin.Password
		}
		if lease.Frpc.Admin.Password != want || len(want) < 20 {
			t.Error("another password")
		}
	}
}
