package controlplane

import (
	"context"
	"encoding/json"
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

// MoveFrps stops frps if it runs, and starts it on another port.
func (c *ControlPlane) MoveFrps(ctx context.Context) error {
	c.StopFrps()
	if err := c.configureFrps(); err != nil {
		return err
	}
	return c.StartFrps(ctx)
}

// configureFrps writes frps's configuration: TLS only, vhost ports for the gateway, and the plugin.
func (c *ControlPlane) configureFrps() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, port := range []*int{&c.FrpsPort, &c.vhostPort, &c.vhostTLSPort} {
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
		"bindAddr": c.options.IP, "bindPort": c.FrpsPort,
		"vhostHTTPPort": c.vhostPort, "vhostHTTPSPort": c.vhostTLSPort, "subDomainHost": domain,
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
	path := filepath.Join(c.dir, "frps.json")
	c.frpsArgs = []string{"-c", path}
	return os.WriteFile(path, data, 0o600)
}

// StartFrps starts frps, waits until it listens, and restarts it whenever it ends by itself.
func (c *ControlPlane) StartFrps(ctx context.Context) error {
	binary, err := process.Binary("frps")
	if err != nil {
		return err
	}
	p, err := c.options.Group.Start("frps", nil, binary, c.frpsArgs...)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.frps = p
	c.mu.Unlock()
	err = process.Poll(ctx, 10*time.Second, p.Done(), func() error {
		return process.Listening(net.JoinHostPort(c.options.IP, strconv.Itoa(c.FrpsPort)))
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
		unexpected := c.frps == p
		c.mu.Unlock()
		if unexpected {
			c.options.Log.Warn("restarting frps", "exit_code", p.ExitCode())
			if err := c.StartFrps(ctx); err != nil {
				c.options.Log.Error("frps failed to start", "error", err)
			}
		}
	}()
	return nil
}

// StopFrps stops frps until StartFrps is called.
func (c *ControlPlane) StopFrps() {
	c.mu.Lock()
	p := c.frps
	c.frps = nil
	c.mu.Unlock()
	if p != nil {
		p.Stop()
	}
}

// FrpsPid returns the process id of the running frps, or 0.
func (c *ControlPlane) FrpsPid() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.frps == nil {
		return 0
	}
	return c.frps.Pid()
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
