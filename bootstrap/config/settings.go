package config

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/pipeops/vm-agent/frpc/secret"
)

// setting is one row of the configuration: its key in the file, its variable and its default.
// An empty text in the file or the environment is the same as none.
type setting struct {
	key   string
	env   string
	def   string
	doc   string
	field func(c *Config) any            // points to the value, whose type says what YAML may give
	check func(v string) (string, error) // normalizes a text, or each item of a list; nil accepts any
}

// settings is the whole configuration, a row for each setting.
var settings = []setting{
	{key: "agent.id", env: "PIPEOPS_AGENT_ID", doc: "Id of the agent at the control plane. Required. Lower-case letters, digits and hyphens.", field: func(c *Config) any { return &c.Agent.ID }, check: dnsLabel},
	{key: "agent.name", env: "PIPEOPS_AGENT_NAME", doc: "Display name. Default: the id.", field: func(c *Config) any { return &c.Agent.Name }},
	{key: "agent.cluster_name", env: "PIPEOPS_CLUSTER_NAME", doc: "Display name of the cluster. Default: the id.", field: func(c *Config) any { return &c.Agent.ClusterName }},
	{key: "agent.instance", env: "PIPEOPS_INSTANCE", doc: "Distinguishes the replicas of one agent. Default: the host name, which is the pod's name.", field: func(c *Config) any { return &c.Agent.Instance }, check: dnsName},
	{key: "agent.token", env: "PIPEOPS_AGENT_TOKEN", doc: "Token of the agent. Callers through the tunnel show the same token. Required, here or as a file. Fewer than 16 characters cause a warning.", field: func(c *Config) any { return &c.Agent.Token }, check: checkToken},
	{key: "agent.token_file", env: "PIPEOPS_AGENT_TOKEN_FILE", doc: "File that holds agent.token.", field: func(c *Config) any { return &c.Agent.TokenFile }, check: path},
	{key: "agent.token_overlap", env: "PIPEOPS_AGENT_TOKEN_OVERLAP", def: "5m", doc: "How long callers may still show the previous token after agent.token_file has changed. 0: not at all.", field: func(c *Config) any { return &c.Agent.TokenOverlap }},
	{key: "agent.api_url", env: "PIPEOPS_API_URL", def: "https://api.pipeops.io", doc: "URL of the control plane. https; http only to this host.", field: func(c *Config) any { return &c.Agent.APIURL }, check: apiURL},
	{key: "agent.ca_file", env: "PIPEOPS_API_CA_FILE", doc: "PEM file of the authorities for the control plane's certificate. Default: the system's.", field: func(c *Config) any { return &c.Agent.CAFile }, check: path},
	{key: "agent.debug", env: "PIPEOPS_DEBUG", def: "false", doc: "The same as logging.level debug.", field: func(c *Config) any { return &c.Logging.Debug }},

	{key: "frp.server_addr", env: "PIPEOPS_FRP_SERVER_ADDR", def: "frp.pipeops.io", doc: "Host of frps. The lease may name another host; loopback and link-local addresses only if they are configured here too.", field: func(c *Config) any { return &c.FRP.ServerAddr }, check: host},
	{key: "frp.server_port", env: "PIPEOPS_FRP_SERVER_PORT", def: "7000", doc: "Port of frps. The lease may name another port.", field: func(c *Config) any { return &c.FRP.ServerPort }},
	{key: "frp.token", env: "PIPEOPS_FRP_TOKEN", doc: "frp's shared token, for a frps without a control plane. Default: get a lease from the control plane.", field: func(c *Config) any { return &c.FRP.Token }, check: checkToken},
	{key: "frp.token_file", env: "PIPEOPS_FRP_TOKEN_FILE", doc: "File that holds frp.token.", field: func(c *Config) any { return &c.FRP.TokenFile }, check: path},
	{key: "frp.admin_port", env: "PIPEOPS_FRP_ADMIN_PORT", def: "7400", doc: "Port of frpc's admin API, on 127.0.0.1.", field: func(c *Config) any { return &c.FRP.AdminPort }},
	{key: "frp.protocol", env: "PIPEOPS_FRP_PROTOCOL", def: "tcp", doc: "Protocol between frpc and frps: tcp (preferred, on port 443 or through frp.proxy_url if needed), kcp, quic, websocket or wss.", field: func(c *Config) any { return &c.FRP.Protocol }, check: oneOf("tcp", "kcp", "quic", "websocket", "wss")},
	{key: "frp.proxy_url", env: "PIPEOPS_FRP_PROXY_URL", doc: "HTTP or SOCKS5 proxy between frpc and frps.", field: func(c *Config) any { return &c.FRP.ProxyURL }, check: proxyURL},
	{key: "frp.proxy_url_file", env: "PIPEOPS_FRP_PROXY_URL_FILE", doc: "File that holds frp.proxy_url.", field: func(c *Config) any { return &c.FRP.ProxyURLFile }, check: path},
	{key: "frp.tls.ca_file", env: "PIPEOPS_FRP_TLS_CA_FILE", doc: "PEM file of the authorities for frps's certificate. Default: the public authorities in the image.", field: func(c *Config) any { return &c.FRP.TLS.CAFile }, check: path},
	{key: "frp.tls.insecure_skip_verify", env: "PIPEOPS_FRP_TLS_INSECURE_SKIP_VERIFY", def: "false", doc: "Accept any certificate of frps. Whoever can redirect the connection then gets the agent's credential.", field: func(c *Config) any { return &c.FRP.TLS.InsecureSkipVerify }},
	{key: "frp.tls.server_name", env: "PIPEOPS_FRP_TLS_SERVER_NAME", doc: "Name in frps's certificate. Default: the server's address.", field: func(c *Config) any { return &c.FRP.TLS.ServerName }},
	{key: "frp.tls.cert_file", env: "PIPEOPS_FRP_TLS_CERT_FILE", doc: "Client certificate for frps, PEM.", field: func(c *Config) any { return &c.FRP.TLS.CertFile }, check: path},
	{key: "frp.tls.key_file", env: "PIPEOPS_FRP_TLS_KEY_FILE", doc: "Key of the client certificate, PEM.", field: func(c *Config) any { return &c.FRP.TLS.KeyFile }, check: path},
	{key: "frp.tunnel.type", env: "PIPEOPS_FRP_TUNNEL_TYPE", def: "https", doc: "Type of the tunnel: https (TLS ends in the agent, so that nobody on the way can read the traffic), http or tcp. The lease may name another type, unless https is set here.", field: func(c *Config) any { return &c.FRP.Tunnel.Type }, check: oneOf("http", "https", "tcp")},
	{key: "frp.tunnel.subdomain", env: "PIPEOPS_FRP_TUNNEL_SUBDOMAIN", doc: "Subdomain at frps. Default: the agent's id.", field: func(c *Config) any { return &c.FRP.Tunnel.Subdomain }, check: dnsLabel},
	{key: "frp.tunnel.custom_domains", env: "PIPEOPS_FRP_TUNNEL_CUSTOM_DOMAINS", doc: "Domains at frps, instead of the subdomain.", field: func(c *Config) any { return &c.FRP.Tunnel.CustomDomains }, check: dnsName},
	{key: "frp.tunnel.remote_port", env: "PIPEOPS_FRP_TUNNEL_REMOTE_PORT", doc: "Port at frps, for type tcp. Default: frps chooses.", field: func(c *Config) any { return &c.FRP.Tunnel.RemotePort }},

	{key: "kubernetes.kubeconfig", env: "KUBECONFIG", doc: "Kubeconfig of the cluster. Default: in-cluster, else ~/.kube/config.", field: func(c *Config) any { return &c.Kubernetes.Kubeconfig }, check: paths},
	{key: "kubernetes.in_cluster", def: "false", doc: "Use the pod's ServiceAccount and nothing else.", field: func(c *Config) any { return &c.Kubernetes.InCluster }},
	{key: "kubernetes.namespace", env: "PIPEOPS_NAMESPACE", def: "pipeops-system", doc: "Namespace of the agent, where it keeps the registry of runners.", field: func(c *Config) any { return &c.Kubernetes.Namespace }, check: dnsLabel},

	{key: "proxy.listen_addr", env: "PIPEOPS_LISTEN_ADDR", def: "127.0.0.1:8080", doc: "Address of the tunnel listener, for frpc: serves everything.", field: func(c *Config) any { return &c.Proxy.ListenAddr }, check: listenAddr},
	{key: "proxy.metrics_addr", env: "PIPEOPS_METRICS_ADDR", def: ":9090", doc: "Address of the operations listener, for the kubelet and Prometheus: serves probes, activity and metrics.", field: func(c *Config) any { return &c.Proxy.MetricsAddr }, check: listenAddr},
	{key: "proxy.drain_timeout", env: "PIPEOPS_DRAIN_TIMEOUT", def: "25s", doc: "How long running streams may continue after SIGTERM.", field: func(c *Config) any { return &c.Proxy.DrainTimeout }},

	{key: "runners.allowed_hosts", env: "PIPEOPS_RUNNERS_ALLOWED_HOSTS", def: "*.svc,*.svc.cluster.local", doc: "Hosts that commands may be relayed to: names and IPs, or *.DOMAIN for all names below a domain. [] in the file: nowhere.", field: func(c *Config) any { return &c.Runners.AllowedHosts }, check: hostOrBelow},

	{key: "run_dir", env: "PIPEOPS_RUN_DIR", def: "/var/run/pipeops", doc: "Volume in memory that the containers share: frpc.toml, lease.json, frp.token, tls.crt and tls.key.", field: func(c *Config) any { return &c.RunDir }},
	{key: "logging.level", env: "PIPEOPS_LOG_LEVEL", def: "info", doc: "debug, info, warn or error.", field: func(c *Config) any { return &c.Logging.Level }, check: oneOf("debug", "info", "warn", "error")},
	{key: "logging.format", env: "PIPEOPS_LOG_FORMAT", def: "json", doc: "json or text.", field: func(c *Config) any { return &c.Logging.Format }, check: oneOf("json", "text")},
}

