package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

// checker checks a control plane against the contract of bootstrap/CONTROL-PLANE.md.
type checker struct {
	api, id, token, revokedID, revokedToken, frps, gateway, away string
	client                                                       *http.Client
}

const usage = `Usage: controlplane check [flags] URL

Holds the control plane at URL (the agents' agent.api_url) to the contract, and prints a line for each of its rules.

`

// check runs the checks that usage describes.
func check(ctx context.Context, args []string, stdout io.Writer) error {
	c := &checker{}
	flags := flag.NewFlagSet("controlplane check", flag.ContinueOnError)
	flags.Usage = func() { _, _ = fmt.Fprint(flags.Output(), usage); flags.PrintDefaults() }
	text := func(into *string) func(path string) error {
		return func(path string) error {
			data, err := os.ReadFile(path)
			*into = strings.TrimSpace(string(data))
			return err
		}
	}
	var authorities string
	flags.StringVar(&c.id, "agent-id", "", "`id` of an agent that may connect")
	flags.Func("token-file", "`file` of its token", text(&c.token))
	flags.StringVar(&c.revokedID, "revoked-id", "", "`id` of an agent that is revoked")
	flags.Func("revoked-token-file", "`file` of its token", text(&c.revokedToken))
	flags.Func("ca-file", "PEM `file` of the authorities that sign the certificates (default: the system's)",
		text(&authorities))
	flags.StringVar(&c.frps, "frps", "", "`host` that agents have as frp.server_addr, if leases name loopback")
	flags.StringVar(&c.gateway, "gateway", "",
		"`URL` of the agent for callers, if it is connected: /version and /api/k8s are below")
	flags.StringVar(&c.away, "away", "", "`URL` for callers of an agent that is known and not connected")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 || c.id == "" || c.token == "" {
		return errors.New("check needs --agent-id, --token-file, and one URL behind the flags")
	}
	c.api = strings.TrimRight(flags.Arg(0), "/")
	c.gateway = strings.TrimRight(c.gateway, "/")
	c.away = strings.TrimRight(c.away, "/")
	// HTTP/1.1, which can be upgraded
	transport := &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}, MaxIdleConnsPerHost: 8}
	if authorities != "" {
		transport.TLSClientConfig.RootCAs = x509.NewCertPool()
		transport.TLSClientConfig.RootCAs.AppendCertsFromPEM([]byte(authorities))
	}
	defer transport.CloseIdleConnections()
	c.client = &http.Client{Transport: transport, Timeout: 30 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	failures := 0
	for _, rule := range c.rules() {
		result, detail := "skipped", rule.unless
		if detail == "" {
			var err error
			if detail, err = rule.check(ctx); err != nil {
				result, detail = "failed", fmt.Sprintf("%v; wanted: %s", err, rule.wants)
				failures++
			} else {
				result = "ok"
			}
		}
		_, _ = fmt.Fprintf(stdout, "%-8s %-14s %s\n", result, rule.name, detail)
	}
	if failures > 0 {
		return fmt.Errorf("%d rules of the contract are not kept: see bootstrap/CONTROL-PLANE.md", failures)
	}
	return nil
}

type rule struct {
	name, wants string
	unless      string // why it cannot be checked
	check       func(context.Context) (string, error)
}

