// Package config reads the agent's configuration: one YAML file and the environment, the same for every
// binary of the agent. All settings stand in the table of settings.go.
package config

import (
	"io"
	"log/slog"
	"net"
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

// Agent is the section agent: the agent and its control plane.
type Agent struct {
	ID, Name, ClusterName, Instance string
	Token                           secret.Secret // from agent.token or the file that agent.token_file names
	TokenFile                       string
	TokenOverlap                    time.Duration // how long the proxy still accepts the previous token
	APIURL                          string        // without a slash at its end
	CAFile                          string
}

// FRP is the section frp: the way to frps, and the tunnel.
type FRP struct {
	ServerAddr     string
	ServerPort     int
	Token          secret.Secret // empty: ask the control plane
	TokenFile      string
	AdminPort      int
	Protocol       string
	ProxyURL       secret.Secret
	ProxyURLFile   string
	TLS            frpc.TLS
	Tunnel         frpc.Tunnel // LocalIP and LocalPort follow from proxy.listen_addr
	TypeConfigured bool        // the file or the environment sets Tunnel.Type: then no lease may weaken it
}

// Error lists every mistake of a configuration, each with its key, its variable and what to do.
type Error struct{ Mistakes []string }

func (e *Error) Error() string {
	return "the configuration cannot be used:\n  " + strings.Join(e.Mistakes, "\n  ")
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
