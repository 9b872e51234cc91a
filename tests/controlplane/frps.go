package controlplane

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/pipeops/vm-agent/tests/process"
)

// domain is below which frps looks for agents. It never leaves the gateway, so it need not resolve.
const domain = "agents.internal"

// configureFrps writes frps's configuration: TLS only, one vhost port for the gateway, our plugin.
func (c *ControlPlane) configureFrps(dir, pluginURL string) error {
	var err error
	if c.FrpsPort, err = process.FreePort(); err != nil {
		return err
	}
	if c.vhostPort, err = process.FreePort(); err != nil {
		return err
	}
	config := map[string]any{
		"bindAddr": "127.0.0.1", "bindPort": c.FrpsPort,
		"vhostHTTPPort": c.vhostPort, "subDomainHost": domain,
		"vhostHTTPTimeout": 120, // a wait for headers; kubectl allows calls that long
		"auth":             map[string]any{"method": "token", "token": c.frpToken},
		"log":              map[string]any{"disablePrintColor": true},
		"transport": map[string]any{"tls": map[string]any{
			"force": true, "certFile": filepath.Join(dir, "server.crt"), "keyFile": filepath.Join(dir, "server.key"),
		}},
		"httpPlugins": []any{map[string]any{
			"name": "control-plane", "addr": pluginURL, "path": "/", "ops": []string{"Login", "NewProxy"},
		}},
	}
	data, err := json.Marshal(config)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "frps.json")
	c.frpsArgs = []string{"-c", path}
	return os.WriteFile(path, data, 0o600)
}

// StartFrps starts frps, waits until it listens, and starts it again whenever it ends by itself.
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
		conn, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(c.FrpsPort)))
		if err == nil {
			_ = conn.Close()
		}
		return err
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
			c.options.Log.Warn("frps ended; starting it again", "exit_code", p.ExitCode())
			if err := c.StartFrps(ctx); err != nil {
				c.options.Log.Error("frps does not start", "error", err)
			}
		}
	}()
	return nil
}

// StopFrps stops frps until StartFrps.
func (c *ControlPlane) StopFrps() {
	c.mu.Lock()
	p := c.frps
	c.frps = nil
	c.mu.Unlock()
	if p != nil {
		p.Stop()
	}
}

// FrpsPid is the process id of the running frps, 0 if none runs.
func (c *ControlPlane) FrpsPid() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.frps == nil {
		return 0
	}
	return c.frps.Pid()
}
