// Package kubeconfig writes what a caller needs to reach the cluster through the tunnel.
package kubeconfig

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/lease"
)

// Access is a way to the cluster. Cluster, user and context are named after the agent's id, so that files merge.
type Access struct {
	ID     string
	Server string            // URL of the Kubernetes API
	CA     []byte            // PEM; nil: the system's authorities
	Who    string            // comment: who may use it
	User   map[string]string // its keys
}

// YAML returns the kubeconfig.
func (a Access) YAML() []byte {
	type object map[string]any
	cluster := object{"server": a.Server}
	if a.CA != nil {
		cluster["certificate-authority-data"] = a.CA
	}
	data, _ := yaml.Marshal(object{ // cannot fail: strings only
		"apiVersion": "v1", "kind": "Config", "current-context": a.ID,
		"clusters": []object{{"name": a.ID, "cluster": cluster}},
		"users":    []object{{"name": a.ID, "user": a.User}},
		"contexts": []object{{"name": a.ID, "context": object{"cluster": a.ID, "user": a.ID}}},
	})
	return append([]byte("# "+a.Who+"\n"), data...)
}

// Write writes the kubeconfig for callers of the configured agent: at server, which is the agent's own address at frps
// or a gateway's for the agent; if it is empty, at the agent's own name, port 443. The agent's token is in it only if
// embed is set; else the user's token comes from a file beside the kubeconfig.
func Write(w io.Writer, cfg *config.Config, server string, embed bool) error {
	granted, err := lease.Read(cfg.RunDir)
	if err != nil {
		return fmt.Errorf("%w: run this where the agent runs, after its first lease", err)
	}
	tunnel, identity, clients := granted.Frpc.Tunnel, cfg.Access.Identity, cfg.Proxy.ClientCAFile != ""
	const gateway = "callers need a gateway in front of the agent: give its URL for the agent by --server"
	name, as := cmp.Or(tunnel.Names()...), config.Name("access.identity")+" "+identity
	switch {
	case embed && identity != "agent":
		return fmt.Errorf("--embed-token: with %s, callers have tokens of their own", as)
	case server == "" && tunnel.Type != "https":
		return fmt.Errorf("a tunnel of type %s has no TLS: %s", tunnel.Type, gateway)
	case server == "" && name == "":
		return fmt.Errorf("the name at frps is unknown: set %s or give --server", config.Name("frp.tunnel.subdomain_host"))
	}
	server = strings.TrimSuffix(strings.TrimSuffix(cmp.Or(server, "https://"+name), "/"), agentapi.KubernetesPrefix)
	address, err := config.ParseURL(server)
	switch {
	case err != nil:
		return fmt.Errorf("--server %w", err)
	case address.Scheme != "https":
		return errors.New("--server is not an https URL: kubectl sends no token in clear")
	}
	a := Access{ID: cfg.Agent.ID, Server: server + agentapi.KubernetesPrefix}
	known := func(name string) bool { return strings.EqualFold(name, address.Hostname()) }
	// Else a gateway is between caller and agent.
	direct := tunnel.Type == "https" && address.Path == "" && slices.ContainsFunc(tunnel.Names(), known)
	if direct {
		beside, _ := os.ReadFile(filepath.Join(filepath.Dir(cfg.Proxy.CertFile), "ca.crt"))
		if a.CA, err = authority(append(granted.Certificate, beside...), address.Hostname()); err != nil {
			return fmt.Errorf("the agent's certificate: %w: make one for the name that callers use", err)
		}
	}
	if direct && (identity == "named" || identity == "own" && !clients) {
		return fmt.Errorf("with %s, %s", as, gateway)
	}
	a.Who = map[string]string{
		"agent": "For all who may do what the agent may: the token is the agent's.",
		"named": "For a user of the gateway: the token is the one that the gateway knows them by.",
		"own": "For a user of the cluster: the token is their own for it. In place of tokenFile, a credential plugin:\n" +
			"# exec: {apiVersion: client.authentication.k8s.io/v1, command: NAME, args: [], interactiveMode: IfAvailable}",
	}[identity]
	if direct && cfg.Proxy.CertFile == "" {
		a.Who += "\n# Until bootstrap makes the next certificate: to last, set " + config.Name("proxy.tls.cert_file")
	}
	a.User = map[string]string{"tokenFile": a.ID + ".token"}
	if embed {
		a.User = map[string]string{"token": cfg.Agent.Token.Reveal()}
	}
	if direct && clients {
		a.User["client-certificate"], a.User["client-key"] = a.ID+".crt", a.ID+".key"
	}
	_, err = w.Write(a.YAML())
	return err
}

// authority returns the authority of the first certificate, PEM, if it is among the others: at the end of the chain, or
// in the file where cert-manager puts it. Else it is one that callers trust anyway. The certificate must be for name.
func authority(certificates []byte, name string) ([]byte, error) {
	var shown *x509.Certificate
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for block, rest := pem.Decode(certificates); block != nil; block, rest = pem.Decode(rest) {
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil { // of ca.crt: what is not a certificate there is none of ours
			continue
		}
		shown = cmp.Or(shown, certificate)
		if bytes.Equal(certificate.RawIssuer, certificate.RawSubject) {
			roots.AddCert(certificate)
		} else {
			between.AddCert(certificate)
		}
	}
	chains, err := shown.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, Intermediates: between})
	if _, public := errors.AsType[x509.UnknownAuthorityError](err); public {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	root := chains[0][len(chains[0])-1]
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}), nil
}
