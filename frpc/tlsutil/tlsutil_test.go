package tlsutil

import (
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestFileWithoutCertificatesIsReported(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ca.pem")
	if _, err := CertPool(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	for _, content := range []string{"", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if pool, err := CertPool(file); err == nil || !pool.Equal(x509.NewCertPool()) { // no pool would be the system's
			t.Errorf("%q: %v", content, err)
		}
	}
}