// set sets the value from its text.
func (s *setting) set(c *Config, v string) (err error) {
	switch field := s.field(c).(type) {
	case *string:
		*field = v
		if s.check != nil {
			*field, err = s.check(v)
		}
	case *secret.Secret:
		_, err = s.check(v)
		*field = secret.Secret(v)
	case *[]string:
		for item := range strings.SplitSeq(v, ",") {
			accepted, err := s.check(strings.TrimSpace(item))
			if err != nil {
				return err
			}
			*field = append(*field, accepted)
		}
	case *int:
		*field, err = portNumber(v)
	case *bool:
		*field = v == "true"
		if v != "true" && v != "false" {
			return fmt.Errorf("%q is neither true nor false", v)
		}
	case *time.Duration:
		*field, err = time.ParseDuration(v)
		if err != nil || *field < 0 {
			return fmt.Errorf("%q is not a duration: give one such as 25s or 2m", v)
		}
	}
	return err
}

// get returns the value as text, as set takes it; a secret is redacted.
func (s *setting) get(c *Config) string {
	switch field := s.field(c).(type) {
	case *[]string:
		return strings.Join(*field, ",")
	case *int:
		if *field == 0 { // not set: no port is 0
			return ""
		}
		return strconv.Itoa(*field)
	default:
		return fmt.Sprint(reflect.ValueOf(field).Elem().Interface())
	}
}

