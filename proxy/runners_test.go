package main

import (
	"strings"
	"testing"
)

// TestAllowedEndpoints: only hosts of the list, and nothing that the dialer could take for another host.
func TestAllowedEndpoints(t *testing.T) {
	r := &runners{allowed: []string{"*.svc", "runner", "10.1.2.3", "::1", "*.3"}}
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
		if u, err := r.allow(endpoint); (err == nil) != want || (u == nil) == want {
			t.Errorf("%.60s: %v", endpoint, err)
		}
	}
}
