package controlplane

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pipeops/vm-agent/proxy/kube"
)

// agentHeader is the header of every answer that an agent gives.
const agentHeader = "Pipeops-Agent"

// gateway forwards /agents/{id}/… to the agent with this id, through frps's vhost port. It is HTTPS, because kubectl
// sends no token over http, and leaves authentication to the agent. If the tunnel is of type https, it speaks TLS
// with the agent itself, and trusts only the certificate that the agent has sent to the authentication endpoint.
//
// What it adds to a request depends on the agents' access.identity: see introduce.
func (c *ControlPlane) gateway() http.Handler {
	rp := &httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			id, path, _ := cutAgent(pr.In.URL.Path)
			_, rawPath, _ := cutAgent(pr.In.URL.EscapedPath())
			pr.Out.URL.Scheme, pr.Out.URL.Host, pr.Out.Host = "http", id+"."+domain, id+"."+domain
			if c.tunnelType(id) == "https" {
				pr.Out.URL.Scheme, pr.Out.URL.Host = "https", id+"."+tlsDomain
			}
			pr.Out.URL.Path, pr.Out.URL.RawPath = path, rawPath
			pr.Out.URL.RawQuery = pr.In.URL.RawQuery
			// frps forwards tunnels of type http with a ReverseProxy of its own, which loses answers to bodies that come
			// with their length: see whole. It cannot be told to do otherwise, but chunks it forwards whole.
			if pr.Out.URL.Scheme == "http" && pr.Out.ContentLength > 0 {
				pr.Out.ContentLength = -1
			}
			// The gateway tells callers to continue; a second 100 from behind would race with its own.
			pr.Out.Header.Del("Expect")
			// Else frps's transport asks for gzip on its own, has the API server compress, and unpacks it again.
			if pr.In.Header.Get("Accept-Encoding") == "" {
				pr.Out.Header.Set("Accept-Encoding", "identity")
			}
			if forUsers(path) {
				c.introduce(pr, id)
			}
		},
		ModifyResponse: func(resp *http.Response) error {
			id, _, _ := strings.Cut(resp.Request.Host, ".")
			bare := resp.StatusCode == http.StatusBadRequest || resp.StatusCode == http.StatusRequestHeaderFieldsTooLarge
			if resp.Header.Get(agentHeader) != id && !bare { // net/http says these by itself, and so does an agent's
				return errNoAgent
			}
			return nil
		},
		BufferPool:   &buffers{sync.Pool{New: func() any { return new([32 << 10]byte) }}},
		ErrorHandler: c.unavailable,
		ErrorLog:     slog.NewLogLogger(c.options.Log.Handler(), slog.LevelDebug),
		Transport:    &toAgents{c.transport("h2", "http/1.1"), c.transport("http/1.1")},
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, path, ok := cutAgent(r.URL.Path)
		c.mu.Lock()
		_, known := c.agents[id]
		c.mu.Unlock()
		if !ok || !known {
			// kubectl would take 404 for an object that does not exist.
			kube.WriteStatus(w, r, http.StatusForbidden,
				fmt.Sprintf("the control plane knows no agent %.100q: "+
					"the server URL is https://<gateway>/agents/<agent id>/api/k8s", id), 0)
			return
		}
		if _, known := c.user(r); c.options.Identity == "named" && forUsers(path) && !known {
			w.Header().Set("WWW-Authenticate", `Bearer realm="gateway"`)
			kube.WriteStatus(w, r, http.StatusUnauthorized, "the gateway knows no user with this token", 0)
			return
		}
		whole(rp, w, r)
	})
}

// toAgents sends requests to agents: over HTTP/2, but over HTTP/1.1 upgrades, which HTTP/2 has not, and large bodies,
// which its flow control makes slow over a distance.
type toAgents struct{ http2, http1 *http.Transport }

func (t *toAgents) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Header.Get("Upgrade") != "" || r.ContentLength > keptBody || r.ContentLength < 0 || r.URL.Scheme == "http" {
		return t.http1.RoundTrip(r)
	}
	return t.http2.RoundTrip(r)
}

// transport returns a transport that offers the agents' TLS these protocols.
func (c *ControlPlane) transport(protocols ...string) *http.Transport {
	t := &http.Transport{
		MaxIdleConnsPerHost: 100, DisableCompression: true, IdleConnTimeout: 50 * time.Second,
		ResponseHeaderTimeout: 2 * time.Minute,
		DialContext:           c.dial,
		DialTLSContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			return c.dialAgent(ctx, addr, protocols)
		},
	}
	if len(protocols) > 1 {
		t.ForceAttemptHTTP2 = true
		// Of the connections that are being made, not of those that are open. So requests that come together make one
		// connection, and frps, which deals connections out in turn, gives the next one to another replica.
		t.MaxConnsPerHost = 1
		// A connection that has died silently is noticed.
		t.HTTP2 = &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 5 * time.Second}
	}
	return t
}

