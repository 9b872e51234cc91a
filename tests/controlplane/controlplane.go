// Package controlplane is a small real control plane for development and tests: the authentication endpoint,
// a stock frps with a plugin that checks each agent's own credential, and an HTTPS gateway for callers. It
// keeps everything in memory.
package controlplane

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"encoding/json"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/tests/process"
)

// leaseTime is how long an agent may log in with a lease.
const leaseTime = 24 * time.Hour

// Options are what a control plane is started with.
type Options struct {
	Group  *process.Group
	Agents map[string]string // token by agent id
	Log    *slog.Logger
}

// ControlPlane is a running control plane. All its addresses are on 127.0.0.1.
type ControlPlane struct {
	APIURL     string `json:"api_url"`     // where agents authenticate
	GatewayURL string `json:"gateway_url"` // where callers reach agents, below /agents/{id}
	CAFile     string `json:"ca_file"`     // PEM: signs the certificates of all three servers
	CA         []byte `json:"-"`           // the same
	FrpsPort   int    `json:"frps_port"`

	options   Options
	frpToken  string // frp's shared token
	vhostPort int
	frpsArgs  []string
	servers   []*http.Server

	mu       sync.Mutex
	agents   map[string]string
	leases   map[string]lease   // by the credential in metadatas
	refusals map[string]refusal // by agent id: why frps was last told to refuse it
	fault    http.Handler       // answers instead of the authentication endpoint, for tests
	frps     *process.Process
}

// lease is what one instance of an agent got.
type lease struct {
	agentID  string
	groupKey string
	expires  time.Time
}

type refusal struct {
	at     time.Time
	reason string
}

// Start runs a control plane until Close, or until ctx ends.
func Start(ctx context.Context, options Options) (*ControlPlane, error) {
	dir, err := options.Group.Mkdir("controlplane")
	if err != nil {
		return nil, err
	}
	c := &ControlPlane{
		CAFile: filepath.Join(dir, "ca.crt"), options: options, frpToken: rand.Text(),
		agents: maps.Clone(options.Agents), leases: map[string]lease{}, refusals: map[string]refusal{},
	}
	cert, err := writeCertificates(dir)
	if err != nil {
		return nil, err
	}
	if c.CA, err = os.ReadFile(c.CAFile); err != nil {
		return nil, err
	}
	tlsConfig := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}

	api := http.NewServeMux()
	api.HandleFunc("POST /auth/frp-token", c.authenticate)
	if c.APIURL, err = c.serve(ctx, api, tlsConfig); err != nil {
		return nil, err
	}
	pluginURL, err := c.serve(ctx, http.HandlerFunc(c.plugin), nil)
	if err != nil {
		return nil, err
	}
	if err := c.configureFrps(dir, pluginURL); err != nil {
		return nil, err
	}
	if err := c.StartFrps(ctx); err != nil {
		return nil, err
	}
	gateway := c.gateway(net.JoinHostPort("127.0.0.1", strconv.Itoa(c.vhostPort)))
	if c.GatewayURL, err = c.serve(ctx, gateway, tlsConfig); err != nil {
		return nil, err
	}
	return c, nil
}

// serve runs a server on a free port of loopback and returns its URL.
func (c *ControlPlane) serve(ctx context.Context, handler http.Handler, tlsConfig *tls.Config) (string, error) {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	server := &http.Server{
		Handler: handler, TLSConfig: tlsConfig, ReadHeaderTimeout: 30 * time.Second,
		ErrorLog: slog.NewLogLogger(c.options.Log.Handler(), slog.LevelDebug),
	}
	c.servers = append(c.servers, server)
	if tlsConfig == nil {
		go func() { _ = server.Serve(listener) }()
		return "http://" + listener.Addr().String(), nil
	}
	go func() { _ = server.ServeTLS(listener, "", "") }()
	return "https://" + listener.Addr().String(), nil
}

// Close stops the control plane and its frps.
func (c *ControlPlane) Close() {
	for _, s := range c.servers {
		_ = s.Close()
	}
	c.StopFrps()
}

// SetAgent lets an agent authenticate with a token; the one it had is worth nothing from then on.
func (c *ControlPlane) SetAgent(id, token string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.agents[id] = token
}

// RevokeLeases makes frps refuse every lease that was given until now.
func (c *ControlPlane) RevokeLeases() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.leases)
}

// Fail makes handler answer instead of the authentication endpoint; nil ends that.
func (c *ControlPlane) Fail(handler http.Handler) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault = handler
}

// authenticate trades an agent's token for a lease.
func (c *ControlPlane) authenticate(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	fault := c.fault
	c.mu.Unlock()
	if fault != nil {
		fault.ServeHTTP(w, r)
		return
	}
	var request struct {
		AgentID  string `json:"agent_id"`
		Instance string `json:"instance"`
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&request); err != nil {
		writeJSON(w, http.StatusBadRequest, map[string]string{"error": err.Error()})
		return
	}
	shown, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	c.mu.Lock()
	defer c.mu.Unlock()
	token := c.agents[request.AgentID]
	if token == "" || subtle.ConstantTimeCompare([]byte(shown), []byte(token)) != 1 {
		c.options.Log.Warn("agent refused", "agent_id", request.AgentID)
		writeJSON(w, http.StatusUnauthorized, map[string]string{"error": "unknown agent or wrong token"})
		return
	}
	credential := rand.Text()
	l := lease{agentID: request.AgentID, expires: time.Now().Add(leaseTime).UTC().Truncate(time.Second), groupKey: rand.Text()}
	for _, other := range c.leases { // the instances of one agent share the key of their group
		if other.agentID == l.agentID {
			l.groupKey = other.groupKey
		}
	}
	c.leases[credential] = l
	c.options.Log.Info("lease given", "agent_id", request.AgentID, "instance", request.Instance, "expires_at", l.expires)
	writeJSON(w, http.StatusOK, map[string]any{
		"frp_token": c.frpToken, "expires_at": l.expires, "auth_method": "token",
		"server_addr": "127.0.0.1", "server_port": c.FrpsPort,
		"metadatas": map[string]string{"agent_id": l.agentID, "lease": credential},
		"tunnel":    frpc.Tunnel{Type: "http", Subdomain: l.agentID, Group: l.agentID, GroupKey: frpc.Secret(l.groupKey)},
	})
}

func writeJSON(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}
