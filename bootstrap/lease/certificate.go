package lease

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"slices"
	"time"

	"github.com/pipeops/vm-agent/frpc"
)

// A certificate outlives the lease that it was made for by grace, and fits leases that end up to tolerance earlier or
// later.
const grace, tolerance = 330 * time.Second, 270 * time.Second

// certificate is what the proxy shows to callers of a tunnel of type https. It is self-signed: the control plane gets
// it with the request for the lease, and trusts no other. The key never leaves the run directory.
type certificate struct {
	cert, key []byte // PEM
	names     []string
	end       time.Time // of the lease that it was made for; zero: that never expires
}

// newCertificate makes the certificate for a lease that expires at end; zero: never.
func newCertificate(agentID string, tunnel frpc.Tunnel, end time.Time) (*certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	notAfter := end.Add(grace)
	if end.IsZero() {
		notAfter = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) // never, by RFC 5280, 4.1.2.5
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: agentID}, DNSNames: certificateNames(agentID, tunnel),
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: notAfter, // clocks differ
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return &certificate{
		names: template.DNSNames, end: end,
		cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		key:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
	}, nil
}

// certificateNames returns the names that callers may ask for.
func certificateNames(agentID string, tunnel frpc.Tunnel) []string {
	names := []string{agentID}
	if tunnel.Subdomain != "" && tunnel.Subdomain != agentID {
		names = append(names, tunnel.Subdomain)
	}
	return append(names, tunnel.CustomDomains...)
}

// fits reports whether the certificate has the names of the tunnel and expires at about end.
func (c *certificate) fits(agentID string, tunnel frpc.Tunnel, end time.Time) bool {
	return slices.Equal(c.names, certificateNames(agentID, tunnel)) &&
		(c.end.Equal(end) || !c.end.IsZero() && !end.IsZero() && c.end.Sub(end).Abs() <= tolerance)
}