// holds reports whether the setting's value is a T.
func holds[T any](s *setting) bool {
	_, ok := s.field(&Config{}).(*T)
	return ok
}

func portNumber(v string) (int, error) {
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 || n > 65535 {
		return 0, fmt.Errorf("%q is not a port: give a number from 1 to 65535", v)
	}
	return n, nil
}

// accept returns the check that accepts values for which ok is true. mistake has a verb for the value.
func accept(ok func(v string) bool, mistake string) func(string) (string, error) {
	return func(v string) (string, error) {
		if !ok(v) {
			return v, fmt.Errorf(mistake, v)
		}
		return v, nil
	}
}

func oneOf(names ...string) func(string) (string, error) {
	return accept(func(v string) bool { return slices.Contains(names, v) }, "%q is unknown: choose one of "+strings.Join(names, ", "))
}

// proxyURL checks the URL of a proxy. Its error does not repeat the value, which may hold a password.
func proxyURL(v string) (string, error) {
	u, err := url.Parse(v)
	if err != nil || u.Host == "" || !slices.Contains([]string{"http", "socks5", "ntlm"}, u.Scheme) {
		return v, errors.New("is not a proxy's URL: give http://, socks5:// or ntlm:// with a host and port")
	}
	return v, nil
}

var (
	labelPattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	namePattern  = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$`)
)

var (
	dnsLabel = accept(labelPattern.MatchString,
		"%.100q is not a DNS label: give at most 63 lower-case letters, digits and hyphens, a letter or digit at both ends")
	dnsName = accept(namePattern.MatchString, "%.100q is not a DNS name: give letters, digits, hyphens and dots")
	host    = accept(IsHost, "%.100q is not a host: give a name or an IP alone, the port has a setting of its own")
)

// IsHost reports whether a text is a DNS name or an IP.
func IsHost(v string) bool { return net.ParseIP(v) != nil || namePattern.MatchString(v) }

// hostOrBelow accepts a host, or "*." and a domain for all hosts below it; it returns lower case.
func hostOrBelow(v string) (string, error) {
	v = strings.ToLower(v)
	if !IsHost(strings.TrimPrefix(v, "*.")) {
		return v, fmt.Errorf("%.100q is not a host: give a name or an IP, without a port, or *.DOMAIN", v)
	}
	return v, nil
}

// apiURL refuses URLs that would send the agent's token unencrypted over a network.
func apiURL(v string) (string, error) {
	u, err := url.Parse(v)
	if err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Scheme != "https" && u.Scheme != "http" {
		return v, errors.New("is not the URL of a control plane: give https:// with a host, a port if need be, and a path if need be")
	}
	if u.Port() != "" {
		if _, err := portNumber(u.Port()); err != nil {
			return v, err
		}
	}
	if u.Scheme == "http" && u.Hostname() != "localhost" && !net.ParseIP(u.Hostname()).IsLoopback() {
		return v, errors.New("would send the agent's token in the clear: give https:// (http:// is for this host only)")
	}
	return strings.TrimRight(v, "/"), nil
}

func listenAddr(v string) (string, error) {
	_, port, _ := net.SplitHostPort(v) // no port where there is an error
	if _, err := portNumber(port); err != nil {
		return v, fmt.Errorf("%q is not an address to listen on: give host:port or :port", v)
	}
	return v, nil
}

// path accepts what looks like a path, or names an existing file. Its error does not repeat other values: the user may
// have given the secret itself in place of its file.
func path(v string) (string, error) {
	rooted := slices.ContainsFunc([]string{"/", "./", "../", "~/"}, func(prefix string) bool { return strings.HasPrefix(v, prefix) })
	strange := strings.ContainsFunc(v, func(r rune) bool { return r == ' ' || !unicode.IsPrint(r) })
	if _, err := os.Stat(v); err != nil && (!rooted || strange || len(v) > 4096) { //nolint:gosec // it asks only whether the file is there
		return "", errors.New("the file that it names cannot be read, and its value is not shown, because it does not look like a path: give one such as /etc/pipeops/file")
	}
	return v, nil
}

// paths accepts a list of paths, as KUBECONFIG may hold.
func paths(v string) (string, error) {
	for _, p := range filepath.SplitList(v) {
		if _, err := path(p); p != "" && err != nil {
			return "", err
		}
	}
	return v, nil
}

// checkToken refuses tokens that no HTTP header can carry, such as one copied with the line break at its end.
func checkToken(v string) (string, error) {
	for _, r := range v {
		if r <= ' ' || r > '~' {
			return v, errors.New("holds a space, a line break or a character outside ASCII: copy the token again")
		}
	}
	return v, nil
}
