package server

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

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// What a runner and its commands may cost.
const (
	maxEndpoint       = 2 << 10          // bytes
	maxToken          = 8 << 10          // bytes
	maxCommand        = 10 << 20         // bytes
	maxCommandAnswer  = 64 << 20         // bytes; more is cut off
	maxCommandHeaders = 16 << 10         // bytes, of the answer
	commandHeaders    = 30 * time.Second // from the command's last byte
	commandTotal      = 5 * time.Minute
)

// registryTime is how long the registry may take to be read or changed.
const registryTime = 10 * time.Second

// registryName is the Secret that holds the registry: a key for each runner, and processedKey. A runner's id
// begins with a letter or digit, so that it is never that key.
const (
	registryName = "pipeops-agent-runners"
	processedKey = "_processed" // ids of the last messages that changed the registry
	maxProcessed = 256
)

var runnerIDPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// runner is where commands for one runner go.
type runner struct {
	Endpoint   string      `json:"runner_endpoint"`
	Token      frpc.Secret `json:"runner_token"`
	AssignedAt *string     `json:"assigned_at,omitempty"`
}

// runners is the registry, kept in a Secret: it outlives pods, and replicas share it.
type runners struct {
	api       *kube.Proxy
	namespace string
	allowed   []string // hosts
	transport *http.Transport
	running   chan struct{} // holds one for each command that runs
}

func newRunners(api *kube.Proxy, namespace string, allowed []string) *runners {
	r := &runners{api: api, namespace: namespace, allowed: allowed, running: make(chan struct{}, maxCommands)}
	r.transport = &http.Transport{ // no redirects, and no proxy of the environment's
		DialContext:            (&net.Dialer{Timeout: 10 * time.Second, ControlContext: r.mayDial}).DialContext,
		TLSHandshakeTimeout:    10 * time.Second,
		ResponseHeaderTimeout:  commandHeaders,
		MaxResponseHeaderBytes: maxCommandHeaders,
		IdleConnTimeout:        time.Minute,
		DisableCompression:     true,
	}
	return r
}

// relay sends a command to its runner, with the runner's token for the caller's.
func (s *Server) relay(w http.ResponseWriter, r *http.Request, endpoint *url.URL, token frpc.Secret) {
	connected := false // the runner may have got something of the command
	trace := &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { connected = true }}
	relay := &httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL, pr.Out.Host = endpoint, ""
			for _, name := range []string{"Cookie", "X-Real-Ip", "Upgrade", "Connection", "Expect"} {
				pr.Out.Header.Del(name)
			}
			pr.Out.Header.Add("Via", "1.1 "+s.agent.ID)
			pr.Out.Header.Set("Authorization", "Bearer "+token.Reveal()) // never the caller's
		},
		Transport:     s.runners.transport,
		FlushInterval: -1, // answers may be streams
		ModifyResponse: func(resp *http.Response) error {
			if resp.StatusCode < 200 || resp.StatusCode > 599 {
				return fmt.Errorf("its status is %d", resp.StatusCode)
			}
			resp.Body = http.MaxBytesReader(nil, resp.Body, maxCommandAnswer) // an error beyond, and no early end
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, out *http.Request, err error) {
			commandFailed(w, out, endpoint.Host, connected, err)
		},
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	relay.ServeHTTP(w, r.WithContext(httptrace.WithClientTrace(r.Context(), trace)))
}

// commandFailed answers for a runner that did not. r is the request as rewritten.
func commandFailed(w http.ResponseWriter, r *http.Request, host string, connected bool, err error) {
	var tooLarge *http.MaxBytesError
	var timeout net.Error
	late := errors.As(err, &timeout) && timeout.Timeout()
	cause := context.Cause(r.Context())
	unread := w.(*recorder).body.Failure() // observe has put it there
	code, what, do := http.StatusBadGateway, "broke off or gave no valid answer", "it may have done the command: look at its log"
	switch {
	case errors.As(err, &tooLarge):
		writeProblem(w, http.StatusRequestEntityTooLarge, fmt.Sprintf("the command is larger than %d bytes", tooLarge.Limit))
		return
	case errors.Is(cause, context.Canceled) && !errors.Is(unread, os.ErrDeadlineExceeded):
		panic(http.ErrAbortHandler) // the caller has gone
	case unread != nil:
		unreadable(w, unread, commandTotal)
		return
	case errors.Is(cause, kube.ErrShutdown):
		late, what, err = true, "has not answered", errors.New("the agent has stopped")
	case errors.Is(err, errForbiddenAddress):
		what, do = "is not called", "give the runner an endpoint in the cluster, or list its IP among runners.allowed_hosts"
	case !connected:
		what, do = "cannot be reached", "check that it runs, and its endpoint"
	case late:
		what = "does not answer"
	}
	if late {
		code = http.StatusGatewayTimeout
	}
	writeProblem(w, code, fmt.Sprintf("the runner at %s %s: %v: %s", host, what, err, do))
}