func (c *checker) rules() []rule {
	missing := func(value, flag string) string {
		if value == "" {
			return "give " + flag
		}
		return ""
	}
	gateway, away := missing(c.gateway, "--gateway"), missing(c.away, "--away")
	return []rule{
		{"lease", "200, JSON, frp_token; expires_at in RFC 3339, a minute from now at least; auth_method token or oidc; " +
			"a server_addr that is not the agent's own host; a tunnel of type http, https or tcp", "", c.lease},
		{"wrong token", "401 as JSON, not revoked: the right token may be on its way to the agent", "",
			func(ctx context.Context) (string, error) {
				return c.refused(ctx, c.id, "wrong-"+rand.Text(), false)
			}},
		{"unknown agent", "401 or 403 as JSON, not revoked", "", func(ctx context.Context) (string, error) {
			return c.refused(ctx, "unknown-"+strings.ToLower(rand.Text()[:8]), c.token, false)
		}},
		{"revoked agent", `401 or 403 as JSON with "revoked": true`, missing(c.revokedID, "--revoked-id"),
			func(ctx context.Context) (string, error) {
				return c.refused(ctx, c.revokedID, c.revokedToken, true)
			}},
		{"agent", "200 with the agent's Pipeops-Agent", gateway, func(ctx context.Context) (string, error) {
			return c.call(ctx, http.MethodGet, c.gateway+"/version", c.token, "",
				func(a answer) bool { return a.code == http.StatusOK && a.by(c.id) })
		}},
		{"refusal", "the agent's 401, untouched: a Status, Pipeops-Agent, WWW-Authenticate", gateway,
			func(ctx context.Context) (string, error) {
				return c.call(ctx, http.MethodPost, c.gateway+review, "wrong-"+rand.Text(), reviewOf(0), func(a answer) bool {
					return a.code == http.StatusUnauthorized && a.by(c.id) && a.header.Get("Www-Authenticate") != "" &&
						a.isStatus()
				})
			}},
		{"bodies", "each of 200 writes of 100 KB, 8 at a time, is answered whole, and comes to the agent once", gateway,
			c.bodies},
		{"upgrade", "101 for a WebSocket", gateway, func(ctx context.Context) (string, error) {
			return c.call(ctx, http.MethodGet, c.gateway+"/api/k8s/api/v1/namespaces?watch=true&timeoutSeconds=1", c.token, "",
				func(a answer) bool {
					// 403: RBAC forbids the agent to watch.
					return a.code == http.StatusSwitchingProtocols || a.code == http.StatusForbidden && a.by(c.id)
				}, "Origin", c.gateway, "Connection", "Upgrade", "Upgrade", "websocket",
				"Sec-Websocket-Version", "13", "Sec-Websocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==")
		}},
		{"large headers", "431 or 400 for headers of 200 KB", gateway, func(ctx context.Context) (string, error) {
			return c.call(ctx, http.MethodGet, c.gateway+"/api/k8s/version", c.token, "", func(a answer) bool {
				return a.code == http.StatusRequestHeaderFieldsTooLarge || a.code == http.StatusBadRequest
			}, "X-Large", strings.Repeat("x", 200<<10))
		}},
		{"away, reading", "503 with Retry-After and a Status, so that kubectl tries again", away,
			func(ctx context.Context) (string, error) {
				return c.call(ctx, http.MethodGet, c.away+"/api/k8s/api/v1/namespaces/default", c.token, "", func(a answer) bool {
					return a.code == http.StatusServiceUnavailable && a.again() && a.isStatus()
				})
			}},
		{"away, writing", "503 with Retry-After, or 502 without if the agent may have got it, and a Status; " +
			"no 404, which kubectl takes for an object that is gone", away,
			func(ctx context.Context) (string, error) {
				return c.call(ctx, http.MethodPost, c.away+review, c.token, reviewOf(0), func(a answer) bool {
					return a.isStatus() && (a.code == http.StatusServiceUnavailable && a.again() ||
						a.code == http.StatusBadGateway && !a.again())
				})
			}},
	}
}

type answer struct {
	code   int
	header http.Header
	body   string
}

func (a answer) by(id string) bool { return a.header.Get("Pipeops-Agent") == id }
func (a answer) again() bool       { return a.header.Get("Retry-After") != "" }

func (a answer) isJSON() bool {
	kind, _, _ := strings.Cut(a.header.Get("Content-Type"), ";")
	return strings.EqualFold(strings.TrimSpace(kind), "application/json")
}

func (a answer) isStatus() bool {
	var status metav1.Status
	return a.isJSON() && json.Unmarshal([]byte(a.body), &status) == nil && status.Kind == "Status" &&
		int(status.Code) == a.code
}

func (a answer) String() string {
	text := fmt.Sprintf("%d %s", a.code, http.StatusText(a.code))
	for _, name := range []string{"Content-Type", "Pipeops-Agent", "Retry-After"} {
		if value := a.header.Get(name); value != "" {
			text += ", " + name + ": " + value
		}
	}
	return text
}

// send sends a request with further headers, each a name and a value.
func (c *checker) send(ctx context.Context, method, url, token, body string, header ...string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	req.Header = http.Header{"Authorization": {"Bearer " + token}, "Content-Type": {"application/json"}}
	for pair := range slices.Chunk(header, 2) {
		req.Header.Set(pair[0], pair[1])
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	a := answer{code: resp.StatusCode, header: resp.Header}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		var data []byte
		data, err = io.ReadAll(resp.Body)
		a.body = string(data)
	}
	return a, err
}

// call sends a request, and returns an error unless the answer is right.
func (c *checker) call(ctx context.Context, method, url, token, body string, right func(answer) bool,
	header ...string) (string, error) {
	a, err := c.send(ctx, method, url, token, body, header...)
	if err == nil && !right(a) {
		err = fmt.Errorf("the answer is %s: %.200q", a, a.body)
	}
	return a.String(), err
}

// ask requests a lease, as an agent does.
func (c *checker) ask(ctx context.Context, id, token string) (answer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return answer{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{id},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return answer{}, err
	}
	certificate := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	body, err := json.Marshal(map[string]string{"agent_id": id, "agent_name": id, "cluster_name": id, "instance": "check",
		"version": "check", "tls_certificate": certificate})
	if err != nil {
		return answer{}, err
	}
	return c.send(ctx, http.MethodPost, c.api+"/auth/frp-token", token, string(body))
}

