package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

// parsed is the part of a kubeconfig that is looked at.
type parsed struct {
	Clusters []struct {
		Name    string
		Cluster struct {
			Server string
			CA     []byte `json:"certificate-authority-data"`
		}
	}
	Users []struct {
		Name string
		User map[string]string
	}
	CurrentContext string `json:"current-context"`
}

// obtain has bootstrap write the lease of an agent without a control plane.
func obtain(t *testing.T, env map[string]string) {
	t.Helper()
	env["PIPEOPS_FRP_TOKEN"], env["PIPEOPS_FRP_TLS_INSECURE_SKIP_VERIFY"] = "token-of-frps", "true"
	if code, _, out := bootstrap(t, env, "--once"); code != exitOK {
		t.Fatal(out)
	}
}

// TestCertificateAndKubeconfigFitTogether: a caller with the kubeconfig trusts an agent with the certificate, and
// still does when the next certificate of the same authority has replaced it.
func TestCertificateAndKubeconfigFitTogether(t *testing.T) {
	dir := t.TempDir()
	crt, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	make := func() {
		t.Helper()
		code, _, out := bootstrap(t, nil, "certificate", "--dir", dir, "edge-7.k8s.example", "*.edge.example")
		if code != exitOK {
			t.Fatal(out)
		}
	}
	make()
	env := environment(t, "https://control.example")
	for name, value := range map[string]string{
		"FRP_TUNNEL_TYPE": "https", "AGENT_ID": "edge-7", "FRP_TUNNEL_SUBDOMAIN_HOST": "k8s.example",
		"PROXY_TLS_CERT_FILE": crt, "PROXY_TLS_KEY_FILE": key,
	} {
		env["PIPEOPS_"+name] = value
	}
	obtain(t, env)
	code, _, out := bootstrap(t, env, "kubeconfig")
	var config parsed
	if err := yaml.Unmarshal([]byte(out), &config); err != nil || code != exitOK {
		t.Fatalf("%v: %s", err, out)
	}
	cluster, user := config.Clusters[0], config.Users[0]
	if cluster.Cluster.Server != "https://edge-7.k8s.example/api/k8s" || user.User["tokenFile"] != "edge-7.token" ||
		config.CurrentContext != "edge-7" || cluster.Name != "edge-7" || user.Name != "edge-7" {
		t.Errorf("%+v", config)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(cluster.Cluster.CA) {
		t.Fatal(out)
	}
	for range 2 {
		pair, err := tls.LoadX509KeyPair(crt, key)
		if err != nil {
			t.Fatal(err)
		}
		server := httptest.NewUnstartedServer(http.NotFoundHandler())
		server.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
		server.StartTLS()
		for _, name := range []string{"edge-7.k8s.example", "a.edge.example"} {
			conn, err := tls.Dial("tcp", server.Listener.Addr().String(),
				&tls.Config{RootCAs: roots, ServerName: name, MinVersion: tls.VersionTLS12})
			if err != nil {
				t.Error(err)
			} else {
				_ = conn.Close()
			}
		}
		server.Close()
		for _, file := range []string{crt, key} {
			if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%v, %v", info, err)
			}
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}
		make()
	}
}

// TestCertificateOverwritesNothing: whichever of its files is there; and it takes DNS names alone.
func TestCertificateOverwritesNothing(t *testing.T) {
	for _, name := range []string{"tls.crt", "tls.key", "ca.crt", "ca.key"} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, name), []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		code, _, out := bootstrap(t, nil, "certificate", "--dir", dir, "a.example")
		files, _ := filepath.Glob(filepath.Join(dir, "*"))
		if data, _ := os.ReadFile(files[0]); code != exitFailed || len(files) != 1 || string(data) != "old" ||
			!strings.Contains(out, name) {
			t.Errorf("%s: %d, %q, %s", name, code, files, out)
		}
	}
	long := strings.Repeat("a", 64)
	for _, names := range [][]string{{}, {"192.0.2.1"}, {"a.example", "b/c"}, {"a..b"}, {"a.-b.example"}, {"*.*.example"},
		{long + ".example"}, {strings.Repeat("a.", 126) + "ab"}} {
		dir := t.TempDir()
		code, _, out := bootstrap(t, nil, append([]string{"certificate", "--dir", dir}, names...)...)
		if files, _ := filepath.Glob(filepath.Join(dir, "*")); code != exitFailed || len(files) > 0 ||
			!strings.Contains(out, "DNS names") {
			t.Errorf("%q: %d, %q, %s", names, code, files, out)
		}
	}
}

