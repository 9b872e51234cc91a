package config

import (
	"cmp"
	"encoding/json"
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
)

// setting is one row of the configuration: its key in the file, its variable and its default.
// An empty text in the file or the environment is the same as none.
type setting struct {
	key, env, def, doc string
	field              func(c *Config) any // points to the value, whose type says what YAML may give
	check              check               // of the text, or of each item of a list; nil accepts any
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
	{key: "frp.tunnel.subdomain_host", env: "PIPEOPS_FRP_TUNNEL_SUBDOMAIN_HOST", doc: "subDomainHost of frps: the certificate that the agent makes then has the whole name, subdomain and host. The lease may name another.", field: func(c *Config) any { return &c.FRP.Tunnel.SubdomainHost }, check: dnsName},
	{key: "frp.tunnel.custom_domains", env: "PIPEOPS_FRP_TUNNEL_CUSTOM_DOMAINS", doc: "Domains at frps, instead of the subdomain.", field: func(c *Config) any { return &c.FRP.Tunnel.CustomDomains }, check: dnsName},
	{key: "frp.tunnel.remote_port", env: "PIPEOPS_FRP_TUNNEL_REMOTE_PORT", doc: "Port at frps, for type tcp. Default: frps chooses.", field: func(c *Config) any { return &c.FRP.Tunnel.RemotePort }},
	{key: "frp.tunnel.group", env: "PIPEOPS_FRP_TUNNEL_GROUP", doc: "Group at frps: replicas of this agent share the tunnel. The lease may name another. Default: none, and frps refuses a second replica.", field: func(c *Config) any { return &c.FRP.Tunnel.Group }, check: dnsName},
	{key: "frp.tunnel.group_key", env: "PIPEOPS_FRP_TUNNEL_GROUP_KEY", doc: "Secret that the members of the group share. Required with a group, here or as a file.", field: func(c *Config) any { return &c.FRP.Tunnel.GroupKey }, check: checkToken},
	{key: "frp.tunnel.group_key_file", env: "PIPEOPS_FRP_TUNNEL_GROUP_KEY_FILE", doc: "File that holds frp.tunnel.group_key.", field: func(c *Config) any { return &c.FRP.GroupKeyFile }, check: path},

	{key: "kubernetes.kubeconfig", env: "KUBECONFIG", doc: "Kubeconfig of the cluster. Default: in-cluster, else ~/.kube/config.", field: func(c *Config) any { return &c.Kubernetes.Kubeconfig }, check: paths},
	{key: "kubernetes.in_cluster", def: "false", doc: "Use the pod's ServiceAccount and nothing else.", field: func(c *Config) any { return &c.Kubernetes.InCluster }},
	{key: "kubernetes.namespace", env: "PIPEOPS_NAMESPACE", def: "pipeops-system", doc: "Namespace of the agent, where it keeps the registry of runners.", field: func(c *Config) any { return &c.Kubernetes.Namespace }, check: dnsLabel},

	{key: "proxy.listen_addr", env: "PIPEOPS_LISTEN_ADDR", def: "127.0.0.1:8080", doc: "Address of the tunnel listener, for frpc: serves everything.", field: func(c *Config) any { return &c.Proxy.ListenAddr }, check: listenAddr},
	{key: "proxy.metrics_addr", env: "PIPEOPS_METRICS_ADDR", def: ":9090", doc: "Address of the operations listener, for the kubelet and Prometheus: serves probes, activity and metrics.", field: func(c *Config) any { return &c.Proxy.MetricsAddr }, check: listenAddr},
	{key: "proxy.drain_timeout", env: "PIPEOPS_DRAIN_TIMEOUT", def: "25s", doc: "How long running streams may continue after SIGTERM.", field: func(c *Config) any { return &c.Proxy.DrainTimeout }},
	{key: "proxy.tls.cert_file", env: "PIPEOPS_PROXY_TLS_CERT_FILE", doc: "Certificate for callers of tunnels of type https, PEM, with its chain. Taken anew when it changes. Default: bootstrap makes one for each lease.", field: func(c *Config) any { return &c.Proxy.CertFile }, check: path},
	{key: "proxy.tls.key_file", env: "PIPEOPS_PROXY_TLS_KEY_FILE", doc: "Key of proxy.tls.cert_file, PEM.", field: func(c *Config) any { return &c.Proxy.KeyFile }, check: path},
	{key: "proxy.tls.client_ca_file", env: "PIPEOPS_PROXY_TLS_CLIENT_CA_FILE", doc: "PEM file of the authorities for callers' client certificates, for tunnels of type https: whoever shows none cannot connect. Default: no certificate is asked for.", field: func(c *Config) any { return &c.Proxy.ClientCAFile }, check: path},

	{key: "access.identity", env: "PIPEOPS_ACCESS_IDENTITY", def: "agent", doc: "As whom callers act at the Kubernetes API: agent (the agent's ServiceAccount), named (the user whom the gateway names) or own (the holder of the caller's own token for the cluster).", field: func(c *Config) any { return &c.Access.Identity }, check: oneOf("agent", "named", "own")},
	{key: "access.prefix", env: "PIPEOPS_ACCESS_PREFIX", def: "pipeops:", doc: "Begins the names of users and groups in the cluster, with identity named.", field: func(c *Config) any { return &c.Access.Prefix }, check: namePrefix},
	{key: "access.config_map", env: "PIPEOPS_ACCESS_CONFIG_MAP", doc: "ConfigMap in the agent's namespace by which the cluster's owner limits access. Default: none, and no limit.", field: func(c *Config) any { return &c.Access.ConfigMap }, check: dnsName},
	{key: "access.own_namespace", env: "PIPEOPS_ACCESS_OWN_NAMESPACE", def: "closed", doc: "closed: callers may not write, exec or read Secrets in the agent's namespace, whatever their rights. What a path does not show passes, such as Secrets in a list of all namespaces. open: they may, and can take the agent over.", field: func(c *Config) any { return &c.Access.OwnNamespace }, check: oneOf("closed", "open")},

	{key: "runners.allowed_hosts", env: "PIPEOPS_RUNNERS_ALLOWED_HOSTS", def: "*.svc,*.svc.cluster.local", doc: "Hosts that commands may be relayed to: names and IPs, or *.DOMAIN for all names below a domain. [] in the file: nowhere.", field: func(c *Config) any { return &c.Runners.AllowedHosts }, check: hostOrBelow},

	{key: "run_dir", env: "PIPEOPS_RUN_DIR", def: "/var/run/pipeops", doc: "Volume in memory that the containers share: frpc.toml, lease.json, frp.token, tls.crt and tls.key.", field: func(c *Config) any { return &c.RunDir }},
	{key: "logging.level", env: "PIPEOPS_LOG_LEVEL", def: "info", doc: "debug, info, warn or error.", field: func(c *Config) any { return &c.Logging.Level }, check: oneOf("debug", "info", "warn", "error")},
	{key: "logging.format", env: "PIPEOPS_LOG_FORMAT", def: "json", doc: "json or text.", field: func(c *Config) any { return &c.Logging.Format }, check: oneOf("json", "text")},
}

