// Package runners keeps the registry of the runners that are assigned to the agent, and relays commands to them.
package runners

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc/secret"
	"github.com/pipeops/vm-agent/proxy/answer"
	"github.com/pipeops/vm-agent/proxy/kube"
)

const (
	// RegistryTimeout is how long reading or changing the registry may take.
	RegistryTimeout = 10 * time.Second

	// The registry is a Secret with a key for each runner, and processedKey. A runner's id begins with a letter or
	// digit, so it is never that key.
	registryName = agentapi.RunnersRegistry
	processedKey = "_processed" // ids of the last messages that changed the registry
	maxProcessed = 256
	maxToken     = 8 << 10 // bytes

	// Limits of a command.
	HeaderTimeout  = 30 * time.Second // from the command's last byte to the answer's headers
	CommandTimeout = 5 * time.Minute  // from the command's headers to the end of the answer
	MaxCommands    = 32               // that are relayed at a time

	maxEndpoint      = 2 << 10  // bytes
	maxCommand       = 10 << 20 // bytes
	maxAnswer        = 64 << 20 // bytes; the rest is cut off
	maxAnswerHeaders = 16 << 10 // bytes

	validID      = "1 to 128 letters, digits, dots, hyphens and underscores, a letter or digit first"
	errInvalidID = answer.InvalidError("data.runner_id: give " + validID)
)

var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// Runners relays commands to the runners in the registry. The registry is a Secret, so that it survives restarts and
// is shared by all replicas. Safe for concurrent use.
type Runners struct {
	Transport *http.Transport // sends commands; tests replace its dialer

	config  *config.Config
	client  *kube.Client
	refused func()
	log     *slog.Logger
	running chan struct{} // holds one for each command that is being relayed
}

// New returns the runners of a registry, which it does not read yet. It calls refused for each command beyond
// MaxCommands.
func New(client *kube.Client, cfg *config.Config, refused func(), log *slog.Logger) *Runners {
	r := &Runners{config: cfg, client: client, refused: refused, log: log, running: make(chan struct{}, MaxCommands)}
	dialer := &net.Dialer{Timeout: 10 * time.Second, ControlContext: r.checkAddress}
	r.Transport = &http.Transport{ // without the environment's proxy
		DialContext: dialer.DialContext, TLSHandshakeTimeout: 10 * time.Second, IdleConnTimeout: time.Minute,
		ResponseHeaderTimeout: HeaderTimeout, MaxResponseHeaderBytes: maxAnswerHeaders, DisableCompression: true,
	}
	return r
}

// Running returns how many commands are being relayed now.
func (r *Runners) Running() int { return len(r.running) }

// runner is where a runner's commands go, as the registry stores it.
type runner struct {
	Endpoint   string        `json:"runner_endpoint"`
	Token      secret.Secret `json:"runner_token"`
	AssignedAt *string       `json:"assigned_at,omitempty"`
}

// Assignment is the data of a runner_assigned message.
type Assignment struct {
	ID string `json:"runner_id"`
	runner
}

// Assign puts a runner into the registry, or replaces its endpoint and token. It does nothing and returns ErrDuplicate
// if messageID has changed the registry before. An invalid assignment is an [answer.InvalidError] without the token.
func (r *Runners) Assign(ctx context.Context, messageID string, a Assignment) error {
	if !idPattern.MatchString(a.ID) {
		return errInvalidID
	}
	if _, err := r.checkEndpoint(a.Endpoint); err != nil {
		return answer.InvalidError("data.runner_endpoint " + err.Error())
	}
	if !IsPrintable(a.Token.Reveal(), maxToken) {
		return answer.InvalidError(
			fmt.Sprintf("data.runner_token: give 1 to %d printable ASCII characters, no spaces", maxToken))
	}
	return r.change(ctx, messageID, func(registry map[string][]byte) (err error) {
		registry[a.ID], err = json.Marshal(a.runner)
		return err
	})
}

// Unassign removes a runner from the registry, as Assign adds it.
func (r *Runners) Unassign(ctx context.Context, messageID, id string) error {
	if !idPattern.MatchString(id) {
		return errInvalidID
	}
	return r.change(ctx, messageID, func(registry map[string][]byte) error {
		delete(registry, id)
		return nil
	})
}

// ErrDuplicate reports that a message has changed the registry before.
var ErrDuplicate = errors.New("duplicate message")

// change applies a message to the registry, once.
func (r *Runners) change(ctx context.Context, messageID string, apply kube.Change) error {
	return r.client.ChangeSecret(ctx, r.config.Kubernetes.Namespace, registryName, func(data map[string][]byte) error {
		var processed []string
		if stored := data[processedKey]; stored != nil && json.Unmarshal(stored, &processed) != nil {
			return fmt.Errorf("the key %s of Secret %s is not a list: delete it", processedKey, r.name())
		}
		if slices.Contains(processed, messageID) {
			return ErrDuplicate
		}
		processed = append(processed, messageID)
		data[processedKey], _ = json.Marshal(processed[max(0, len(processed)-maxProcessed):]) // strings always encode
		return apply(data)
	})
}