// dialTimeout bounds a connection to frps, and again the handshake with an agent: frps, or what is on the way, may
// accept a connection and say nothing. Callers of HTTP/2 wait for each other's dials.
const dialTimeout = 5 * time.Second

// keptBody is how many bytes an agent takes of a body at once.
const keptBody = 256 << 10

// forUsers reports whether an agent serves a path by the caller's identity. All other routes, those of runners too, are
// for whoever has the agent's token, and know no user: the gateway lends it to nobody there.
func forUsers(path string) bool { return strings.HasPrefix(path, "/api/k8s/") }

// user returns the user whose token a request shows.
func (c *ControlPlane) user(r *http.Request) (User, bool) {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	user, known := c.options.Users[token]
	return user, known
}

// introduce says to an agent who calls. It looks the user up in the request as it came, and sets headers of the
// outgoing one, from which those that the caller's Connection header names are gone already: a caller can neither add
// to what is set here nor remove it.
//
//   - agent: nothing is added. The callers have the agent's token.
//   - named: the agent's token, and the user as Impersonate-User and -Group. A caller's Impersonate-* are removed, or
//     the caller would choose who they are.
//   - own: the agent's token in a header of its own. The caller's credential is for the cluster and passes, with
//     Impersonate-*.
func (c *ControlPlane) introduce(pr *httputil.ProxyRequest, id string) {
	c.mu.Lock()
	agentToken := c.agents[id]
	c.mu.Unlock()
	const gate = "Pipeops-Agent-Authorization"
	header := pr.Out.Header
	header.Del(gate)
	switch c.options.Identity {
	case "named":
		user, _ := c.user(pr.In)
		for name := range header {
			if strings.HasPrefix(name, "Impersonate-") { // net/http has made the names canonical
				header.Del(name)
			}
		}
		header.Set("Authorization", "Bearer "+agentToken)
		header.Set("Impersonate-User", user.Name)
		for _, group := range user.Groups {
			header.Add("Impersonate-Group", group)
		}
	case "own":
		header.Set(gate, "Bearer "+agentToken)
	}
}

// whole keeps net/http from closing the body of an HTTP/1.1 request when its answer begins. The transport may still
// read from the body then: an answer may come before the end of the body, and if the length is known, the transport
// reads once more after the last byte. It would take a closed body for a failure, and close the connection before the
// rest of the answer.
//
// A body of up to keptBody bytes is read first, so that the transport can send it again if an agent that stops has not
// taken it (GOAWAY).
func whole(next http.Handler, w http.ResponseWriter, r *http.Request) {
	if 0 < r.ContentLength && r.ContentLength <= keptBody {
		data, err := io.ReadAll(r.Body)
		if err != nil {
			kube.WriteStatus(w, r, http.StatusBadRequest, "the body of the request cannot be read: "+err.Error(), 0)
			return
		}
		r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
		r.Body, _ = r.GetBody()
	}
	if r.ContentLength == 0 || r.GetBody != nil {
		next.ServeHTTP(w, r)
		return
	}
	control := http.NewResponseController(w)
	_ = control.EnableFullDuplex()
	next.ServeHTTP(w, r)
	// What is left of the body must be read here: net/http panics if it is left to it (Go 1.26, finishRequest). What does
	// not come soon must not be taken for the next request.
	_ = control.Flush()
	_ = control.SetReadDeadline(time.Now().Add(2 * time.Second))
	if r.Body.Close() != nil {
		panic(http.ErrAbortHandler)
	}
}

// buffers holds the buffers with which ReverseProxy copies answers. Without it every answer, however small, allocates
// 32 KiB.
type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte { return b.pool.Get().(*[32 << 10]byte)[:] }

func (b *buffers) Put(buffer []byte) { b.pool.Put((*[32 << 10]byte)(buffer)) }

func (c *ControlPlane) tunnelType(id string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tunnels[id]
}

// dial connects to frps's port for tunnels of type http, if frps was ever allowed to open one for the agent.
func (c *ControlPlane) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	id, _, _ := strings.Cut(addr, ".")
	if c.tunnelType(id) == "" {
		return nil, notDelivered{errNoAgent}
	}
	c.mu.Lock()
	addr = net.JoinHostPort(c.options.IP, strconv.Itoa(c.frpsOf(id).vhostPort))
	c.mu.Unlock()
	return dialFrps(ctx, addr)
}

