// Package kubeconfig writes what a caller needs to reach the cluster through the tunnel.
package kubeconfig

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
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
	address, err := url.Parse(server)
	if err != nil || address.Scheme != "https" || address.Host == "" {
		return errors.New("--server is not an https URL: kubectl sends no token in clear")
	}
	a := Access{ID: cfg.Agent.ID, Server: server + agentapi.KubernetesPrefix}
	direct := false // else a gateway is between caller and agent
	if tunnel.Type == "https" {
		shown, err := tls.X509KeyPair(granted.Certificate, granted.Key)
		if err == nil {
			err = shown.Leaf.VerifyHostname(address.Hostname())
		}
		if direct = err == nil; direct {
			beside, _ := os.ReadFile(filepath.Join(filepath.Dir(cfg.Proxy.CertFile), "ca.crt"))
			a.CA = authority(shown, beside)
		} else if address.Hostname() == name {
			return fmt.Errorf("the agent's certificate: %w: make one for the name that callers use", err)
		}
	}
	if direct && (identity == "named" || identity == "own" && !clients) {
		return fmt.Errorf("with %s, %s", as, gateway)
	}
	a.Who = map[string]string{
		"agent": "For all who may act as the agent's ServiceAccount: the token is the agent's.",
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

// authority returns the authority of the agent's certificate, PEM, if that is its own and not one that callers trust
// anyway: the end of the chain, or what is beside, where cert-manager puts it.
func authority(shown tls.Certificate, beside []byte) []byte {
	if block, _ := pem.Decode(beside); block != nil {
		shown.Certificate = append(shown.Certificate, block.Bytes)
	}
	last := shown.Leaf
	for _, der := range shown.Certificate[1:] {
		if next, err := x509.ParseCertificate(der); err == nil && last.CheckSignatureFrom(next) == nil {
			last = next
		}
	}
	if !bytes.Equal(last.RawIssuer, last.RawSubject) {
		return nil
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: last.Raw})
}
