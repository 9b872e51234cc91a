// Package config reads the agent's configuration: one YAML file and the environment, the same for every
// binary of the agent. All settings stand in the table of settings.go.
package config

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/secret"
)

// DefaultPath is the file that Load reads unless it is given another. It need not exist.
const DefaultPath = "/etc/pipeops/config.yaml"

// Config is the agent's configuration, complete and valid. Its fields are the sections of the file.
type Config struct {
	Agent      Agent
	FRP        FRP
	Kubernetes struct {
		Kubeconfig, Namespace string
		InCluster             bool
	}
	Proxy struct {
		ListenAddr, MetricsAddr string
		DrainTimeout            time.Duration
		CertFile, KeyFile       string
		ClientCAFile            string
	}
	Access  Access
	Runners struct{ AllowedHosts []string }
	RunDir  string
	Logging struct {
		Level, Format string
		Debug         bool // agent.debug: the same as logging.level debug
	}
}

// Agent is the section agent: the agent and its control plane.
type Agent struct {
	ID, Name, ClusterName, Instance string
	Token                           secret.Secret // from agent.token or the file that agent.token_file names
	TokenFile                       string
	TokenOverlap                    time.Duration // how long the proxy still accepts the previous token
	APIURL                          string        // without a slash at its end
	CAFile                          string
}

// Access is the section access: as whom callers act, and what limits them.
type Access struct{ Identity, Prefix, ConfigMap, OwnNamespace string }

// FRP is the section frp: the way to frps, and the tunnel.
type FRP struct {
	ServerAddr, Protocol    string
	ServerPort, AdminPort   int
	Token, ProxyURL         secret.Secret // no token: ask the control plane
	TokenFile, ProxyURLFile string
	GroupKeyFile            string
	TLS                     frpc.TLS
	Tunnel                  frpc.Tunnel // LocalIP and LocalPort follow from proxy.listen_addr
	TypeConfigured          bool        // the file or the environment sets Tunnel.Type: then no lease may weaken it
}

// Error lists every mistake of a configuration, each with its key, its variable and what to do.
type Error struct{ Mistakes []string }

func (e *Error) Error() string {
	return "the configuration cannot be used:\n  " + strings.Join(e.Mistakes, "\n  ")
}

// CurrentToken returns the agent's token, read anew where it comes from a file.
func (a Agent) CurrentToken() (secret.Secret, error) {
	return current(a.Token, a.TokenFile, checkToken)
}

// Credential returns what the agent requests leases with, read anew: its own token, or frp's where that is configured,
// for then there is no control plane.
func (c *Config) Credential() (secret.Secret, error) {
	key, value, file := "agent.token_file", c.Agent.Token, c.Agent.TokenFile
	if c.FRP.Token != "" {
		key, value, file = "frp.token_file", c.FRP.Token, c.FRP.TokenFile
	}
	token, err := current(value, file, checkToken)
	if err != nil {
		err = fmt.Errorf("%s: %w", Name(key), err)
	}
	return token, err
}

// TokenWarning says that the agent's token is so short that it could be guessed. It is empty for other tokens.
func (a Agent) TokenWarning() string {
	if len(a.Token) >= 16 {
		return ""
	}
	return Name("agent.token") + " has fewer than 16 characters and could be guessed: replace it by a random one"
}

// ErrNoSecret reports that the file of a secret is empty or missing, and not just unreadable for a moment.
var ErrNoSecret = errors.New("no secret")

// current returns the secret that the file holds, if one is configured, else the configured value.
func current(value secret.Secret, file string, valid check) (secret.Secret, error) {
	if file == "" {
		return value, nil
	}
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", ErrNoSecret, err)
	}
	if err != nil {
		return "", fmt.Errorf("%w: create the file or correct its path", err)
	}
	text := strings.TrimSpace(string(data))
	if text == "" {
		return "", fmt.Errorf("%w: %s is empty: write the secret into it", ErrNoSecret, file)
	}
	if text, err = valid(text); err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	return secret.Secret(text), nil
}

// ExplainLogin adds to a frpc.ErrRefused what to do: other errors of frpc.Login say that themselves.
func (f FRP) ExplainLogin(err error) error {
	switch {
	case !errors.Is(err, frpc.ErrRefused):
		return err
	case f.Token != "": // the operator's own frps
		return fmt.Errorf("%w: check %s", err, Name("frp.token"))
	}
	return fmt.Errorf("%w: restart the pod to get a new lease from the control plane", err)
}