// namePattern is what DNS names are made of. No last label begins with a digit: some resolvers would read an IP.
var namePattern = regexp.MustCompile(`^([a-z0-9_-]+\.)*[a-z][a-z0-9_-]*$`)

// allow says why an endpoint may not be used, or returns it parsed. What the dialer could take for another host
// than is compared here, such as one with a zone, is refused.
func (r *runners) allow(endpoint string) (*url.URL, error) {
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
	if !slices.ContainsFunc(r.allowed, func(allowed string) bool {
		if ip.IsValid() { // it has many notations, and is below no domain
			exact, _ := netip.ParseAddr(allowed)
			return exact.Unmap() == ip.Unmap()
		}
		domain, wild := strings.CutPrefix(allowed, "*")
		return host == allowed || wild && strings.HasSuffix(host, domain)
	}) {
		return nil, fmt.Errorf("names the host %.253q, which is not among runners.allowed_hosts (%s)", host, strings.Join(r.allowed, ", "))
	}
	return u, nil
}

var errForbiddenAddress = errors.New("its name leads to loopback, to a link-local address or to a cloud's metadata")

// metadataAddrs are where clouds tell machines their credentials, beside the link-local 169.254.169.254.
var metadataAddrs = []string{"fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "fd00:c1::a9fe:a9fe", "100.100.100.200", "192.0.0.192", "168.63.129.16"}

// mayDial refuses addresses that an allowed name should not lead to, such as an ExternalName Service. It is asked
// after the name is resolved. An address that is listed as such may be dialled.
func (r *runners) mayDial(_ context.Context, _, address string, _ syscall.RawConn) error {
	addr, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	ip := addr.Addr().Unmap().WithZone("")
	listed := slices.ContainsFunc(r.allowed, func(allowed string) bool {
		exact, err := netip.ParseAddr(allowed)
		return err == nil && exact.Unmap() == ip
	})
	if !listed && (ip.IsLoopback() || ip.IsUnspecified() || ip.IsLinkLocalUnicast() || ip.IsMulticast() || slices.Contains(metadataAddrs, ip.String())) {
		return fmt.Errorf("%w (%s)", errForbiddenAddress, ip)
	}
	return nil
}

// change applies a message to the registry, once.
func (r *runners) change(ctx context.Context, messageID string, apply func(map[string][]byte) error) (duplicate bool, err error) {
	err = r.api.ChangeSecret(ctx, r.namespace, registryName, func(data map[string][]byte) (bool, error) {
		var processed []string
		if stored := data[processedKey]; stored != nil {
			if err := json.Unmarshal(stored, &processed); err != nil {
				return false, fmt.Errorf("the key %s of Secret %s/%s is not a list: delete it", processedKey, r.namespace, registryName)
			}
		}
		if duplicate = slices.Contains(processed, messageID); duplicate {
			return false, nil
		}
		if err := apply(data); err != nil {
			return false, err
		}
		processed = append(processed, messageID)
		data[processedKey], _ = json.Marshal(processed[max(0, len(processed)-maxProcessed):]) // texts can be encoded
		return true, nil
	})
	return duplicate, err
}

// registryFailed answers for an API server that did not let the registry be read or changed. ctx had the time for it.
func registryFailed(ctx context.Context, w http.ResponseWriter, err error) {
	switch {
	case ctx.Err() != nil:
		writeProblem(w, http.StatusGatewayTimeout, err.Error())
	case apierrors.IsInvalid(err) || apierrors.IsRequestEntityTooLargeError(err):
		writeProblem(w, http.StatusInsufficientStorage, "the registry of runners is full: unassign those that are gone: "+err.Error())
	default:
		writeProblem(w, http.StatusBadGateway, err.Error())
	}
}

// printable says whether s is 1 to limit printable ASCII characters without spaces.
func printable(s string, limit int) bool {
	return s != "" && len(s) <= limit && !strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c > '~' })
}

