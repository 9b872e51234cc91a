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
	advice := ""
	switch failed.Stage {
	case frpc.StageFiles:
		advice = "check " + Name("frp.tls.ca_file") + ", " + files
	case frpc.StageDial:
		advice = "check " + Name("frp.server_addr") + " and " + Name("frp.server_port") +
			", and that the network allows TCP connections to it"
	case frpc.StageProxyDial:
		advice = "check " + Name("frp.proxy_url")
	case frpc.StageProxyConnect:
		advice = "check " + Name("frp.proxy_url") + ", and what the proxy allows"
	case frpc.StageWebSocket:
		advice = port + ", and what stands between"
	case frpc.StageTLS:
		advice = port + " and that it runs; if frps asks for a client certificate, check " + files
		if rejected := (*tlsutil.CertificateError)(nil); errors.As(err, &rejected) {
			advice = rejected.Advice(Name("frp.tls.ca_file"), Name("frp.tls.server_name"))
		}
	case frpc.StageOwnCertificate:
		advice = "give it one (transport.tls.certFile and keyFile in frps.toml) and set " + Name("frp.tls.ca_file") +
			" to its authority, or accept any with " + Name("frp.tls.insecure_skip_verify")
	case frpc.StageAnswer:
		advice = port
	case frpc.StageAccept:
		advice = "check " + Name("frp.token")
		if f.Token == "" {
			advice = "restart the pod to get a new lease from the control plane"
		}
	}
	return fmt.Errorf("%w: %s", err, advice)
}
