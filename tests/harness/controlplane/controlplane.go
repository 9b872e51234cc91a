// Package controlplane is a small real control plane for development and tests: the authentication endpoint, a stock
// frps with a plugin that checks each agent's own credential, and an HTTPS gateway for callers. It keeps everything
// in memory.
package controlplane

import (
	"cmp"
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
	"strings"
	"sync"
	"time"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/secret"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// Options configure a control plane.
type Options struct {
	Group  *process.Group
	Agents map[string]string // token by agent id
	Log    *slog.Logger
	Token  bool   // leases hold frp's shared token, which frpc reads once, instead of a token of OpenID Connect
	IP     string // this machine's, to listen on and for agents to find it at; default: 127.0.0.1
	Host   string // of frps, in leases, and in the certificates; default: IP

	Requested func() // is called for each request for a lease; may be nil

	// The gateway's part in the agents' access.identity.
	Identity string          // agent (default), named or own
	Users    map[string]User // of the gateway, by token, for identity named
}

// User is a user of the gateway, as it names them to agents.
type User struct {
	Name   string
	Groups []string
}

// Terms are the terms of the leases that are given from now on.
type Terms struct {
	Life       time.Duration // how long an agent may log in; 0: forever
	TunnelType string        // http or https; empty: what the agent wants
	Ahead      time.Duration // how far the clock of the authentication endpoint is ahead; frps's is right
}

// ControlPlane is a running control plane. All its addresses are on one IP.
type ControlPlane struct {
	APIURL     string `json:"api_url"`     // where agents authenticate
	GatewayURL string `json:"gateway_url"` // where callers reach agents, below /agents/{id}
	CAFile     string `json:"ca_file"`     // PEM: signs the certificates of all three servers
	CA         []byte `json:"-"`           // the same

	*Frps // the first, of all agents that are not assigned to another

	API, Gateway *Server `json:"-"`

	options   Options
	frpToken  string  // frp's shared token
	issuer    *issuer // nil: leases hold frp's shared token
	dir       string
	pluginURL string
	servers   []*Server

	mu       sync.Mutex
	agents   map[string]string
	assigned map[string]*Frps // by agent id
	revoked  map[string]bool
	terms    Terms
	leases   map[string]lease     // by the id that stands in an agent's token or metadatas
	latest   map[string]lease     // by agent id: the last that was given
	given    int                  // how many leases were given
	tunnels  map[string]string    // by agent id: the type of the tunnel that frps was last let to open
	opened   map[string]time.Time // by agent id: when that was
	refusals map[string]refusal   // by agent id: why frps was last told to refuse it
	shown    []tls.Certificate    // by the gateway to agents
	fault    http.Handler         // answers instead of the authentication endpoint, for tests
}

// lease is the lease of one instance of an agent.
type lease struct {
	agentID     string
	groupKey    string
	expires     time.Time // zero: never
	tunnel      frpc.Tunnel
	certificate string // PEM: what the agent shows to callers of a tunnel of type https
}

func (l lease) ended() bool { return !l.expires.IsZero() && time.Now().After(l.expires) }

type refusal struct {
	at     time.Time
	reason string
}

// Start runs a control plane until Close, or until ctx ends.
func Start(ctx context.Context, options Options) (*ControlPlane, error) {
	options.IP = cmp.Or(options.IP, "127.0.0.1")
	dir, err := options.Group.Mkdir("controlplane")
	if err != nil {
		return nil, err
	}
	c := &ControlPlane{
		CAFile: filepath.Join(dir, "ca.crt"), options: options, frpToken: rand.Text(), dir: dir,
		agents: maps.Clone(options.Agents), assigned: map[string]*Frps{}, revoked: map[string]bool{},
		terms: Terms{Life: 24 * time.Hour}, leases: map[string]lease{}, latest: map[string]lease{},
		tunnels: map[string]string{}, opened: map[string]time.Time{}, refusals: map[string]refusal{},
	}
	c.Frps = &Frps{cp: c}
	var names []string
	if options.Host != "" {
		names = []string{options.Host}
	}
	cert, err := writeCertificates(dir, net.ParseIP(options.IP), names...)
	if err != nil {
		return nil, err
	}
	if c.CA, err = os.ReadFile(c.CAFile); err != nil {
		return nil, err
	}
	tlsConfig := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}

	api := http.NewServeMux()
	api.HandleFunc("POST /auth/frp-token", c.authenticate)
	if c.API, c.APIURL, err = c.serve(ctx, api, tlsConfig); err != nil {
		return nil, err
	}
	if _, c.pluginURL, err = c.serve(ctx, http.HandlerFunc(c.plugin), nil); err != nil {
		return nil, err
	}
	if !options.Token {
		if c.issuer, err = newIssuer(); err != nil {
			return nil, err
		}
		if _, c.issuer.url, err = c.serve(ctx, c.issuer, nil); err != nil {
			return nil, err
		}
	}
	if err := c.MoveFrps(ctx); err != nil {
		return nil, err
	}
	if c.Gateway, c.GatewayURL, err = c.serve(ctx, c.gateway(), tlsConfig); err != nil {
		return nil, err
	}
	return c, nil
}