func checkRunnerID(id string) error {
	if !runnerIDPattern.MatchString(id) {
		return invalidError{"data.runner_id: give 1 to 128 letters, digits, dots, hyphens and underscores, a letter or digit first"}
	}
	return nil
}

func (s *Server) runnerAssigned(ctx context.Context, m message) (bool, error) {
	var data struct {
		RunnerID string `json:"runner_id"`
		runner
	}
	if err := decodeStrict("data", m.Data, &data); err != nil {
		return false, err
	}
	if err := checkRunnerID(data.RunnerID); err != nil {
		return false, err
	}
	if _, err := s.runners.allow(data.Endpoint); err != nil {
		return false, invalidError{"data.runner_endpoint " + err.Error()}
	}
	if !printable(data.Token.Reveal(), maxToken) {
		return false, invalidError{fmt.Sprintf("data.runner_token: give 1 to %d printable ASCII characters, no spaces", maxToken)}
	}
	if err := checkTime("data.assigned_at", data.AssignedAt); err != nil {
		return false, err
	}
	return s.runners.change(ctx, m.ID, func(registry map[string][]byte) (err error) {
		registry[data.RunnerID], err = json.Marshal(data.runner)
		return err
	})
}

func (s *Server) runnerUnassigned(ctx context.Context, m message) (bool, error) {
	var data struct {
		RunnerID string `json:"runner_id"`
	}
	if err := decodeStrict("data", m.Data, &data); err != nil {
		return false, err
	}
	if err := checkRunnerID(data.RunnerID); err != nil {
		return false, err
	}
	return s.runners.change(ctx, m.ID, func(registry map[string][]byte) error {
		delete(registry, data.RunnerID)
		return nil
	})
}

// command answers POST /api/runners/{runner_id}/command with what the runner answers.
func (s *Server) command(w http.ResponseWriter, r *http.Request) {
	rec := w.(*recorder) // observe has put it there
	rec.streams = true
	defer func() { s.metrics.commands.WithLabelValues(strconv.Itoa(rec.status())).Inc() }()
	id := r.PathValue("runner_id")
	if !runnerIDPattern.MatchString(id) {
		writeProblem(w, http.StatusBadRequest, "the runner's id is not one: letters, digits, dots, hyphens and underscores, a letter or digit first")
		return
	}
	if slices.Contains(kube.ListOf(r, "Via"), "1.1 "+s.agent.ID) {
		writeProblem(w, http.StatusLoopDetected, fmt.Sprintf("the endpoint of runner %q leads back to this agent: assign it another one", id))
		return
	}
	select {
	case s.runners.running <- struct{}{}:
		defer func() { <-s.runners.running }()
	default:
		s.metrics.refused.WithLabelValues("commands").Inc()
		fail(w, r, http.StatusTooManyRequests, "too many commands are being relayed: try again", 1)
		return
	}
	rec.body.Within(commandTotal)
	ctx, cancel := context.WithTimeout(r.Context(), commandTotal)
	defer cancel()
	// Read anew each time: another replica may have changed it.
	reading, cancelReading := context.WithTimeout(ctx, registryTime)
	defer cancelReading()
	registry, err := s.runners.api.ReadSecret(reading, s.runners.namespace, registryName)
	if err != nil {
		registryFailed(reading, w, err)
		return
	}
	stored, known := registry.Data[id]
	if !known {
		writeProblem(w, http.StatusNotFound, fmt.Sprintf("no runner %q is assigned to this agent: send it a runner_assigned message", id))
		return
	}
	var found runner
	if err := json.Unmarshal(stored, &found); err != nil {
		writeProblem(w, http.StatusBadGateway, fmt.Sprintf("the key %s of Secret %s/%s is not a runner: assign it again", id, s.runners.namespace, registryName))
		return
	}
	endpoint, err := s.runners.allow(found.Endpoint) // the setting may have changed since
	if err != nil {
		writeProblem(w, http.StatusBadGateway, "the runner's endpoint "+err.Error())
		return
	}
	endpoint.RawQuery = strings.Trim(endpoint.RawQuery+"&"+r.URL.RawQuery, "&")
	r = r.WithContext(ctx)
	r.Body = http.MaxBytesReader(w, r.Body, maxCommand)
	s.relay(w, r, endpoint, found.Token)
}