func (r *Runners) name() string { return r.config.Kubernetes.Namespace + "/" + registryName }

// find reads a runner from the registry; nil if it is not there. It keeps no copy, because another replica may change
// the Secret.
func (r *Runners) find(ctx context.Context, id string) (*runner, error) {
	registry, err := r.client.ReadSecret(ctx, r.config.Kubernetes.Namespace, registryName)
	if err != nil || registry.Data[id] == nil {
		return nil, err
	}
	found := &runner{}
	if json.Unmarshal(registry.Data[id], found) != nil {
		return nil, fmt.Errorf("the key %s of Secret %s is not a runner: assign it again", id, r.name())
	}
	return found, nil
}

// WriteError answers for an err of reading or changing the registry, which had the time of ctx.
func WriteError(ctx context.Context, w http.ResponseWriter, err error) {
	code, detail := http.StatusBadGateway, err.Error()
	switch {
	case ctx.Err() != nil:
		code = http.StatusGatewayTimeout
	case apierrors.IsInvalid(err) || apierrors.IsRequestEntityTooLargeError(err):
		code = http.StatusInsufficientStorage
		detail = "the registry of runners is full: unassign those that are gone: " + detail
	}
	answer.WriteProblem(w, code, detail)
}

// IsPrintable reports whether s is 1 to limit printable ASCII characters without spaces.
func IsPrintable(s string, limit int) bool {
	return s != "" && len(s) <= limit && !strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c > '~' })
}

// Relay answers a command for the runner id with that runner's answer. body is the request's, nil if it has none.
func (r *Runners) Relay(w http.ResponseWriter, req *http.Request, id string, body *kube.Body) {
	if !idPattern.MatchString(id) {
		answer.WriteProblem(w, http.StatusBadRequest, "invalid runner id: give "+validID)
		return
	}
	via := "1.1 " + r.config.Agent.ID
	if slices.Contains(kube.ListOf(req, "Via"), via) {
		answer.WriteProblem(w, http.StatusLoopDetected,
			fmt.Sprintf("the endpoint of runner %q leads back to this agent: assign it another one", id))
		return
	}
	select {
	case r.running <- struct{}{}:
		defer func() { <-r.running }()
	default:
		r.refused()
		w.Header().Set("Retry-After", "1")
		answer.WriteProblem(w, http.StatusTooManyRequests, "too many commands are being relayed: try again")
		return
	}
	body.Within(CommandTimeout)
	ctx, cancel := context.WithTimeout(req.Context(), CommandTimeout)
	defer cancel()
	reading, cancelReading := context.WithTimeout(ctx, RegistryTimeout)
	defer cancelReading()
	found, err := r.find(reading, id)
	if err != nil {
		WriteError(reading, w, err)
		return
	}
	if found == nil {
		answer.WriteProblem(w, http.StatusNotFound,
			fmt.Sprintf("no runner %q is assigned to this agent: send it a runner_assigned message", id))
		return
	}
	endpoint, err := r.checkEndpoint(found.Endpoint) // again: the setting may have changed since the assignment
	if err != nil {
		answer.WriteProblem(w, http.StatusBadGateway, "the runner's endpoint "+err.Error())
		return
	}
	endpoint.RawQuery = strings.Trim(endpoint.RawQuery+"&"+req.URL.RawQuery, "&")
	c := &command{host: endpoint.Host, body: body}
	trace := &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { c.connected = true }}
	req = req.WithContext(httptrace.WithClientTrace(ctx, trace))
	req.Body = http.MaxBytesReader(w, req.Body, maxCommand)
	relay := &httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL, pr.Out.Host = endpoint, ""
			kube.RemoveCaller(pr.Out.Header)
			for _, name := range []string{"Upgrade", "Connection", "Sec-Websocket-Protocol"} {
				pr.Out.Header.Del(name)
			}
			pr.Out.Header.Add("Via", via)
			pr.Out.Header.Set("Authorization", "Bearer "+found.Token.Reveal()) // in place of the caller's
		},
		Transport: r.Transport, ModifyResponse: checkAnswer, ErrorHandler: c.fail,
		FlushInterval: -1, // answers may be streams
		ErrorLog:      slog.NewLogLogger(r.log.Handler(), slog.LevelDebug),
	}
	relay.ServeHTTP(w, req)
}

// checkAnswer refuses invalid statuses and limits the body. Beyond the limit reading fails, so that a cut answer does
// not look complete.
func checkAnswer(resp *http.Response) error {
	if resp.StatusCode < 200 || resp.StatusCode > 599 {
		return fmt.Errorf("its status is %d", resp.StatusCode)
	}
	resp.Body = http.MaxBytesReader(nil, resp.Body, maxAnswer)
	return nil
}

// command is a command that is being relayed.
type command struct {
	host      string // of the runner's endpoint
	body      *kube.Body
	connected bool // the runner may have received part of the command
}

