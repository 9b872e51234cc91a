// Package tlsutil reads certificate pools, and explains certificates and what is wrong with them.
package tlsutil

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
)

// CertPool returns the certificates of a PEM file. With an error, the pool is empty.
func CertPool(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) && err == nil {
		err = fmt.Errorf("%s holds no PEM certificate", file)
	}
	return pool, err
}

// CertificateError says why a server's certificate is not accepted, and what to do. Its text is the predicate of a
// sentence.
type CertificateError struct {
	error

	cause *tls.CertificateVerificationError
}

// Explain returns what is wrong with a server's certificate, nil if err is about something else. ca and name are the
// settings for the authorities and for the server's name.
func Explain(err error, ca, name string) *CertificateError {
	e := &CertificateError{}
	if !errors.As(err, &e.cause) {
		return nil
	}
	problem, advice := "a certificate that cannot be verified", "renew it, or check "+ca
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		problem, advice = "a certificate signed by an unknown authority", "set "+ca+" to the file of its authority"
	} else if wrong, ok := errors.AsType[x509.HostnameError](err); ok {
		problem, advice = "a certificate for another name than "+wrong.Host, "check "+name
	} else if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		problem = "a certificate that is not valid at " + time.Now().UTC().Format(time.RFC3339)
		advice = "renew it, or correct the clock of this host or its"
	}
	e.error = fmt.Errorf("presents %s (%s): %s", problem, DescribeCertificate(e.cause.UnverifiedCertificates[0]), advice)
	return e
}

func (e *CertificateError) Unwrap() error { return e.cause }

// Nameless reports whether the certificate has neither a subject nor names, so that nobody can verify it.
func (e *CertificateError) Nameless() bool {
	c := e.cause.UnverifiedCertificates[0]
	return c.Subject.String() == "" && len(c.DNSNames)+len(c.IPAddresses) == 0
}

// DescribeCertificate returns what a person needs to recognize a certificate.
func DescribeCertificate(c *x509.Certificate) string {
	names := append([]string{}, c.DNSNames...)
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	return fmt.Sprintf("subject %.100q for %.200s, issued by %.100q, valid from %s to %s",
		c.Subject, strings.Join(names, ", "), c.Issuer,
		c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339))
}
