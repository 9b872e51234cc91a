// Package config reads the agent's configuration: one YAML file and the environment, the same for every
// binary of the agent. All settings stand in the table of settings.go.
package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

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