// Local returns the address at which this host reaches what listens on listenAddr.
func Local(listenAddr string) string {
	host, port, err := net.SplitHostPort(listenAddr)
	if ip := net.ParseIP(host); err == nil && (host == "" || ip != nil && ip.IsUnspecified()) {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return listenAddr
}

// Logger returns the configured logger, and the variable that changes its level.
func (c *Config) Logger(w io.Writer) (*slog.Logger, *slog.LevelVar) {
	level := &slog.LevelVar{}
	_ = level.UnmarshalText([]byte(c.Logging.Level)) // one of the four names: checked by Load
	options := &slog.HandlerOptions{Level: level}
	if c.Logging.Format == "text" {
		return slog.New(slog.NewTextHandler(w, options)), level
	}
	return slog.New(slog.NewJSONHandler(w, options)), level
}

// Environ returns this process's environment, for Load.
func Environ() map[string]string {
	env := map[string]string{}
	for _, variable := range os.Environ() {
		name, value, _ := strings.Cut(variable, "=")
		env[name] = value
	}
	return env
}

// Load reads the file at path and the environment; environment over file over default. An empty path is
// DefaultPath, which may be absent. The error, if any, is an *Error.
func Load(path string, env map[string]string) (*Config, error) {
	c, _, err := load(path, env)
	return c, err
}

// Describe writes the configuration that Load would give, as a configuration file: a line for each setting,
// with the origin of its value; secrets as "[redacted]". The error is Load's or w's.
func Describe(w io.Writer, path string, env map[string]string) error {
	c, origins, err := load(path, env)
	if err != nil {
		return err
	}
	columns := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, s := range settings {
		value, origin := s.yaml(c), origins[s.key]
		if strings.HasPrefix(origin, "[redacted]") {
			value = "" // a secret would contradict the file that holds it
		}
		_, _ = fmt.Fprintf(columns, "%s: %s\t# %s\n", s.key, value, origin)
	}
	return columns.Flush()
}

// load returns the configuration, and the origin of each value by key.
func load(path string, env map[string]string) (*Config, map[string]string, error) {
	l := &loader{config: &Config{}, origins: map[string]string{}, told: map[string]bool{}}
	values, err := readFile(path)
	if err != nil {
		l.mistakes = append(l.mistakes, err.Error())
		l.told["agent.id"], l.told["agent.token"] = true, true // the file may hold them
	}

	for _, s := range settings {
		text, origin := s.def, "default"
		if text == "" {
			origin = "not set"
		}
		if v := values[s.key]; v != nil && v != "" {
			if given, err := s.text(v); err != nil {
				l.mistake(s.key, err.Error())
			} else {
				text, origin = given, "file "+cmp.Or(path, DefaultPath)
			}
		}
		delete(values, s.key)
		if v := env[s.env]; s.env != "" && v != "" {
			text, origin = v, "environment "+s.env
		}
		l.origins[s.key] = origin
		if text == "" {
			continue
		}
		if err := s.set(l.config, text); err != nil {
			source, _, _ := strings.Cut(origin, " ")
			l.mistake(s.key, err.Error()+" (from the "+source+")")
		}
	}

	for _, key := range slices.Sorted(maps.Keys(values)) {
		switch name := keyName.FindString(key); {
		case isSection(key):
			l.mistake(key, "is a section: give it keys")
		case name != key: // what follows the name may be a secret
			l.mistakes = append(l.mistakes, name+": is not followed by a colon and a space: write NAME: VALUE")
		default:
			l.mistake(key, "unknown key: remove it or correct its name")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(env)) {
		known := slices.ContainsFunc(settings, func(s setting) bool { return s.env == name })
		if strings.HasPrefix(name, "PIPEOPS_") && !known {
			l.mistake(name, "unknown variable: remove it or correct its name")
		}
	}

	l.complete()
	if len(l.mistakes) > 0 {
		return nil, nil, &Error{Mistakes: l.mistakes}
	}
	return l.config, l.origins, nil
}

// loader collects the mistakes, so that Load reports all of them at once.
type loader struct {
	config   *Config
	origins  map[string]string // of each value, by key: for Describe
	mistakes []string
	told     map[string]bool // keys with a mistake, which refuse does not add to
}

func (l *loader) mistake(key, mistake string) {
	l.told[key] = true
	l.mistakes = append(l.mistakes, Name(key)+": "+mistake)
}

// complete sets the values that follow from other settings, and checks settings against each other.
func (l *loader) complete() {
	c, tunnel, tls := l.config, &l.config.FRP.Tunnel, l.config.FRP.TLS
	l.secret("agent.token", &c.Agent.Token, c.Agent.TokenFile, checkToken)
	l.secret("frp.token", &c.FRP.Token, c.FRP.TokenFile, checkToken)
	l.secret("frp.proxy_url", &c.FRP.ProxyURL, c.FRP.ProxyURLFile, proxyURL)
	l.secret("frp.tunnel.group_key", &tunnel.GroupKey, c.FRP.GroupKeyFile, checkToken)

	hostname, _ := os.Hostname()
	l.derive("agent.name", &c.Agent.Name, c.Agent.ID, "agent.id")
	l.derive("agent.cluster_name", &c.Agent.ClusterName, c.Agent.ID, "agent.id")
	l.derive("agent.instance", &c.Agent.Instance, hostname, "the host name")
	if tunnel.Type != "tcp" && len(tunnel.CustomDomains) == 0 {
		l.derive("frp.tunnel.subdomain", &tunnel.Subdomain, c.Agent.ID, "agent.id")
	}
	if c.Logging.Debug {
		c.Logging.Level, l.origins["logging.level"] = "debug", "derived from agent.debug"
	}
	c.FRP.TypeConfigured = l.origins["frp.tunnel.type"] != "default"
	localIP, localPort, _ := net.SplitHostPort(Local(c.Proxy.ListenAddr)) // checked by its setting
	tunnel.LocalIP = localIP
	tunnel.LocalPort, _ = strconv.Atoi(localPort)

	l.refuse(c.Agent.ID == "", "agent.id", "required: the id that the control plane gave this agent")
	l.refuse(c.Agent.Token == "" && c.Agent.TokenFile == "" && !l.told["agent.token_file"], "agent.token",
		"required: the token that the control plane gave this agent, here or in the file that "+
			Name("agent.token_file")+" names")
	l.refuse(c.Agent.Instance == "", "agent.instance", "the host has no name: set it")
	l.pair("frp.tls.cert_file", tls.CertFile, "frp.tls.key_file", tls.KeyFile)
	l.pair("proxy.tls.cert_file", c.Proxy.CertFile, "proxy.tls.key_file", c.Proxy.KeyFile)
	l.pair("frp.tunnel.group", tunnel.Group, "frp.tunnel.group_key", tunnel.GroupKey.Reveal())
	l.refuse(tls.InsecureSkipVerify && tls.CAFile != "", "frp.tls.insecure_skip_verify",
		"true contradicts "+Name("frp.tls.ca_file")+": remove one of them")
	l.refuse(strings.HasPrefix(tunnel.Type, "http") && tunnel.RemotePort != 0, "frp.tunnel.remote_port",
		"is for frp.tunnel.type tcp only: remove it or change the type")
	l.refuse(tunnel.Type == "tcp" && (tunnel.Subdomain != "" || len(tunnel.CustomDomains) > 0), "frp.tunnel.type",
		"tcp has no domains: remove frp.tunnel.subdomain and frp.tunnel.custom_domains or change the type")
	const httpsOnly = "is for frp.tunnel.type https only: remove it or change the type"
	l.refuse(c.Proxy.ClientCAFile != "" && tunnel.Type != "https", "proxy.tls.client_ca_file", httpsOnly)
	l.refuse(c.Proxy.CertFile != "" && tunnel.Type != "https", "proxy.tls.cert_file", httpsOnly)
	l.refuse(c.Kubernetes.InCluster && c.Kubernetes.Kubeconfig != "", "kubernetes.in_cluster",
		"true contradicts "+Name("kubernetes.kubeconfig")+": remove one of them")
	adminPort := ":" + strconv.Itoa(c.FRP.AdminPort)
	taken := strings.HasSuffix(c.Proxy.ListenAddr, adminPort) || strings.HasSuffix(c.Proxy.MetricsAddr, adminPort)
	l.refuse(taken, "frp.admin_port", "is a port of the proxy too: choose another")
	l.refuse(c.Proxy.ListenAddr == c.Proxy.MetricsAddr, "proxy.metrics_addr",
		"is the same as proxy.listen_addr: choose another port")
}

// refuse records the mistake if the setting is broken, unless another mistake of it explains that.
func (l *loader) refuse(broken bool, key, mistake string) {
	if broken && !l.told[key] {
		l.mistake(key, mistake)
	}
}

// pair refuses one of two settings that go together.
func (l *loader) pair(key, value, otherKey, other string) {
	l.refuse((value == "") != (other == "") && !l.told[otherKey] && !l.told[otherKey+"_file"], key,
		"goes with "+otherKey+": set both or neither")
}

// secret reads a secret from its file if one is configured.
func (l *loader) secret(key string, value *secret.Secret, file string, valid check) {
	read, err := current("", file, valid)
	switch {
	case file == "":
	case *value != "":
		l.mistake(key, "contradicts "+key+"_file: remove one of them")
	case err != nil:
		l.mistake(key+"_file", err.Error())
	default:
		*value, l.origins[key] = read, "[redacted], from "+key+"_file"
	}
}

// derive gives a setting without a value the one that follows from another setting.
func (l *loader) derive(key string, field *string, value, from string) {
	if *field == "" {
		*field, l.origins[key] = value, "derived from "+from
	}
}

// readFile returns the file's values, by dotted key.
func readFile(path string) (map[string]any, error) {
	name := cmp.Or(path, DefaultPath)
	data, err := os.ReadFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist) && path == "":
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("%w: correct --config or create the file", err)
	case yamlSecond.Match(data):
		return nil, fmt.Errorf("%s: holds a second document after ---: give one", name)
	}
	var tree any
	exactNumbers := func(d *json.Decoder) *json.Decoder { d.UseNumber(); return d }
	if err := yaml.UnmarshalStrict(data, &tree, exactNumbers); err != nil {
		switch found := yamlMistake.FindStringSubmatch(err.Error()); { // the rest of it may repeat a secret
		case found == nil:
			return nil, fmt.Errorf("%s: is not YAML: check its quotes, anchors and tags", name)
		case found[1] == "" && yamlTab.Match(data):
			return nil, fmt.Errorf("%s: is not YAML, at or before %s: indent with spaces, not tabs", name, found[0])
		case found[1] == "":
			return nil, fmt.Errorf("%s: is not YAML, at or before %s", name, found[0])
		default:
			return nil, fmt.Errorf("%s: %s", name, found[0])
		}
	}
	root, ok := tree.(map[string]any)
	if !ok && tree != nil { // nil: an empty file
		return nil, fmt.Errorf("%s: is not a mapping of keys to values", name)
	}
	values := map[string]any{}
	flatten(root, "", values)
	return values, nil
}

var (
	yamlSecond  = regexp.MustCompile(`(?m)^[^#\s-].*\n([^\n]*\n)*---(\s|$)`)
	yamlTab     = regexp.MustCompile(`(?m)^ *\t`)
	yamlMistake = regexp.MustCompile(`line \d+(: key "[^"]*" already set)?`)
	keyName     = regexp.MustCompile(`^[\w.-]*`)
)

// flatten adds the tree's values to values, by dotted key.
func flatten(tree map[string]any, prefix string, values map[string]any) {
	for _, name := range slices.Sorted(maps.Keys(tree)) { // the same of two spellings of a key wins each time
		key, v := prefix+name, tree[name]
		if section, ok := v.(map[string]any); isSection(key) && (ok || v == nil) {
			flatten(section, key+".", values)
		} else {
			values[key] = v
		}
	}
}

func isSection(key string) bool {
	return slices.ContainsFunc(settings, func(s setting) bool { return strings.HasPrefix(s.key, key+".") })
}

// Name returns a setting's key with its variable, if it has one: as messages name it.
func Name(key string) string {
	for _, s := range settings {
		if s.key == key && s.env != "" {
			return key + " (" + s.env + ")"
		}
	}
	return key
}
