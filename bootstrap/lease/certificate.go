package lease

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc"
)

// A certificate outlives the lease that it was made for by grace, and fits leases that end within tolerance.
const grace, tolerance = 330 * time.Second, 270 * time.Second

// newCertificate makes what the proxy shows to callers of a tunnel of type https, PEM, for a lease that expires at end;
// zero: never. The first name is the agent's id. The certificate is self-signed: the control plane gets it with the
// request for the lease, and trusts no other. The key never leaves the run directory.
func newCertificate(names []string, end time.Time) (certificate, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	notAfter := end.Add(grace)
	if end.IsZero() {
		notAfter = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) // never, by RFC 5280, 4.1.2.5
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: notAfter, // clocks differ
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return certificate, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), err
}

// configured returns the certificate that the operator has configured, PEM; nil if there is none.
func configured(cfg *config.Config) (certificate, key []byte, err error) {
	if cfg.Proxy.CertFile == "" {
		return nil, nil, nil
	}
	if certificate, err = os.ReadFile(cfg.Proxy.CertFile); err == nil {
		key, err = os.ReadFile(cfg.Proxy.KeyFile)
	}
	if err == nil {
		_, err = tls.X509KeyPair(certificate, key)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%s and its key cannot be used: %w", config.Name("proxy.tls.cert_file"), err)
	}
	return certificate, key, nil
}

// certificateNames returns the names that callers may ask for: the agent's id and the tunnel's domains.
func certificateNames(agentID string, tunnel frpc.Tunnel) []string {
	names := append([]string{agentID, tunnel.Subdomain}, tunnel.CustomDomains...)
	if tunnel.Subdomain != "" && tunnel.SubdomainHost != "" {
		names = append(names, tunnel.Subdomain+"."+tunnel.SubdomainHost)
	}
	return slices.Compact(slices.DeleteFunc(names, func(name string) bool { return name == "" }))
}

// sameEnd reports whether a certificate for a lease that expires at end is as good for one that expires at other.
func sameEnd(end, other time.Time) bool {
	return end.Equal(other) || !end.IsZero() && !other.IsZero() && end.Sub(other).Abs() <= tolerance
}