// TestKubeconfigIsForTheIdentityInForce: who may use it, and with what.
func TestKubeconfigIsForTheIdentityInForce(t *testing.T) {
	dir := t.TempDir()
	code, _, out := bootstrap(t, nil, "certificate", "--dir", dir, "agent-001.k8s.example", "*.k8s.example")
	if code != exitOK {
		t.Fatal(out)
	}
	const gateway = "--server=https://gateway.example:8443/agents/agent-001/"
	for what, test := range map[string]struct {
		env  string // NAME=VALUE of PIPEOPS_NAME
		args string
		want string // parts of what is printed
		code int
	}{
		"direct":          {"", "", `https://agent-001.k8s.example/api/k8s authority-data agent-001.token`, 0},
		"at another port": {"", "--server=https://agent-001.k8s.example:8443", "example:8443/api/k8s authority-data", 0},
		"through a gateway": {"", gateway,
			"https://gateway.example:8443/agents/agent-001/api/k8s tokenFile", 0},
		"own and a certificate": {"ACCESS_IDENTITY=own PROXY_TLS_CLIENT_CA_FILE=/ca.crt", "",
			"agent-001.crt agent-001.key tokenFile", 0},
		"own and a gateway":   {"ACCESS_IDENTITY=own", gateway, "exec: tokenFile", 0},
		"own and neither":     {"ACCESS_IDENTITY=own", "", "gateway --server", 1},
		"named and a gateway": {"ACCESS_IDENTITY=named", gateway, "tokenFile", 0},
		"named without one":   {"ACCESS_IDENTITY=named", "", "gateway --server", 1},
		"http and a gateway": {"FRP_TUNNEL_TYPE=http PROXY_TLS_CERT_FILE= PROXY_TLS_KEY_FILE=", gateway,
			"gateway.example", 0},
		"an address in clear": {"", "--server=http://agent-001.k8s.example", "https", 1},
		"a custom domain": {"FRP_TUNNEL_CUSTOM_DOMAINS=agent-001.k8s.example FRP_TUNNEL_SUBDOMAIN_HOST=", "",
			"agent-001.k8s.example", 0},
		"an unknown name":        {"FRP_TUNNEL_SUBDOMAIN_HOST=", "", "PIPEOPS_FRP_TUNNEL_SUBDOMAIN_HOST", 1},
		"before the first lease": {"RUN_DIR=" + t.TempDir(), "", "first lease", 1},
		"a name that the certificate lacks": {"FRP_TUNNEL_SUBDOMAIN_HOST=other.example", "",
			"certificate agent-001.other.example", 1},
		"http without a gateway": {"FRP_TUNNEL_TYPE=http PROXY_TLS_CERT_FILE= PROXY_TLS_KEY_FILE=", "",
			"http gateway --server", 1},
		"tcp without a gateway": {"FRP_TUNNEL_TYPE=tcp PROXY_TLS_CERT_FILE= PROXY_TLS_KEY_FILE=", "",
			"tcp gateway --server", 1},
		"the URL of the API":         {"", "--server=https://agent-001.k8s.example/api/k8s/", "authority-data", 0},
		"own, and the agent's token": {"ACCESS_IDENTITY=own", gateway + " --embed-token", "access.identity own", 1},
		"an id like a number":        {"AGENT_ID=1e3 FRP_TUNNEL_SUBDOMAIN=agent-001", "", "authority-data 1e3.token", 0},
		"a gateway below the wildcard": {"", "--server=https://gateway.k8s.example",
			"https://gateway.k8s.example/api/k8s", 0},
		"a gateway with the agent's name": {"", "--server=https://agent-001.k8s.example/gateway", "/gateway/api/k8s", 0},
		"another case":                    {"", "--server=https://Agent-001.k8s.example/", "authority-data", 0},
		"a query":                         {"", gateway + "?x=1", "--server https:// host", 1},
		"an empty query":                  {"", gateway + "?", "--server https:// host", 1},
		"a fragment":                      {"", gateway + "#x", "--server https:// host", 1},
		"a user":                          {"", "--server=https://alice@gateway.example", "--server https:// host", 1},
		"no host":                         {"", "--server=https://:8443/x", "--server https:// host", 1},
		"a name alone":                    {"", "--server=gateway.example", "--server https:// host", 1},
		"a bad port":                      {"", "--server=https://gateway.example:70000", "--server port", 1},
	} {
		env := environment(t, "https://control.example")
		settings := fmt.Sprintf("FRP_TUNNEL_TYPE=https FRP_TUNNEL_SUBDOMAIN_HOST=k8s.example "+
			"PROXY_TLS_CERT_FILE=%[1]s/tls.crt PROXY_TLS_KEY_FILE=%[1]s/tls.key %[2]s", dir, test.env)
		for setting := range strings.FieldsSeq(settings) {
			name, value, _ := strings.Cut(setting, "=")
			env["PIPEOPS_"+name] = value
		}
		if what != "before the first lease" {
			obtain(t, env)
		}
		code, _, out := bootstrap(t, env, append([]string{"kubeconfig"}, strings.Fields(test.args)...)...)
		for part := range strings.FieldsSeq(test.want) {
			if code != test.code || !strings.Contains(out, part) {
				t.Errorf("%s: exit code %d, lacks %q: %s", what, code, part, out)
			}
		}
		var config parsed
		if err := yaml.Unmarshal([]byte(out), &config); test.code == 0 &&
			(err != nil || config.Clusters[0].Name == "" || strings.Count(out, "/api/k8s") != 1) {
			t.Errorf("%s: %v: %s", what, err, out)
		}
		if strings.Contains(out, "authority-data") != (test.code == 0 && !strings.Contains(out, "gateway")) {
			t.Errorf("%s: %s", what, out)
		}
	}
}

