// Package kubeconfig writes what a caller needs to reach the cluster through the tunnel.
package kubeconfig

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/lease"
	"github.com/pipeops/vm-agent/frpc"
)

// Access is a way to the cluster. Cluster, user and context are named after the agent's id, so that files merge.
type Access struct {
	ID     string
	Server string // URL of the Kubernetes API
	CA     []byte // PEM; nil: the system's authorities
	Who    string // comment: who may use it
	User   string // keys of the user, a line each
}

// YAML returns the kubeconfig.
func (a Access) YAML() []byte {
	var out bytes.Buffer
	fmt.Fprintf(&out, "# %s\napiVersion: v1\nkind: Config\nclusters:\n  - name: %s\n    cluster:\n      server: %q\n",
		a.Who, a.ID, a.Server)
	if a.CA != nil {
		fmt.Fprintf(&out, "      certificate-authority-data: %s\n", base64.StdEncoding.EncodeToString(a.CA))
	}
	fmt.Fprintf(&out, "users:\n  - name: %s\n    user:\n      %s\n", a.ID, strings.ReplaceAll(a.User, "\n", "\n      "))
	const contexts = "contexts:\n  - name: %[1]s\n    context: {cluster: %[1]s, user: %[1]s}\ncurrent-context: %[1]s\n"
	fmt.Fprintf(&out, contexts, a.ID)
	return out.Bytes()
}

// Write writes the kubeconfig for callers of the configured agent: at server, which is the agent's own address at frps
// or a gateway's for the agent, without the path of the Kubernetes API; if it is empty, at the agent's own name, port
// 443. The agent's token is in it only if embed is set; else the user's token comes from a file beside the kubeconfig.
func Write(w io.Writer, cfg *config.Config, server string, embed bool) error {
	a := Access{ID: cfg.Agent.ID}
	tunnel := cfg.FRP.Tunnel
	if granted, err := lease.Read(cfg.RunDir); err == nil {
		tunnel = granted.Frpc.Tunnel
	}
	if server == "" {
		server = "https://" + tunnel.Subdomain + "." + tunnel.SubdomainHost
		switch {
		case len(tunnel.CustomDomains) > 0:
			server = "https://" + tunnel.CustomDomains[0]
		case tunnel.SubdomainHost == "":
			return fmt.Errorf("the name of the agent at frps is not known: set %s or give --server",
				config.Name("frp.tunnel.subdomain_host"))
		}
	}
	address, err := url.Parse(server)
	if err != nil || address.Scheme != "https" || address.Host == "" {
		return errors.New("--server is not an https URL: kubectl sends no token in clear")
	}
	a.Server = strings.TrimSuffix(server, "/") + "/api/k8s"
	direct := false // else a gateway is between caller and agent
	if tunnel.Type == "https" {
		file := cmp.Or(cfg.Proxy.CertFile, filepath.Join(cfg.RunDir, frpc.CertFile))
		if a.CA, direct, err = authority(file, address.Hostname()); err != nil {
			return fmt.Errorf("%w: run this where the agent runs, after its first lease", err)
		}
	}
	identity, clients := cfg.Access.Identity, cfg.Proxy.ClientCAFile != ""
	if direct && (identity == "named" || identity == "own" && !clients) {
		return fmt.Errorf("with %s %s, callers need a gateway in front of the agent: give its URL for the agent by "+
			"--server", config.Name("access.identity"), identity)
	}
	a.Who = map[string]string{
		"agent": "For all who may act as the agent's ServiceAccount: the token is the agent's.",
		"named": "For a user of the gateway: the token is the one that the gateway knows them by.",
		"own":   "For a user of the cluster: the token is their own for it, or use exec with a credential plugin.",
	}[identity]
	a.User = "tokenFile: " + a.ID + ".token"
	if embed && identity == "agent" {
		token, err := cfg.Agent.CurrentToken()
		if err != nil {
			return err
		}
		a.User = fmt.Sprintf("token: %q", token.Reveal())
	}
	if direct && clients {
		a.User = "client-certificate: " + a.ID + ".crt\nclient-key: " + a.ID + ".key\n" + a.User
	}
	_, _ = w.Write(a.YAML())
	return nil
}

// authority returns the authority of the agent's certificate, if that is its own and not one that callers trust anyway,
// and whether the certificate is for host.
func authority(file, host string) (ca []byte, valid bool, err error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, false, err
	}
	var der []byte
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		der = append(der, block.Bytes...)
	}
	chain, err := x509.ParseCertificates(der)
	switch {
	case err != nil:
		return nil, false, fmt.Errorf("%s: %w", file, err)
	case len(chain) == 0:
		return nil, false, fmt.Errorf("%s holds no certificate", file)
	case chain[0].VerifyHostname(host) != nil:
		return nil, false, nil
	}
	if last := chain[len(chain)-1]; bytes.Equal(last.RawIssuer, last.RawSubject) {
		ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: last.Raw})
	}
	return ca, true, nil
}