func (c *checker) lease(ctx context.Context) (string, error) {
	a, err := c.ask(ctx, c.id, c.token)
	if err != nil {
		return "", err
	}
	var lease struct {
		Token      string     `json:"frp_token"`
		ExpiresAt  *time.Time `json:"expires_at"`
		AuthMethod string     `json:"auth_method"`
		ServerAddr string     `json:"server_addr"`
		ServerPort int        `json:"server_port"`
		Tunnel     struct {
			Type, Subdomain string
			CustomDomains   []string `json:"custom_domains"`
		} `json:"tunnel"`
	}
	ended := func() bool { return lease.ExpiresAt != nil && time.Until(*lease.ExpiresAt) < time.Minute }
	badName := func(name string) bool { return len(validation.IsDNS1123Subdomain(name)) > 0 }
	err = json.Unmarshal([]byte(a.body), &lease)
	switch ip := net.ParseIP(lease.ServerAddr); {
	case a.code != http.StatusOK:
		err = fmt.Errorf("the answer is %s", a)
	case err != nil:
	case lease.Token == "":
		err = errors.New("frp_token is empty")
	case ended():
		err = fmt.Errorf("expires_at is %s", lease.ExpiresAt)
	case !slices.Contains([]string{"", "token", "oidc"}, lease.AuthMethod):
		err = fmt.Errorf("auth_method is %q", lease.AuthMethod)
	case lease.ServerAddr != c.frps && (strings.HasSuffix("."+strings.ToLower(lease.ServerAddr), ".localhost") ||
		ip != nil && (ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsUnspecified() || ip.IsMulticast())),
		lease.ServerPort < 0, lease.ServerPort > 65535:
		err = fmt.Errorf("frps is %s:%d", lease.ServerAddr, lease.ServerPort)
	case !slices.Contains([]string{"", "http", "https", "tcp"}, lease.Tunnel.Type),
		lease.Tunnel.Subdomain != "" && badName(lease.Tunnel.Subdomain),
		slices.ContainsFunc(lease.Tunnel.CustomDomains, badName):
		err = fmt.Errorf("the tunnel is %+v", lease.Tunnel)
	}
	return fmt.Sprintf("frps at %q, tunnel of type %q, auth_method %q, until %v", lease.ServerAddr, lease.Tunnel.Type,
		lease.AuthMethod, lease.ExpiresAt), err
}

// refused returns an error if an agent gets a lease.
func (c *checker) refused(ctx context.Context, id, token string, revoked bool) (string, error) {
	a, err := c.ask(ctx, id, token)
	if err != nil {
		return "", err
	}
	var body struct{ Revoked bool }
	right := a.code == http.StatusUnauthorized || a.code == http.StatusForbidden && id != c.id
	if json.Unmarshal([]byte(a.body), &body) != nil || !a.isJSON() || body.Revoked != revoked || !right {
		err = fmt.Errorf("the answer is %s: %.200q", a, a.body)
	}
	return a.String(), err
}

// review is a write that everybody may make and that changes nothing. Its answer repeats what was asked.
const review = "/api/k8s/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"

// reviewOf returns a write that every user may make and that changes nothing. Its answer repeats the request.
func reviewOf(size int) string {
	return `{"apiVersion":"authorization.k8s.io/v1","kind":"SelfSubjectAccessReview","spec":{"resourceAttributes":` +
		`{"resource":"pods","verb":"get","name":"` + strings.Repeat("x", size) + `"}}}`
}

func (c *checker) bodies(ctx context.Context) (string, error) {
	const writes, size, callers = 200, 100 << 10, 8
	before := c.counted(ctx)
	failures := make(chan error, writes)
	var group sync.WaitGroup
	for range callers {
		group.Go(func() {
			for range writes / callers {
				_, err := c.call(ctx, http.MethodPost, c.gateway+review, c.token, reviewOf(size), func(a answer) bool {
					return a.code == http.StatusCreated && strings.Count(a.body, "x") >= size
				})
				if err != nil {
					failures <- err
				}
			}
		})
	}
	group.Wait()
	if n := len(failures); n > 0 {
		return "", fmt.Errorf("%d are not, for example: %w", n, <-failures)
	}
	switch came := c.counted(ctx) - before; {
	case came > writes:
		return "", fmt.Errorf("%d were sent, %d came to the agent (try again if it has other callers now)", writes, came)
	case came < writes:
		return fmt.Sprintf("%d were answered; the metrics of the agent that answers for its replicas do not show "+
			"how often each came", writes), nil
	}
	return fmt.Sprintf("%d were answered, and came once", writes), nil
}

// counted returns how many creates the agent has answered by its metrics, 0 if it does not tell.
func (c *checker) counted(ctx context.Context) (sum int) {
	a, _ := c.send(ctx, http.MethodGet, c.gateway+"/metrics", c.token, "")
	for line := range strings.Lines(a.body) {
		if n := 0; strings.HasPrefix(line, "pipeops_agent_kubernetes_requests_total{") &&
			strings.Contains(line, `verb="create"`) {
			_, _ = fmt.Sscan(line[strings.LastIndexByte(line, ' ')+1:], &n)
			sum += n
		}
	}
	return sum
}