// text returns a value of the file as set takes it: the items of a list are joined with commas.
func (s *setting) text(v any) (string, error) {
	kind := reflect.TypeOf(s.field(&Config{})).Elem().Kind()
	switch v := v.(type) {
	case map[string]any:
		return "", errors.New("is a mapping: give one value")
	case []any:
		if kind != reflect.Slice {
			return "", errors.New("is a list: give one value")
		}
		items := make([]string, len(v))
		for i, item := range v {
			var ok bool
			if items[i], ok = item.(string); !ok {
				return "", fmt.Errorf("item %d of the list is not a text: put it in quotes", i+1)
			}
		}
		return strings.Join(items, ","), nil
	case bool:
		if kind != reflect.Bool {
			return "", errors.New("YAML takes it for a boolean: put it in quotes")
		}
	case json.Number:
		if kind != reflect.Int {
			return "", errors.New("YAML takes it for a number: put it in quotes")
		}
	}
	return fmt.Sprint(v), nil
}

// set sets the value from its text. What the check refuses is not kept.
func (s *setting) set(c *Config, v string) (err error) {
	switch field := s.field(c).(type) {
	case *[]string:
		for item := range strings.SplitSeq(v, ",") {
			if item = strings.TrimSpace(item); s.check != nil {
				if item, err = s.check(item); err != nil {
					return err
				}
			}
			*field = append(*field, item)
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
	default: // a text or a secret
		if s.check != nil {
			v, err = s.check(v)
		}
		reflect.ValueOf(field).Elem().SetString(v)
	}
	return err
}

// yaml returns the value as YAML; a secret is redacted. Strings quoted by Go are valid YAML.
func (s *setting) yaml(c *Config) string {
	switch value := reflect.ValueOf(s.field(c)).Elem(); value.Interface().(type) {
	case bool, int:
		return strings.TrimPrefix(fmt.Sprint(value), "0") // no port is 0: it is not set
	case []string:
		return strings.ReplaceAll(fmt.Sprintf("%q", value), `" "`, `", "`)
	default:
		return strconv.Quote(fmt.Sprint(value))
	}
}

func portNumber(v string) (int, error) {
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 || n > 65535 {
		return 0, fmt.Errorf("%q is not a port: give a number from 1 to 65535", v)
	}
	return n, nil
}

// check returns a text as the agent uses it, or what is wrong with it. Its error repeats no text that may be a secret.
type check func(v string) (string, error)

// accept returns the check that accepts values for which ok is true. VALUE in the mistake stands for the value.
func accept(ok func(v string) bool, mistake string) check {
	return func(v string) (string, error) {
		if !ok(v) {
			return "", errors.New(strings.Replace(mistake, "VALUE", fmt.Sprintf("%.100q", v), 1))
		}
		return v, nil
	}
}

func oneOf(names ...string) check {
	return accept(func(v string) bool { return slices.Contains(names, v) },
		"VALUE is unknown: choose one of "+strings.Join(names, ", "))
}

const label = `[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?`

var (
	namePattern = regexp.MustCompile(`^` + label + `(\.` + label + `)*$`)
	pathPattern = regexp.MustCompile(`^(~|\.{0,2})/[\pL\pM\pN\pP\pS]*$`) // of printable characters but the space

	dnsLabel = accept(regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`).MatchString, "VALUE is not a DNS label: "+
		"give at most 63 lower-case letters, digits and hyphens, a letter or digit at both ends")
	dnsName    = accept(isName, "VALUE is not a DNS name: give letters, digits, hyphens and dots")
	host       = accept(IsHost, "VALUE is not a host: give a name or an IP alone, the port has a setting of its own")
	checkToken = accept(regexp.MustCompile(`^[!-~]*$`).MatchString, // what an HTTP header can carry
		"holds a space, a line break or a character outside ASCII: copy the token again")
	namePrefix = accept(func(v string) bool {
		_, err := checkToken(v) // what an HTTP header can carry
		low := strings.ToLower(v)
		// With prefix "s" a group "ystem:masters" would be system:masters.
		return err == nil && !strings.HasPrefix(low, "system:") && !strings.HasPrefix("system:", low)
	}, "VALUE is not a prefix for names: give printable ASCII characters that are not, and do not begin, system:")
	listenAddr = accept(func(v string) bool {
		_, port, _ := net.SplitHostPort(v) // no port where there is an error
		_, err := portNumber(port)
		return err == nil
	}, "VALUE is not an address to listen on: give host:port or :port")
	proxyURL = accept(func(v string) bool {
		u, err := url.Parse(v)
		return err == nil && u.Host != "" && slices.Contains([]string{"http", "socks5", "ntlm"}, u.Scheme)
	}, "is not a proxy's URL: give http://, socks5:// or ntlm:// with a host and port")
	path  = accept(isPath, notAPath)
	paths = accept(func(v string) bool { // as KUBECONFIG may hold
		return !slices.ContainsFunc(filepath.SplitList(v), func(p string) bool { return p != "" && !isPath(p) })
	}, notAPath)
)

// notAPath does not repeat the value: the user may have given the secret itself in place of its file.
const notAPath = "the file that it names cannot be read, and its value is not shown, " +
	"because it does not look like a path: give one such as /etc/pipeops/file"

// isPath reports whether a text looks like a path, or names an existing file.
func isPath(v string) bool {
	_, err := os.Stat(v) //nolint:gosec // it asks only whether the file is there
	return err == nil || pathPattern.MatchString(v) && len(v) <= 4096
}

// IsHost reports whether a text is a DNS name or an IP.
func IsHost(v string) bool { return net.ParseIP(v) != nil || isName(v) }

func isName(v string) bool { return len(v) <= 253 && namePattern.MatchString(v) }

// hostOrBelow accepts a host, or "*." and a domain for all hosts below it; it returns lower case.
func hostOrBelow(v string) (string, error) {
	if !IsHost(strings.TrimPrefix(v, "*.")) {
		return "", fmt.Errorf("%.100q is not a host: give a name or an IP, without a port, or *.DOMAIN", v)
	}
	return strings.ToLower(v), nil
}

// ParseURL parses the URL of a server, or says what is wrong with it, without repeating it.
func ParseURL(v string) (*url.URL, error) {
	u, err := url.Parse(v)
	if err != nil || u.Hostname() == "" || u.User != nil || strings.ContainsAny(v, "?#") ||
		u.Scheme != "https" && u.Scheme != "http" {
		return nil, errors.New("is not a server's URL: give https:// with a host, and a port and path if need be")
	}
	_, err = portNumber(cmp.Or(u.Port(), "443"))
	return u, err
}

// apiURL refuses URLs that would send the agent's token unencrypted over a network.
func apiURL(v string) (string, error) {
	u, err := ParseURL(v)
	switch {
	case err != nil:
		return "", err
	case u.Scheme == "http" && u.Hostname() != "localhost" && !net.ParseIP(u.Hostname()).IsLoopback():
		return "", errors.New("would send the agent's token in the clear: give https:// (http:// is for this host only)")
	}
	return strings.TrimRight(v, "/"), nil
}