// TestKubeconfigHasTheAuthorityOfTheSecret: cert-manager puts it into ca.crt, and not at the end of tls.crt. That of
// another certificate is not taken.
func TestKubeconfigHasTheAuthorityOfTheSecret(t *testing.T) {
	dirs := [2]string{t.TempDir(), t.TempDir()}
	for _, dir := range dirs {
		if code, _, out := bootstrap(t, nil, "certificate", "--dir", dir, "agent-001.k8s.example"); code != exitOK {
			t.Fatal(out)
		}
	}
	read := func(dir, name string) []byte {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	env := environment(t, "https://control.example")
	crt := filepath.Join(dirs[0], "tls.crt")
	for name, value := range map[string]string{"FRP_TUNNEL_TYPE": "https", "FRP_TUNNEL_SUBDOMAIN_HOST": "k8s.example",
		"PROXY_TLS_CERT_FILE": crt, "PROXY_TLS_KEY_FILE": filepath.Join(dirs[0], "tls.key")} {
		env["PIPEOPS_"+name] = value
	}
	ca := read(dirs[0], "ca.crt")
	if err := os.WriteFile(crt, bytes.TrimSuffix(read(dirs[0], "tls.crt"), ca), 0o600); err != nil {
		t.Fatal(err)
	}
	key := read(dirs[0], "ca.key") // in the same file, as some tools leave it
	for _, test := range []struct{ beside, want []byte }{
		{ca, ca}, {append(key, ca...), ca}, {read(dirs[1], "ca.crt"), nil}, {key, nil},
	} {
		if err := os.WriteFile(filepath.Join(dirs[0], "ca.crt"), test.beside, 0o600); err != nil {
			t.Fatal(err)
		}
		obtain(t, env)
		_, _, out := bootstrap(t, env, "kubeconfig")
		var config parsed
		if err := yaml.Unmarshal([]byte(out), &config); err != nil || len(config.Clusters) != 1 ||
			!bytes.Equal(config.Clusters[0].Cluster.CA, test.want) {
			t.Errorf("%v: %s", err, out)
		}
	}
}

// TestKubeconfigHasTheRootOfAnyChain: whatever the order, and wherever an intermediate authority is.
func TestKubeconfigHasTheRootOfAnyChain(t *testing.T) {
	var last *x509.Certificate
	var lastKey *ecdsa.PrivateKey
	var pems []string // of root, intermediate and the agent
	for n, name := range []string{"root", "intermediate", "agent-001.k8s.example"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(int64(n)), Subject: pkix.Name{CommonName: name},
			NotAfter: time.Now().Add(time.Hour), IsCA: n < 2, BasicConstraintsValid: true, DNSNames: []string{name}}
		if last == nil {
			last, lastKey = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, last, key.Public(), lastKey)
		if err != nil {
			t.Fatal(err)
		}
		if last, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		lastKey = key
		pems = append(pems, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(lastKey)
	if err != nil {
		t.Fatal(err)
	}
	root, intermediate, agent := pems[0], pems[1], pems[2]
	for _, test := range []struct{ chain, beside, want string }{
		{agent + intermediate + root, "", root},
		{agent + root + intermediate, "", root},
		{agent + intermediate, root, root},
		{agent + intermediate, intermediate + root, root},
		{agent, root + intermediate, root},
		{agent + intermediate, "", ""},
	} {
		dir := t.TempDir()
		put(t, dir, "tls.crt", test.chain)
		put(t, dir, "ca.crt", test.beside)
		put(t, dir, "tls.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})))
		env := environment(t, "https://control.example")
		env["PIPEOPS_FRP_TUNNEL_TYPE"], env["PIPEOPS_FRP_TUNNEL_SUBDOMAIN_HOST"] = "https", "k8s.example"
		env["PIPEOPS_PROXY_TLS_CERT_FILE"] = filepath.Join(dir, "tls.crt")
		env["PIPEOPS_PROXY_TLS_KEY_FILE"] = filepath.Join(dir, "tls.key")
		obtain(t, env)
		code, _, out := bootstrap(t, env, "kubeconfig")
		var config parsed
		if err := yaml.Unmarshal([]byte(out), &config); err != nil || code != exitOK ||
			string(config.Clusters[0].Cluster.CA) != test.want {
			t.Errorf("%v: %s", err, out)
		}
	}
}

// TestKubeconfigHoldsTheTokenIfAsked: only then; the other tests see that it is not printed.
func TestKubeconfigHoldsTheTokenIfAsked(t *testing.T) {
	env := environment(t, "https://control.example")
	obtain(t, env)
	var out, errs bytes.Buffer
	code := run(t.Context(), []string{"kubeconfig", "--embed-token", "--server=https://gateway.example"}, env, &out, &errs)
	if code != exitOK || !strings.Contains(out.String(), "token: "+token) {
		t.Errorf("%d: %s%s", code, &out, &errs)
	}
}

// TestNoKeyLeavesTheHost: the file of the certificate may hold the key too, as HAProxy has it.
func TestNoKeyLeavesTheHost(t *testing.T) {
	dir := t.TempDir()
	if code, _, out := bootstrap(t, nil, "certificate", "--dir", dir, "agent-001.k8s.example.com"); code != exitOK {
		t.Fatal(out)
	}
	var pem []byte
	for _, name := range []string{"tls.key", "tls.crt"} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		pem = append(pem, data...)
	}
	both := filepath.Join(dir, "both.pem")
	if err := os.WriteFile(both, pem, 0o600); err != nil {
		t.Fatal(err)
	}
	var sent []byte
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sent, _ = io.ReadAll(r.Body)
		answer(http.StatusOK, "application/json", `{"frp_token":"f"}`)(w, r)
	}))
	t.Cleanup(server.Close)
	env := environment(t, server.URL)
	for name, value := range map[string]string{"FRP_TUNNEL_TYPE": "https", "FRP_TLS_INSECURE_SKIP_VERIFY": "true",
		"PROXY_TLS_CERT_FILE": both, "PROXY_TLS_KEY_FILE": both} {
		env["PIPEOPS_"+name] = value
	}
	if code, _, out := bootstrap(t, env, "--once"); code != exitOK {
		t.Fatal(out)
	}
	if bytes.Count(sent, []byte("BEGIN CERTIFICATE")) != 2 || bytes.Contains(sent, []byte("PRIVATE KEY")) {
		t.Errorf("the control plane gets %s", sent)
	}
}
