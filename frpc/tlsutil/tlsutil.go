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

// CertPool returns the certificates of a PEM file.
func CertPool(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no PEM certificate", file)
	}
	return pool, nil
}

// CertificateError says why a server's certificate is not accepted. Its text is the predicate of a sentence.
type CertificateError struct {
	*tls.CertificateVerificationError
}

// Explain finds out whether err is about a server's certificate. It returns nil if not.
func Explain(err error) *CertificateError {
	if cause, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return &CertificateError{cause}
	}
	return nil
}

// Nameless reports whether the certificate has neither a subject nor names, so that nobody can verify it.
func (e *CertificateError) Nameless() bool {
	c := e.UnverifiedCertificates[0]
	return c.Subject.String() == "" && len(c.DNSNames)+len(c.IPAddresses) == 0
}

func (e *CertificateError) Error() string {
	problem, _ := e.explain("", "")
	return fmt.Sprintf("presents %s (%s)", problem, DescribeCertificate(e.UnverifiedCertificates[0]))
}

// Advice says what to do. caSetting and nameSetting are the settings that may have to be corrected.
func (e *CertificateError) Advice(caSetting, nameSetting string) string {
	_, advice := e.explain(caSetting, nameSetting)
	return advice
}

func (e *CertificateError) explain(caSetting, nameSetting string) (problem, advice string) {
	var wrongName x509.HostnameError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(e.Err, new(x509.UnknownAuthorityError)):
		return "a certificate signed by an unknown authority", "set " + caSetting + " to the file of its authority"
	case errors.As(e.Err, &wrongName):
		return "a certificate for another name than " + wrongName.Host, "check " + nameSetting
	case errors.As(e.Err, &invalid) && invalid.Reason == x509.Expired:
		now := time.Now().UTC().Format(time.RFC3339)
		return "a certificate that is not valid at " + now, "renew it, or correct the clock of this host or its"
	default:
		return "a certificate that cannot be verified", "renew it, or check " + caSetting
	}
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
