package config

import (
	"net"
	"os"
	"strconv"
	"strings"
)

// complete sets the values that follow from other settings, and checks settings against each other.
func (l *loader) complete() {
	c := l.config
	if c.Agent.ID == "" && !l.told["agent.id"] {
		l.mistake("agent.id", "required: the id that the control plane gave this agent")
	}
	l.secret("agent.token")
	if c.Agent.Token == "" && c.Agent.TokenFile == "" && !l.told["agent.token"] && !l.told["agent.token_file"] {
		l.mistake("agent.token",
			"required: the token that the control plane gave this agent, here or in the file that %s names",
			Name("agent.token_file"))
	}
	l.secret("frp.token")
	l.secret("frp.proxy_url")
	l.derive("agent.name", c.Agent.ID, "agent.id")
	l.derive("agent.cluster_name", c.Agent.ID, "agent.id")
	host, err := os.Hostname()
	if err != nil && c.Agent.Instance == "" {
		l.mistake("agent.instance", "the host has no name (%v): set it", err)
	}
	l.derive("agent.instance", host, "the host name")
	if c.Logging.Debug {
		c.Logging.Level, l.origins["logging.level"] = "debug", "derived from agent.debug"
	}

	told := l.told["frp.tls.cert_file"] || l.told["frp.tls.key_file"]
	if (c.FRP.TLS.CertFile == "") != (c.FRP.TLS.KeyFile == "") && !told {
		l.mistake("frp.tls.cert_file", "goes with frp.tls.key_file: set both or neither")
	}
	if c.FRP.TLS.InsecureSkipVerify && c.FRP.TLS.CAFile != "" {
		l.mistake("frp.tls.insecure_skip_verify", "true contradicts %s: remove one of them", Name("frp.tls.ca_file"))
	}
	c.FRP.TypeConfigured = l.origins["frp.tunnel.type"] != "default"
	tunnel := &c.FRP.Tunnel
	switch tunnel.Type {
	case "http", "https":
		if tunnel.RemotePort != 0 {
			l.mistake("frp.tunnel.remote_port", "is for frp.tunnel.type tcp only: remove it or change the type")
		}
		if len(tunnel.CustomDomains) == 0 {
			l.derive("frp.tunnel.subdomain", c.Agent.ID, "agent.id")
		}
	case "tcp":
		if tunnel.Subdomain != "" || len(tunnel.CustomDomains) > 0 {
			l.mistake("frp.tunnel.type",
				"tcp has no domains: remove frp.tunnel.subdomain and frp.tunnel.custom_domains or change the type")
		}
	}
	if c.Kubernetes.InCluster && c.Kubernetes.Kubeconfig != "" {
		l.mistake("kubernetes.in_cluster", "true contradicts %s: remove one of them", Name("kubernetes.kubeconfig"))
	}
	adminPort := ":" + strconv.Itoa(c.FRP.AdminPort)
	if strings.HasSuffix(c.Proxy.ListenAddr, adminPort) || strings.HasSuffix(c.Proxy.MetricsAddr, adminPort) {
		l.mistake("frp.admin_port", "is a port of the proxy too: choose another")
	}
	if c.Proxy.ListenAddr == c.Proxy.MetricsAddr {
		l.mistake("proxy.metrics_addr", "is the same as proxy.listen_addr: choose another port")
	}
	if host, port, err := net.SplitHostPort(Local(c.Proxy.ListenAddr)); err == nil {
		tunnel.LocalIP = host
		tunnel.LocalPort, _ = strconv.Atoi(port) // checked by its setting
	}
}

// derive gives a setting without a value the one that follows from another setting.
func (l *loader) derive(key, value, from string) {
	if field := find(key).field(l.config).(*string); *field == "" {
		*field, l.origins[key] = value, "derived from "+from
	}
}
