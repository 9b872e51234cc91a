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
	cause           *tls.CertificateVerificationError
	problem, advice string // advice has {ca} and {name} for settings
}

// Explain returns what is wrong with a server's certificate, nil if err is about something else.
func Explain(err error) *CertificateError {
	e := &CertificateError{problem: "a certificate that cannot be verified", advice: "renew it, or check {ca}"}
	if !errors.As(err, &e.cause) {
		return nil
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		e.problem, e.advice = "a certificate signed by an unknown authority", "set {ca} to the file of its authority"
	} else if wrong, ok := errors.AsType[x509.HostnameError](err); ok {
		e.problem, e.advice = "a certificate for another name than "+wrong.Host, "check {name}"
	} else if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		e.problem = "a certificate that is not valid at " + time.Now().UTC().Format(time.RFC3339)
		e.advice = "renew it, or correct the clock of this host or its"
	}
	return e
}

func (e *CertificateError) Error() string {
	return fmt.Sprintf("presents %s (%s)", e.problem, DescribeCertificate(e.cause.UnverifiedCertificates[0]))
}

func (e *CertificateError) Unwrap() error { return e.cause }

// Nameless reports whether the certificate has neither a subject nor names, so that nobody can verify it.
func (e *CertificateError) Nameless() bool {
	c := e.cause.UnverifiedCertificates[0]
	return c.Subject.String() == "" && len(c.DNSNames)+len(c.IPAddresses) == 0
}

// Advice says what to do. ca and name are the settings for the authorities and for the server's name.
func (e *CertificateError) Advice(ca, name string) string {
	return strings.NewReplacer("{ca}", ca, "{name}", name).Replace(e.advice)
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
