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
	"time"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/secret"
	"sigs.k8s.io/yaml"
)

// DefaultPath is where the file is looked for when nothing else is said. It need not exist.
const DefaultPath = "/etc/pipeops/config.yaml"

// Config is the agent's configuration, complete and valid.
type Config struct {
	Agent struct {
		ID, Name, ClusterName, Instance string
		Token                           secret.Secret // from agent.token or the file that agent.token_file names
		TokenFile                       string
		TokenOverlap                    time.Duration // how long the proxy accepts the token before, after a new one has come
		APIURL                          string        // without a slash at its end
		CAFile                          string
	}
	FRP struct {
		ServerAddr     string
		ServerPort     int
		Token          secret.Secret // empty: ask the control plane
		TokenFile      string
		AdminPort      int
		Protocol       string
		ProxyURL       secret.Secret
		ProxyURLFile   string
		TLS            frpc.TLS
		Tunnel         frpc.Tunnel // Type, Subdomain, CustomDomains and RemotePort
		TypeConfigured bool        // the file or the environment sets Tunnel.Type: then no lease may weaken it
	}
	Kubernetes struct {
		Kubeconfig string
		InCluster  bool
		Namespace  string
	}
	Proxy struct {
		ListenAddr, MetricsAddr string
		DrainTimeout            time.Duration
	}
	Runners struct{ AllowedHosts []string }
	RunDir  string
	Logging struct {
		Level, Format string
		Debug         bool // agent.debug: the same as logging.level debug
	}
}

// Error lists every mistake of a configuration, each with its key, its variable and what to do.
type Error struct{ Mistakes []string }

func (e *Error) Error() string {
	return "the configuration cannot be used:\n  " + strings.Join(e.Mistakes, "\n  ")
}

// Environ is this process's environment, for Load.
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
	l, err := load(path, env)
	if err != nil {
		return nil, err
	}
	return l.config, nil
}

