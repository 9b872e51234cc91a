package lease

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc"
)

// A certificate outlives the lease that it was made for by grace, and fits leases that end within tolerance.
const grace, tolerance = 330 * time.Second, 270 * time.Second

// newCertificate makes what the proxy shows to callers of a tunnel of type https, PEM, for a lease that expires at end;
// zero: never. For a lease it is self-signed (no issuer), and the first name is the agent's id: the control plane gets
// it with the request for the lease, and trusts no other. The key never leaves the run directory.
func newCertificate(names []string, end time.Time, issuer *tls.Certificate) (certificate, key []byte) {
	notAfter := end.Add(grace)
	if end.IsZero() {
		notAfter = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) // never, by RFC 5280, 4.1.2.5
	}
	return newPair(&x509.Certificate{
		Subject: pkix.Name{CommonName: names[0]}, DNSNames: names, NotAfter: notAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, issuer)
}

// newPair makes a key and its certificate, PEM, signed by issuer; nil: by itself. The certificate is not valid PEM if
// the issuer's key cannot sign; nothing else can fail.
func newPair(template *x509.Certificate, issuer *tls.Certificate) (certificate, key []byte) {
	private, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	template.NotBefore = time.Now().Add(-24 * time.Hour) // clocks differ
	parent, signer := template, crypto.PrivateKey(private)
	if issuer != nil {
		parent, signer = issuer.Leaf, issuer.PrivateKey
	}
	der, _ := x509.CreateCertificate(rand.Reader, template, parent, private.Public(), signer)
	keyDER, _ := x509.MarshalPKCS8PrivateKey(private)
	certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return certificate, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

// MakeCertificate makes files for proxy.tls.cert_file and proxy.tls.key_file in dir: tls.crt, a certificate for names
// with that of its authority, and tls.key. The authority is ca.crt, which callers trust, and ca.key, which only the
// next certificate needs. It is made if both are missing. No file is overwritten, and an error leaves none behind.
func MakeCertificate(dir string, names []string) error {
	invalid := func(name string) bool {
		return !config.IsHost(strings.TrimPrefix(name, "*.")) || net.ParseIP(name) != nil
	}
	if len(names) == 0 || slices.ContainsFunc(names, invalid) {
		return fmt.Errorf("give DNS names, not %q: those by which callers reach the agent", names)
	}
	type file struct {
		name, existing string // what to do if it exists
		data           []byte
	}
	var files []file // in the order in which they are created
	in := func(name string) string { return filepath.Join(dir, name) }
	end := time.Now().AddDate(10, 0, 0)
	authority, err := tls.LoadX509KeyPair(in("ca.crt"), in("ca.key"))
	if errors.Is(err, fs.ErrNotExist) {
		crt, key := newPair(&x509.Certificate{
			Subject: pkix.Name{CommonName: "authority of " + names[0]}, NotAfter: end,
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}, nil)
		const missing = "put %s back beside it, because callers trust it, or choose another --dir for a new authority"
		files = []file{{"ca.key", fmt.Sprintf(missing, "ca.crt"), key}, {"ca.crt", fmt.Sprintf(missing, "ca.key"), crt}}
		authority, err = tls.X509KeyPair(crt, key)
	}
	if err == nil {
		if last := authority.Leaf.NotAfter.Add(-grace); last.Before(end) {
			end = last
		}
		crt, key := newCertificate(names, end, &authority)
		crt = append(crt, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: authority.Certificate[0]})...)
		const exists = "move it away, with its pair, or choose another --dir"
		files = append(files, file{"tls.key", exists, key}, file{"tls.crt", exists, crt})
		roots := x509.NewCertPool()
		roots.AddCert(authority.Leaf)
		var made tls.Certificate
		if made, err = tls.X509KeyPair(crt, key); err == nil {
			_, err = made.Leaf.Verify(x509.VerifyOptions{Roots: roots})
		}
	}
	if err != nil {
		return fmt.Errorf("the authority, %s with %s, cannot be used: %w", in("ca.crt"), in("ca.key"), err)
	}
	for i, f := range files {
		err := frpc.CreateFile(in(f.name), f.data)
		if errors.Is(err, fs.ErrExist) {
			err = fmt.Errorf("%w: %s", err, f.existing)
		}
		if err != nil {
			for _, earlier := range files[:i] {
				_ = os.Remove(in(earlier.name))
			}
			return err
		}
	}
	return nil
}

// Configured returns the certificate that the operator has configured, PEM; nil if there is none. The problem is why it
// cannot be used, and is then nil too, or why callers refuse it now or soon.
func Configured(cfg *config.Config) (certificate, key []byte, problem string) {
	if cfg.Proxy.CertFile == "" {
		return nil, nil, ""
	}
	name, names := config.Name("proxy.tls.cert_file"), cfg.FRP.Tunnel.Names()
	file, certErr := os.ReadFile(cfg.Proxy.CertFile)
	key, keyErr := os.ReadFile(cfg.Proxy.KeyFile)
	pair, pairErr := tls.X509KeyPair(file, key)
	if err := cmp.Or(certErr, keyErr, pairErr); err != nil {
		return nil, nil, fmt.Sprintf("%s and its key cannot be used: %v", name, err)
	}
	for _, der := range pair.Certificate { // nothing else of the file, which may hold the key too
		certificate = append(certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	const day = 24 * time.Hour
	switch left := time.Until(pair.Leaf.NotAfter); {
	case left < 0:
		problem = fmt.Sprintf("%s: the certificate expired %d days ago: renew it", name, -left/day)
	case left < 14*day:
		problem = fmt.Sprintf("%s: the certificate expires in %d days: renew it", name, left/day)
	case slices.ContainsFunc(names, func(n string) bool { return pair.Leaf.VerifyHostname(n) != nil }):
		problem = fmt.Sprintf("%s: the certificate is not for %s: callers refuse it", name, strings.Join(names, ", "))
	}
	return certificate, key, problem
}

// certificateNames returns the names that callers may ask for: the agent's id and the tunnel's domains.
func certificateNames(agentID string, tunnel frpc.Tunnel) []string {
	names := append([]string{agentID, tunnel.Subdomain}, tunnel.Names()...)
	return slices.Compact(slices.DeleteFunc(names, func(name string) bool { return name == "" }))
}

// sameEnd reports whether a certificate for a lease that expires at end is as good for one that expires at other.
func sameEnd(end, other time.Time) bool {
	return end.Equal(other) || !end.IsZero() && !other.IsZero() && end.Sub(other).Abs() <= tolerance
}
