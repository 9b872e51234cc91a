package controlplane

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

// These are the domains below which frps finds agents, by the type of their tunnel. Only the gateway uses them, so
// they need not resolve. There are two, because frps allows no custom domain below its own.
const (
	domain    = "agents.internal"     // http, as a subdomain
	tlsDomain = "agents-tls.internal" // https, as a custom domain, because the agent's certificate must name all of it
)

// Frps is a stock frps of a control plane.
type Frps struct {
	FrpsPort int `json:"frps_port"` // for agents

	cp           *ControlPlane
	vhostPort    int // of tunnels of type http
	vhostTLSPort int // https
	args         []string
	process      *process.Process // nil: it is stopped
}

// AddFrps starts one more frps, which has no agents until some are assigned to it. The caller stops it.
func (c *ControlPlane) AddFrps(ctx context.Context) (*Frps, error) {
	f := &Frps{cp: c}
	return f, f.MoveFrps(ctx)
}

// Assign makes the next leases of agents name this frps. The gateway looks for them there from now on.
func (f *Frps) Assign(agents []string) {
	f.cp.mu.Lock()
	defer f.cp.mu.Unlock()
	for _, id := range agents {
		f.cp.assigned[id] = f
	}
}

// frpsOf returns the frps that an agent is assigned to. c.mu must be locked.
func (c *ControlPlane) frpsOf(agentID string) *Frps { return cmp.Or(c.assigned[agentID], c.Frps) }

// MoveFrps stops frps if it runs, and starts it on another port.
func (f *Frps) MoveFrps(ctx context.Context) error {
	f.StopFrps()
	if err := f.configureFrps(); err != nil {
		return err
	}
	return f.StartFrps(ctx)
}

// configureFrps writes frps's configuration: TLS only, vhost ports for the gateway, and the plugin.
func (f *Frps) configureFrps() error {
	c := f.cp
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, port := range []*int{&f.FrpsPort, &f.vhostPort, &f.vhostTLSPort} {
		var err error
		if *port, err = process.FreePort(); err != nil {
			return err
		}
	}
	auth := map[string]any{"method": "token", "token": c.frpToken}
	if c.issuer != nil {
		auth = map[string]any{"method": "oidc", "oidc": map[string]any{"issuer": c.issuer.url, "audience": audience}}
	}
	config := map[string]any{
		"bindAddr": c.options.IP, "bindPort": f.FrpsPort,
		"vhostHTTPPort": f.vhostPort, "vhostHTTPSPort": f.vhostTLSPort, "subDomainHost": domain,
		"vhostHTTPTimeout": 120, // a wait for headers; kubectl allows calls that long
		"auth":             auth,
		"log":              map[string]any{"disablePrintColor": true},
		"transport": map[string]any{"tls": map[string]any{
			"force": true, "certFile": filepath.Join(c.dir, "server.crt"), "keyFile": filepath.Join(c.dir, "server.key"),
		}, "tcpMuxKeepaliveInterval": 10}, // a vanished agent is noticed within 20 s
		"httpPlugins": []any{map[string]any{
			"name": "control-plane", "addr": c.pluginURL, "path": "/", "ops": []string{"Login", "NewProxy"},
		}},
	}
	data, err := json.Marshal(config)
	if err != nil {
		return err
	}
	path := filepath.Join(c.dir, fmt.Sprintf("frps-%d.json", f.FrpsPort))
	f.args = []string{"-c", path}
	return os.WriteFile(path, data, 0o600)
}

// StartFrps starts frps, waits until it listens, and restarts it whenever it ends by itself.
func (f *Frps) StartFrps(ctx context.Context) error {
	c := f.cp
	binary, err := process.Binary("frps")
	if err != nil {
		return err
	}
	p, err := c.options.Group.Start("frps", nil, binary, f.args...)
	if err != nil {
		return err
	}
	c.mu.Lock()
	f.process = p
	c.mu.Unlock()
	err = process.Poll(ctx, 10*time.Second, p.Done(), func() error {
		return process.Listening(net.JoinHostPort(c.options.IP, strconv.Itoa(f.FrpsPort)))
	})
	if err != nil {
		select {
		case <-p.Done():
			err = p.Failed()
		default:
		}
		return err
	}
	go func() {
		<-p.Done()
		c.mu.Lock()
		unexpected := f.process == p
		c.mu.Unlock()
		if unexpected {
			c.options.Log.Warn("restarting frps", "exit_code", p.ExitCode())
			if err := f.StartFrps(ctx); err != nil {
				c.options.Log.Error("frps failed to start", "error", err)
			}
		}
	}()
	return nil
}

// StopFrps stops frps until StartFrps is called.
func (f *Frps) StopFrps() {
	f.cp.mu.Lock()
	p := f.process
	f.process = nil
	f.cp.mu.Unlock()
	if p != nil {
		p.Stop()
	}
}

// FrpsPid returns the process id of the running frps, or 0.
func (f *Frps) FrpsPid() int {
	f.cp.mu.Lock()
	defer f.cp.mu.Unlock()
	if f.process == nil {
		return 0
	}
	return f.process.Pid()
}

// PlainPorts are the ports of a frps of an operator: for frpc, and for callers by the type of the tunnel.
type PlainPorts struct{ Bind, HTTP, HTTPS int }

// StartPlainFrps starts a frps of an operator without a control plane: an agent with the token may have a tunnel of
// type http or https, which callers reach under a name below example.internal.
func StartPlainFrps(ctx context.Context, group *process.Group, ip, token string) (ports PlainPorts, err error) {
	binary, err := process.Binary("frps")
	for _, port := range []*int{&ports.Bind, &ports.HTTP, &ports.HTTPS} {
		if err == nil {
			*port, err = process.FreePort()
		}
	}
	if err != nil {
		return ports, err
	}
	p, err := group.Start("plain-frps", nil, binary, "--bind-addr", ip, "--bind-port", strconv.Itoa(ports.Bind),
		"--vhost-http-port", strconv.Itoa(ports.HTTP), "--vhost-https-port", strconv.Itoa(ports.HTTPS),
		"--subdomain-host", "example.internal", "--token", token)
	if err == nil {
		err = process.Poll(ctx, 10*time.Second, p.Done(), func() error {
			return process.Listening(net.JoinHostPort(ip, strconv.Itoa(ports.Bind)))
		})
	}
	return ports, err
}