func load(path string, env map[string]string) (*loader, error) {
	l := &loader{config: &Config{}, origins: map[string]string{}, told: map[string]bool{}}
	values := l.readFile(path)
	unknown := maps.Clone(env)
	maps.DeleteFunc(unknown, func(name, _ string) bool { return !strings.HasPrefix(name, "PIPEOPS_") })
	for i := range settings {
		s := &settings[i]
		value, source, name := s.def, "default", ""
		if value == "" {
			source = "not set"
		}
		if v, ok := values[s.key]; ok {
			value, source, name = v, "file", " "+cmp.Or(path, DefaultPath)
			delete(values, s.key)
		}
		if v := env[s.env]; s.env != "" && v != "" {
			value, source, name = v, "environment", " "+s.env
		}
		delete(unknown, s.env)
		l.origins[s.key] = source + name
		if value == "" {
			continue
		}
		if err := s.set(l.config, value); err != nil {
			l.mistake(s.key, "%v (from the %s)", err, source)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		if name := keyName.FindString(key); name != key {
			// What follows the name may be a secret.
			l.mistakes = append(l.mistakes, name+": is not followed by a colon and a space: write NAME: VALUE")
		} else {
			l.mistakes = append(l.mistakes, key+": unknown key: remove it or correct its name")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(unknown)) {
		l.mistakes = append(l.mistakes, name+": unknown variable: remove it or correct its name")
	}
	l.complete()
	if len(l.mistakes) > 0 {
		return nil, &Error{Mistakes: l.mistakes}
	}
	return l, nil
}

// Logger makes the logger that the configuration asks for, and what changes its level.
func (c *Config) Logger(w io.Writer) (*slog.Logger, *slog.LevelVar) {
	level := &slog.LevelVar{}
	_ = level.UnmarshalText([]byte(c.Logging.Level)) // one of the four names: checked by Load
	options := &slog.HandlerOptions{Level: level}
	if c.Logging.Format == "text" {
		return slog.New(slog.NewTextHandler(w, options)), level
	}
	return slog.New(slog.NewJSONHandler(w, options)), level
}

// loader collects the mistakes, so that all of them are told at once.
type loader struct {
	config   *Config
	origins  map[string]string // of each value, by key: for Describe
	mistakes []string
	told     map[string]bool // keys with a mistake: that they are missing need not be said too
}

func (l *loader) mistake(key, format string, args ...any) {
	l.told[key] = true
	name := key
	if s := find(key); s != nil && s.env != "" {
		name += " (" + s.env + ")"
	}
	l.mistakes = append(l.mistakes, name+": "+fmt.Sprintf(format, args...))
}

// unreadable is a mistake of the file as a whole. Nobody knows then what is missing.
func (l *loader) unreadable(format string, args ...any) {
	l.told["agent.id"], l.told["agent.token"] = true, true
	l.mistakes = append(l.mistakes, fmt.Sprintf(format, args...))
}

// readFile gives the file's values as text, by dotted key; lists are joined with commas.
func (l *loader) readFile(path string) map[string]string {
	values := map[string]string{}
	name := cmp.Or(path, DefaultPath)
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) && path == "" {
		return values
	}
	if err != nil {
		l.unreadable("%v: correct --config or create the file", err)
		return values
	}
	if yamlSecond.Match(data) {
		l.unreadable("%s: holds a second document after ---: give one", name)
		return values
	}
	var tree any
	exactNumbers := func(d *json.Decoder) *json.Decoder { d.UseNumber(); return d }
	if err := yaml.UnmarshalStrict(data, &tree, exactNumbers); err != nil {
		l.unreadable("%s: %s", name, explainYAML(err))
		return values
	}
	switch tree := tree.(type) {
	case nil: // an empty file
	case map[string]any:
		l.flatten(tree, "", values)
	default:
		l.unreadable("%s: is not a mapping of keys to values", name)
	}
	return values
}

var (
	yamlSecond  = regexp.MustCompile(`(?m)^[^#\s-].*\n([^\n]*\n)*---(\s|$)`)
	yamlMistake = regexp.MustCompile(`line \d+(: key "[^"]*" already set)?`)
	keyName     = regexp.MustCompile(`^[\w.-]*`)
)

// explainYAML says where a file is wrong, and does not repeat what stands there: it may be a secret.
func explainYAML(err error) string {
	switch found := yamlMistake.FindStringSubmatch(err.Error()); {
	case found == nil:
		return "is not YAML: check its quotes, anchors and tags"
	case found[1] == "":
		return "is not YAML, at or before " + found[0]
	default:
		return found[0]
	}
}

// flatten turns the tree into dotted keys.
func (l *loader) flatten(tree map[string]any, prefix string, values map[string]string) {
	for _, k := range slices.Sorted(maps.Keys(tree)) {
		key := prefix + k
		s := find(key)
		if s == nil {
			section, isMap := tree[k].(map[string]any)
			switch {
			case !isSection(key):
				values[key] = "" // unknown
			case isMap:
				l.flatten(section, key+".", values)
			case tree[k] != nil:
				l.mistake(key, "is a section: give it keys")
			}
			continue
		}
		switch v := tree[k].(type) {
		case map[string]any:
			l.mistake(key, "is a mapping: give one value")
		case []any:
			if !holds[[]string](s) {
				l.mistake(key, "is a list: give one value")
				continue
			}
			items := make([]string, len(v))
			for i, item := range v {
				text, ok := item.(string)
				if !ok {
					l.mistake(key, "item %d of the list is not a text: put it in quotes", i+1)
				}
				items[i] = text
			}
			if !l.told[key] {
				values[key] = strings.Join(items, ",")
			}
		case string:
			if v != "" { // else none; only an empty list is a value
				values[key] = v
			}
		case bool, json.Number:
			kind, fits := "number", holds[int](s)
			if _, isBool := v.(bool); isBool {
				kind, fits = "boolean", holds[bool](s)
			}
			if fits {
				values[key] = fmt.Sprint(v)
			} else {
				l.mistake(key, "YAML takes it for a %s: put it in quotes", kind)
			}
		}
	}
}

// find returns the setting of a key, nil if there is none.
func find(key string) *setting {
	for i := range settings {
		if settings[i].key == key {
			return &settings[i]
		}
	}
	return nil
}

func isSection(key string) bool {
	return slices.ContainsFunc(settings, func(s setting) bool { return strings.HasPrefix(s.key, key+".") })
}

// complete fills in what follows from other settings, and checks what no setting can check alone.
func (l *loader) complete() {
	c := l.config
	if c.Agent.ID == "" && !l.told["agent.id"] {
		l.mistake("agent.id", "required: the id that the control plane gave this agent")
	}
	l.secret("agent.token")
	if c.Agent.Token == "" && c.Agent.TokenFile == "" && !l.told["agent.token"] && !l.told["agent.token_file"] {
		l.mistake("agent.token", "required: the token that the control plane gave this agent, here or in the file that agent.token_file (PIPEOPS_AGENT_TOKEN_FILE) names")
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

	if (c.FRP.TLS.CertFile == "") != (c.FRP.TLS.KeyFile == "") && !l.told["frp.tls.cert_file"] && !l.told["frp.tls.key_file"] {
		l.mistake("frp.tls.cert_file", "goes with frp.tls.key_file: set both or neither")
	}
	if c.FRP.TLS.InsecureSkipVerify && c.FRP.TLS.CAFile != "" {
		l.mistake("frp.tls.insecure_skip_verify", "true contradicts frp.tls.ca_file (PIPEOPS_FRP_TLS_CA_FILE): remove one of them")
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
			l.mistake("frp.tunnel.type", "tcp has no domains: remove frp.tunnel.subdomain and frp.tunnel.custom_domains or change the type")
		}
	}
	if c.Kubernetes.InCluster && c.Kubernetes.Kubeconfig != "" {
		l.mistake("kubernetes.in_cluster", "true contradicts kubernetes.kubeconfig (KUBECONFIG): remove one of them")
	}
	if adminPort := strconv.Itoa(c.FRP.AdminPort); strings.HasSuffix(c.Proxy.ListenAddr, ":"+adminPort) || strings.HasSuffix(c.Proxy.MetricsAddr, ":"+adminPort) {
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

// derive gives a setting without a value the one that follows from another.
func (l *loader) derive(key, value, from string) {
	if field := find(key).field(l.config).(*string); *field == "" {
		*field, l.origins[key] = value, "derived from "+from
	}
}

// Local is where an address to listen on is reached from this host.
func Local(listenAddr string) string {
	host, port, err := net.SplitHostPort(listenAddr)
	if ip := net.ParseIP(host); err == nil && (host == "" || ip != nil && ip.IsUnspecified()) {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return listenAddr
}

// secret takes a secret from its file if one is named.
func (l *loader) secret(key string) {
	s, file := find(key), find(key+"_file")
	path := file.get(l.config)
	if path == "" {
		return
	}
	if s.get(l.config) != "" {
		l.mistake(key, "contradicts %s: remove one of them", file.key)
		return
	}
	value, err := readSecret(path, s.check)
	if err != nil {
		l.mistake(file.key, "%v", err)
	}
	*s.field(l.config).(*secret.Secret) = value
}

// AgentToken is the agent's token as it now is: read anew where it comes from a file.
func (c *Config) AgentToken() (secret.Secret, error) {
	return current(c.Agent.Token, c.Agent.TokenFile)
}

// WeakToken reports whether the agent's token is so short that it could be guessed. It is accepted all the same.
func (c *Config) WeakToken() bool { return len(c.Agent.Token) < 16 }

// FRPToken is frp's token as it now is, empty where the control plane is asked for it.
func (c *Config) FRPToken() (secret.Secret, error) { return current(c.FRP.Token, c.FRP.TokenFile) }

func current(token secret.Secret, file string) (secret.Secret, error) {
	if file == "" {
		return token, nil
	}
	return readSecret(file, checkToken)
}

// ErrNoSecret is for the file of a secret that is empty or missing, and not merely unreadable for the moment.
var ErrNoSecret = errors.New("no secret")

// readSecret reads the file of a setting such as agent.token_file.
func readSecret(file string, check func(string) (string, error)) (secret.Secret, error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%w: %w: create the file or correct its path", ErrNoSecret, err)
	}
	if err != nil {
		return "", fmt.Errorf("%w: create the file or correct its path", err)
	}
	value := strings.TrimSpace(string(data))
	if value == "" {
		return "", fmt.Errorf("%w: %s is empty: write the secret into it", ErrNoSecret, file)
	}
	if _, err := check(value); err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	return secret.Secret(value), nil
}