// serve runs a server on a free port and returns it with its URL.
func (c *ControlPlane) serve(
	ctx context.Context, handler http.Handler, tlsConfig *tls.Config,
) (*Server, string, error) {
	s := &Server{address: net.JoinHostPort(c.options.IP, "0"), make: func() *http.Server {
		server := &http.Server{
			Handler: handler, ReadHeaderTimeout: 30 * time.Second,
			ErrorLog: slog.NewLogLogger(c.options.Log.Handler(), slog.LevelDebug),
		}
		if tlsConfig != nil {
			server.TLSConfig = tlsConfig.Clone() // the server changes it
		}
		return server
	}}
	if err := s.Start(ctx); err != nil {
		return nil, "", err
	}
	c.servers = append(c.servers, s)
	if tlsConfig != nil {
		return s, "https://" + s.address, nil
	}
	return s, "http://" + s.address, nil
}

// Close stops the control plane and its first frps.
func (c *ControlPlane) Close() {
	for _, s := range c.servers {
		s.Stop()
	}
	c.StopFrps()
}

// SetAgent lets an agent authenticate with a token. Its previous token is invalid from then on.
func (c *ControlPlane) SetAgent(id, token string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.agents[id] = token
}

// Revoke revokes an agent, or accepts it again if revoked is false.
func (c *ControlPlane) Revoke(id string, revoked bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.revoked[id] = revoked
}

// SetTerms sets the terms of the next leases.
func (c *ControlPlane) SetTerms(terms Terms) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.terms = terms
}

// Show sets the client certificate that the gateway shows to agents that require one.
func (c *ControlPlane) Show(certificate tls.Certificate) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.shown = []tls.Certificate{certificate}
}

// RevokeLeases makes frps refuse every lease that has been given.
func (c *ControlPlane) RevokeLeases() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.leases)
	clear(c.latest)
}

// LeasesGiven returns how many leases have been given.
func (c *ControlPlane) LeasesGiven() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.given
}

// OpenedSince returns for how many of these agents a frps was let open a tunnel since then.
func (c *ControlPlane) OpenedSince(then time.Time, agents []string) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range agents {
		if c.opened[id].After(then) {
			n++
		}
	}
	return n
}

// Fail makes handler answer in place of the authentication endpoint, until Fail(nil).
func (c *ControlPlane) Fail(handler http.Handler) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault = handler
}

// authenticate exchanges an agent's token for a lease.
func (c *ControlPlane) authenticate(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	fault := c.fault
	c.mu.Unlock()
	if c.options.Requested != nil {
		c.options.Requested()
	}
	if fault != nil {
		fault.ServeHTTP(w, r)
		return
	}
	var request struct {
		AgentID     string `json:"agent_id"`
		Instance    string `json:"instance"`
		Certificate string `json:"tls_certificate"`
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
		// Not revoked: the right token may be on its way to the agent.
		c.options.Log.Warn("agent refused", "agent_id", request.AgentID)
		writeJSON(w, http.StatusUnauthorized, map[string]string{"error": "unknown agent or wrong token"})
		return
	}
	if c.revoked[request.AgentID] {
		writeJSON(w, http.StatusForbidden, map[string]any{"error": "the agent was revoked", "revoked": true})
		return
	}
	id := rand.Text()
	l := lease{agentID: request.AgentID, groupKey: rand.Text(), certificate: request.Certificate}
	if before, ok := c.latest[l.agentID]; ok {
		l.groupKey = before.groupKey // the instances of one agent share the key of their group
	}
	if c.terms.Life != 0 {
		l.expires = time.Now().Add(c.terms.Life).UTC().Truncate(time.Second)
	}
	l.tunnel = frpc.Tunnel{Type: c.terms.TunnelType, Group: l.agentID, GroupKey: secret.Secret(l.groupKey)}
	if l.tunnel.Type == "" {
		l.tunnel.Type = "http"
		if l.certificate != "" {
			l.tunnel.Type = "https"
		}
	}
	if l.tunnel.Type == "https" {
		l.tunnel.CustomDomains = []string{l.agentID + "." + tlsDomain}
	} else {
		l.tunnel.Subdomain = l.agentID
	}
	answer := map[string]any{
		"server_addr": cmp.Or(c.options.Host, c.options.IP), "server_port": c.frpsOf(l.agentID).FrpsPort,
		"tunnel": l.tunnel,
	}
	if !l.expires.IsZero() {
		answer["expires_at"] = l.expires.Add(c.terms.Ahead)
	}
	w.Header().Set("Date", time.Now().Add(c.terms.Ahead).UTC().Format(http.TimeFormat))
	if c.issuer == nil {
		answer["auth_method"], answer["frp_token"], answer["metadatas"] = "token", c.frpToken, metadatas(l.agentID, id)
	} else {
		token, err := c.issuer.token(l.agentID, id, l.expires)
		if err != nil {
			writeJSON(w, http.StatusInternalServerError, map[string]string{"error": err.Error()})
			return
		}
		// No metadatas: the plugin takes them from the token, so that frpc.toml stays as it is.
		answer["auth_method"], answer["frp_token"] = "oidc", token
	}
	c.leases[id], c.latest[l.agentID] = l, l
	c.given++
	c.options.Log.Info("lease given", "agent_id", request.AgentID, "instance", request.Instance, "expires_at", l.expires,
		"tunnel_type", l.tunnel.Type)
	writeJSON(w, http.StatusOK, answer)
}

// metadatas identify an agent and its lease to the plugin.
func metadatas(agentID, lease string) map[string]string {
	return map[string]string{"agent_id": agentID, "lease": lease}
}

func writeJSON(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}
