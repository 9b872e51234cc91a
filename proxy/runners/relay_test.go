package runners

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/pipeops/vm-agent/bootstrap/config"
)

// allowing returns runners whose endpoints may name the hosts.
func allowing(hosts ...string) *Runners {
	cfg := &config.Config{}
	cfg.Runners.AllowedHosts = hosts
	return New(nil, cfg, nil, nil)
}

// TestInternalAddressesAreNotDialled: an allowed name may resolve to one.
func TestInternalAddressesAreNotDialled(t *testing.T) {
	r := allowing("*.svc", "127.0.0.2", "fd00:ec2::254")
	for address, allowed := range map[string]bool{
		"127.0.0.1:80": false, "127.0.0.2:80": true,
		"[::1]:80": false, "[::ffff:127.0.0.1]:80": false, "[::ffff:127.0.0.2]:80": true,
		"169.254.169.254:80": false, "[fe80::1%25lo]:80": false, "0.0.0.0:80": false, "[::]:80": false, "224.0.0.1:80": false,
		"100.100.100.200:80": false, "[::ffff:100.100.100.200]:80": false, "[fd00:ec2::254]:80": true,
		"10.96.0.10:80": true, "[fd00::1]:80": true, "name.svc:80": false,
	} {
		if err := r.checkAddress(t.Context(), "tcp", address, nil); (err == nil) != allowed {
			t.Errorf("%s: %v", address, err)
		}
	}
	// The dialer checks addresses, and its error is returned.
	runner := httptest.NewServer(http.NotFoundHandler())
	defer runner.Close()
	req := httptest.NewRequest(http.MethodGet, runner.URL, nil)
	req.RequestURI = ""
	if _, err := r.Transport.RoundTrip(req); !errors.Is(err, errForbiddenAddress) {
		t.Errorf("dialled: %v", err)
	}
}

// TestOnlyAllowedEndpointsAreAccepted: and none that the dialer could take for another host.
func TestOnlyAllowedEndpointsAreAccepted(t *testing.T) {
	r := allowing("*.svc", "runner", "10.1.2.3", "::1", "*.3")
	for endpoint, want := range map[string]bool{
		"http://r.a.svc/":            true,
		"https://R.A.SVC.:65535/x?y": true,
		"http://r_1.2.svc/":          true,
		"http://runner":              true,
		"http://10.1.2.3:80/":        true,
		"http://[::ffff:10.1.2.3]/":  true,
		"http://[0:0::1]/":           true,

		"http://[::ffff:127.0.0.1%25.svc]:80/x":       false,
		"http://[fe80::1%25.svc]/":                    false,
		"http://[::1%25eth0]/":                        false,
		"http://[::2]/":                               false,
		"http://[127.0.0.1.svc]/":                     false,
		"http://10.1.3.3/":                            false,
		"http://10.1.2.3./":                           false,
		"http://10.1.2.03/":                           false,
		"http://10.66051/":                            false,
		"http://0x7f.1/":                              false,
		"http://0x7f.1.3/":                            false,
		"http://a%25.svc/":                            false,
		"http://a%00.svc/":                            false,
		"http://a b.svc/":                             false,
		"http://ä.svc/":                               false,
		"http://evil.com／.svc/":                       false,
		"http://..svc/":                               false,
		"http://a..svc/":                              false,
		"http://.svc/":                                false,
		"http://svc/":                                 false,
		"http://r.a.svc../":                           false,
		"http://xrunner/":                             false,
		"http://a.runner/":                            false,
		"http://r.a.svc:99999/":                       false,
		"http://r.a.svc:0/":                           false,
		"http://@r.a.svc/":                            false,
		"http://evil@r.a.svc/":                        false,
		"http:r.a.svc":                                false,
		"//r.a.svc/":                                  false,
		"http://r.a.svc/#x":                           false,
		"http://r.a.svc/" + strings.Repeat("a", 2048): false,
	} {
		if u, err := r.checkEndpoint(endpoint); (err == nil) != want || (u == nil) == want {
			t.Errorf("%.60s: %v", endpoint, err)
		}
	}
}