// fail answers for a runner that gave no valid answer. out is the request as rewritten.
func (c *command) fail(w http.ResponseWriter, out *http.Request, err error) {
	code, what := http.StatusBadGateway, "broke off or gave no valid answer"
	do := "it may have done the command: check its log"
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		code, what = http.StatusGatewayTimeout, "does not answer"
	}
	ended, _ := errors.AsType[*kube.Ended](context.Cause(out.Context()))
	_, tooLarge := errors.AsType[*http.MaxBytesError](err)
	cause, unread := context.Cause(out.Context()), c.body.Failure()
	switch {
	case tooLarge:
		why := fmt.Sprintf("the command is larger than %d bytes", maxCommand)
		answer.WriteProblem(w, http.StatusRequestEntityTooLarge, why)
		return
	case errors.Is(cause, context.Canceled) && !errors.Is(unread, os.ErrDeadlineExceeded):
		panic(http.ErrAbortHandler) // the caller has gone
	case unread != nil:
		code, why := answer.BodyError(unread, "it took longer than "+CommandTimeout.String())
		answer.WriteProblem(w, code, why)
		return
	case ended != nil:
		code, what, err = http.StatusForbidden, "has not answered", ended
	case errors.Is(cause, kube.ErrShutdown):
		code, what, err = http.StatusGatewayTimeout, "has not answered", errors.New("the agent has stopped")
	case errors.Is(err, errForbiddenAddress):
		what, do = "is not called", "give the runner an endpoint in the cluster, or add its IP to runners.allowed_hosts"
	case !c.connected:
		what, do = "cannot be reached", "check that it runs, and its endpoint"
	}
	answer.WriteProblem(w, code, fmt.Sprintf("the runner at %s %s: %v: %s", c.host, what, err, do))
}

// namePattern matches DNS names. The last label begins with a letter: some resolvers would read any other name as an
// IP.
var namePattern = regexp.MustCompile(`^([a-z0-9_-]+\.)*[a-z][a-z0-9_-]*$`)

// checkEndpoint returns the endpoint parsed, or why it may not be used. It refuses whatever the dialer could take for
// another host than the one compared here, such as an IP with a zone.
func (r *Runners) checkEndpoint(endpoint string) (*url.URL, error) {
	if len(endpoint) > maxEndpoint {
		return nil, fmt.Errorf("is longer than %d bytes", maxEndpoint)
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.Fragment != "" {
		return nil, errors.New("is not an http or https URL without user and fragment")
	}
	if port, err := strconv.ParseUint(u.Port(), 10, 16); u.Port() != "" && (err != nil || port == 0) {
		return nil, errors.New("names a port that is not among 1 to 65535")
	}
	host := strings.ToLower(u.Hostname())
	ip, err := netip.ParseAddr(host)
	if err != nil {
		host = strings.TrimSuffix(host, ".")
	}
	if ip.Zone() != "" || err != nil && !namePattern.MatchString(host) {
		return nil, fmt.Errorf("names the host %.253q, which is neither a DNS name nor an IP", host)
	}
	if !r.allows(host, ip) {
		return nil, fmt.Errorf("names the host %.253q, which is not among runners.allowed_hosts (%s)",
			host, strings.Join(r.config.Runners.AllowedHosts, ", "))
	}
	return u, nil
}

// allows reports whether the allowed hosts name the host. An ip is compared as an address, be it written as IPv4 or
// mapped to IPv6, and belongs to no domain.
func (r *Runners) allows(host string, ip netip.Addr) bool {
	return slices.ContainsFunc(r.config.Runners.AllowedHosts, func(allowed string) bool {
		if ip.IsValid() {
			addr, err := netip.ParseAddr(allowed)
			return err == nil && addr.Unmap() == ip.Unmap()
		}
		domain, wildcard := strings.CutPrefix(allowed, "*")
		return host == allowed || wildcard && strings.HasSuffix(host, domain)
	})
}

var errForbiddenAddress = errors.New("its name resolves to loopback, a link-local address or a cloud's metadata")

// metadataAddrs are where clouds give machines their credentials, beside the link-local 169.254.169.254.
var metadataAddrs = []string{
	"fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "fd00:c1::a9fe:a9fe",
	"100.100.100.200", "192.0.0.192", "168.63.129.16",
}

// checkAddress refuses addresses that an allowed name must not resolve to, for example through an ExternalName Service,
// unless the address itself is among the allowed hosts. The dialer calls it after the name is resolved.
func (r *Runners) checkAddress(_ context.Context, _, address string, _ syscall.RawConn) error {
	addr, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	ip := addr.Addr().Unmap().WithZone("")
	internal := ip.IsLoopback() || ip.IsUnspecified() || ip.IsLinkLocalUnicast() || ip.IsMulticast() ||
		slices.Contains(metadataAddrs, ip.String())
	if internal && !r.allows("", ip) {
		return fmt.Errorf("%w (%s)", errForbiddenAddress, ip)
	}
	return nil
}
