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

// CertPool reads the PEM certificates of a file.
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

// Explain says what is wrong with a server's certificate and which one it presented; nil if err is about
// something else. caSetting and nameSetting are the settings that may have to be corrected.
func Explain(err error, caSetting, nameSetting string) error {
	var failed *tls.CertificateVerificationError
	if !errors.As(err, &failed) {
		return nil
	}
	var unknownCA x509.UnknownAuthorityError
	var wrongName x509.HostnameError
	var invalid x509.CertificateInvalidError
	problem, next := "a certificate that cannot be verified", "renew it, or check "+caSetting
	switch {
	case errors.As(err, &unknownCA):
		problem, next = "a certificate that nobody known has signed", "set "+caSetting+" to the file of its authority"
	case errors.As(err, &wrongName):
		problem, next = "a certificate for another name than "+wrongName.Host, "check "+nameSetting
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		problem, next = "a certificate that is not valid at "+time.Now().UTC().Format(time.RFC3339), "renew it, or correct the clock of this host or its"
	}
	return fmt.Errorf("presents %s (%s): %s", problem, DescribeCertificate(failed.UnverifiedCertificates[0]), next)
}

// DescribeCertificate is what a person needs to recognize a certificate.
func DescribeCertificate(c *x509.Certificate) string {
	names := append([]string{}, c.DNSNames...)
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	return fmt.Sprintf("subject %.100q for %.200s, issued by %.100q, valid from %s to %s", c.Subject, strings.Join(names, ", "), c.Issuer,
		c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339))
}
