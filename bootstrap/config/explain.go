package config

import (
	"errors"
	"fmt"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/tlsutil"
)

// ExplainLogin adds to an error of frpc.Login what to do, with the settings to check. Other errors, and nil, stay.
func (f FRP) ExplainLogin(err error) error {
	var failed *frpc.LoginError
	if !errors.As(err, &failed) {
		return err
	}
	port := "check that " + Name("frp.server_port") + " is frps's bindPort"
	files := Name("frp.tls.cert_file") + " and " + Name("frp.tls.key_file")
	advice := map[frpc.Stage]string{
		frpc.StageFiles: "check " + Name("frp.tls.ca_file") + ", " + files,
		frpc.StageDial: "check " + Name("frp.server_addr") + " and " + Name("frp.server_port") +
			", and that the network allows TCP connections to it",
		frpc.StageProxyDial:    "check " + Name("frp.proxy_url"),
		frpc.StageProxyConnect: "check " + Name("frp.proxy_url") + ", and what the proxy allows",
		frpc.StageWebSocket:    port + ", and what stands between",
		frpc.StageTLS:          port + " and that it runs; if frps asks for a client certificate, check " + files,
		frpc.StageOwnCertificate: "give it one (transport.tls.certFile and keyFile in frps.toml) and set " +
			Name("frp.tls.ca_file") + " to its authority, or accept any with " + Name("frp.tls.insecure_skip_verify"),
		frpc.StageAnswer: port,
		frpc.StageAccept: "restart the pod to get a new lease from the control plane",
	}[failed.Stage]
	var rejected *tlsutil.CertificateError
	switch {
	case errors.As(err, &rejected):
		advice = rejected.Advice(Name("frp.tls.ca_file"), Name("frp.tls.server_name"))
	case failed.Stage == frpc.StageAccept && f.Token != "": // the operator's own frps
		advice = "check " + Name("frp.token")
	}
	return fmt.Errorf("%w: %s", err, advice)
}
