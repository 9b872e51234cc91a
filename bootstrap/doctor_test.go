package main

import (
	"context"
	"crypto/tls"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/frpc"
)

// TestDoctorSpeaksAsTheTunnelDoes: where the tunnel is of type https, the proxy's tunnel listener answers nobody who
// does not speak TLS, and doctor trusts the tunnel's certificate alone.
func TestDoctorSpeaksAsTheTunnelDoes(t *testing.T) {
	proxy := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body := map[string]string{"/version": `{"version":"v1"}`, "/ready": `{"checks":{"kubernetes":{"ok":true}}}`}[r.URL.Path]
		if strings.HasSuffix(r.URL.Path, "/selfsubjectaccessreviews") && r.Header.Get("Authorization") == "Bearer "+token {
			body = `{"status":{"allowed":true}}`
		}
		_, _ = io.WriteString(w, body)
	})
	operations := httptest.NewServer(proxy)
	defer operations.Close()
	k := newRenewer(t, func(context.Context, []byte) (authAnswer, *failure) {
		return authAnswer{FRPToken: "f", Tunnel: frpc.Tunnel{Type: "https"}}, nil
	})
	pair, err := tls.X509KeyPair(k.lease.Certificate, k.lease.Key)
	if err != nil {
		t.Fatal(err)
	}
	other, err := newCertificate("agent-001", frpc.Tunnel{}, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	otherPair, err := tls.X509KeyPair(other.cert, other.key)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		certificate *tls.Certificate // nil: no TLS
		proxy       string           // what doctor says of the step
		permissions string
	}{
		"the tunnel's certificate": {&pair, "version v1 serves", "may list pods, list nodes, keep runners"},
		"another certificate":      {&otherPair, "does not speak TLS with the tunnel's certificate", "the proxy and the API server come first"},
		"no TLS":                   {nil, "does not speak TLS with the tunnel's certificate", "the proxy and the API server come first"},
	} {
		t.Run(name, func(t *testing.T) {
			tunnel := httptest.NewUnstartedServer(proxy)
			tunnel.Config.ErrorLog = log.New(io.Discard, "", 0)
			if test.certificate == nil {
				tunnel.Start()
			} else {
				tunnel.TLS = &tls.Config{Certificates: []tls.Certificate{*test.certificate}, MinVersion: tls.VersionTLS12}
				tunnel.StartTLS()
			}
			defer tunnel.Close()
			k.cfg.Proxy.ListenAddr, k.cfg.Proxy.MetricsAddr = tunnel.Listener.Addr().String(), operations.Listener.Addr().String()
			p := &patient{cfg: k.cfg}
			said := func(take func(context.Context) (string, error)) string {
				detail, err := take(t.Context())
				if err != nil {
					detail = err.Error()
				}
				return detail
			}
			if got := said(p.proxy); !strings.Contains(got, test.proxy) {
				t.Errorf("proxy: %s", got)
			}
			if got := said(p.permissions); got != test.permissions {
				t.Errorf("permissions: %s", got)
			}
		})
	}
}