func dialFrps(ctx context.Context, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, notDelivered{err}
	}
	return conn, nil
}

// Direct returns the address at which frps accepts an agent's callers, for a tunnel of type https, and the
// configuration with which they speak TLS with the agent itself. It trusts the certificates that the agent's leases
// were requested with.
func (c *ControlPlane) Direct(id string) (addr string, config *tls.Config) {
	config = &tls.Config{ServerName: id + "." + tlsDomain, MinVersion: tls.VersionTLS12, InsecureSkipVerify: true}
	config.VerifyConnection = func(state tls.ConnectionState) error {
		trusted := x509.NewCertPool()
		c.mu.Lock()
		for _, l := range c.leases {
			if l.agentID == id { // the certificates expire some minutes after their lease
				trusted.AppendCertsFromPEM([]byte(l.certificate))
			}
		}
		c.mu.Unlock()
		_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{DNSName: config.ServerName, Roots: trusted})
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return net.JoinHostPort(c.options.IP, strconv.Itoa(c.frpsOf(id).vhostTLSPort)), config
}

// dialAgent opens a TLS connection to an agent. frps finds the agent by the name in the handshake.
func (c *ControlPlane) dialAgent(ctx context.Context, addr string, protocols []string) (net.Conn, error) {
	name, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	id, _ := strings.CutSuffix(name, "."+tlsDomain)
	addr, config := c.Direct(id)
	c.mu.Lock()
	config.Certificates, config.NextProtos = c.shown, protocols
	c.mu.Unlock()
	conn, err := dialFrps(ctx, addr)
	if err != nil {
		return nil, err
	}
	tlsConn := tls.Client(conn, config)
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if err := tlsConn.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, notDelivered{fmt.Errorf("%w: %w", errNoAgent, err)}
	}
	return tlsConn, nil
}

// errNoAgent stands for an answer that no agent gave. frps answers 404 for a tunnel that is not up, which kubectl
// would take for an object that does not exist. It also answers 404 if the connection to an agent breaks that has
// received the request.
var errNoAgent = errors.New("no agent is connected")

// notDelivered is a failure before any part of the request was sent to the agent.
type notDelivered struct{ error }

func (e notDelivered) Unwrap() error { return e.error }

// unavailable answers for an agent that did not. r is the request as rewritten.
//
// If a retry is safe, it answers 503 with Retry-After. client-go retries ten times, so that kubectl survives the
// restart of a hop. But client-go would also retry a write, so a write that may have been done is answered with 502,
// and its caller must look.
func (c *ControlPlane) unavailable(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, context.Canceled) {
		panic(http.ErrAbortHandler) // the caller has gone; returning would answer 200
	}
	id, _, _ := strings.Cut(r.Host, ".")
	var message string
	// net/http has no type for the error of a body too large to be sent again to an agent that has not taken it.
	undelivered := errors.As(err, &notDelivered{}) || strings.Contains(err.Error(), "cannot retry err")
	switch {
	case strings.Contains(err.Error(), "request header list larger"): // nor for the one of HTTP/2 that sends no 431
		kube.WriteStatus(w, r, http.StatusRequestHeaderFieldsTooLarge, "the headers of the request are too large", 0)
		return
	case errors.Is(err, errNoAgent):
		message = fmt.Sprintf("agent %q is not connected to the control plane: "+
			"look at its pod's bootstrap and frpc logs, and at GET /ready on its port 9090", id)
		c.mu.Lock()
		refused, ok := c.refusals[id]
		c.mu.Unlock()
		if ok {
			message += fmt.Sprintf("; frps refused its tunnel at %s: %s", refused.at.UTC().Format(time.RFC3339), refused.reason)
		}
	case undelivered:
		message = fmt.Sprintf("the gateway cannot reach frps: %v: check that the control plane's frps runs", err)
	default:
		message = fmt.Sprintf("the connection to agent %q broke before it answered: %v", id, err)
	}
	// Upgrade excludes exec, which is a GET.
	reads := (r.Method == http.MethodGet || r.Method == http.MethodHead) && r.Header.Get("Upgrade") == ""
	if undelivered || reads {
		kube.WriteStatus(w, r, http.StatusServiceUnavailable, message, 1)
		return
	}
	kube.WriteStatus(w, r, http.StatusBadGateway,
		"the request may have reached the agent: check whether the request took effect; "+message, 0)
}

// cutAgent splits /agents/{id}/rest into id and /rest. It accepts encoded and decoded paths.
func cutAgent(path string) (id, rest string, ok bool) {
	path, ok = strings.CutPrefix(path, "/agents/")
	id, rest, _ = strings.Cut(path, "/")
	return id, "/" + rest, ok
}
