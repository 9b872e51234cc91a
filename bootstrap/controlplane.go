package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/version"
	"github.com/pipeops/vm-agent/frpc"
)

// authPath is the control plane's only endpoint that the agent calls.
const authPath = "/auth/frp-token"

// authRequest is the body of POST /auth/frp-token.
type authRequest struct {
	AgentID     string `json:"agent_id"`
	AgentName   string `json:"agent_name"`
	ClusterName string `json:"cluster_name"`
	Instance    string `json:"instance"`
	Version     string `json:"version"`
}

// authAnswer is the control plane's answer. Only frp_token is required.
type authAnswer struct {
	FRPToken    frpc.Secret            `json:"frp_token"`
	ExpiresAt   time.Time              `json:"expires_at"`
	AuthMethod  string                 `json:"auth_method"`
	ServerAddr  string                 `json:"server_addr"`
	ServerPort  int                    `json:"server_port"`
	User        string                 `json:"user"`
	Metadatas   map[string]frpc.Secret `json:"metadatas"`
	Tunnel      frpc.Tunnel            `json:"tunnel"` // type, subdomain, custom_domains, remote_port, group and group_key
	Permissions []string               `json:"permissions"`
}

// controlPlane is a client of the control plane.
type controlPlane struct {
	url   string // api_url, without a slash at its end
	token frpc.Secret
	body  authRequest
	http  *http.Client
}

func newControlPlane(cfg *config.Config) (*controlPlane, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone() // HTTPS_PROXY and NO_PROXY apply
	if cfg.Agent.CAFile != "" {
		pem, err := os.ReadFile(cfg.Agent.CAFile)
		if err != nil {
			return nil, &config.Error{Mistakes: []string{fmt.Sprintf("agent.ca_file (PIPEOPS_API_CA_FILE): %v: correct the path or mount the file", err)}}
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, &config.Error{Mistakes: []string{fmt.Sprintf("agent.ca_file (PIPEOPS_API_CA_FILE): %s holds no PEM certificate", cfg.Agent.CAFile)}}
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	return &controlPlane{
		url:   cfg.Agent.APIURL,
		token: cfg.Agent.Token,
		body: authRequest{
			AgentID: cfg.Agent.ID, AgentName: cfg.Agent.Name, ClusterName: cfg.Agent.ClusterName,
			Instance: cfg.Agent.Instance, Version: version.Version,
		},
		http: &http.Client{
			Transport: transport,
			Timeout:   30 * time.Second,
			// A redirect would carry the token to a host that nobody configured.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// failure is why an attempt got no lease. Final: another attempt cannot do better.
type failure struct {
	err        error
	final      bool
	retryAfter time.Duration // what the control plane asked for, if anything
}

// authenticate asks for a lease until it gets one, the failure is final, or ctx ends.
func (c *controlPlane) authenticate(ctx context.Context, log *slog.Logger) (authAnswer, error) {
	var last error
	for delay := time.Second; ; delay = min(2*delay, 30*time.Second) {
		answer, fail := c.attempt(ctx)
		switch {
		case fail == nil:
			return answer, nil
		case fail.final:
			return authAnswer{}, fail.err
		case ctx.Err() != nil && last != nil:
			fail.err = last // an attempt cut short says less than the one before
		}
		last = fail.err
		if errors.Is(ctx.Err(), context.Canceled) {
			return authAnswer{}, fmt.Errorf("stopped by a signal before there was a lease (%w)", fail.err)
		}
		wait := max(delay/2+mathrand.N(delay), fail.retryAfter) //nolint:gosec // jitter is no secret
		if deadline, ok := ctx.Deadline(); ctx.Err() != nil || ok && time.Until(deadline) < wait {
			return authAnswer{}, fmt.Errorf("%w (gave up after --timeout)", fail.err)
		}
		log.Warn("no lease yet", "error", fail.err, "next_attempt_in", wait.String())
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return authAnswer{}, fmt.Errorf("stopped by a signal before there was a lease (%w)", fail.err)
		}
	}
}

// attempt asks once. Its errors say which hop, what happened and what to do.
func (c *controlPlane) attempt(ctx context.Context) (authAnswer, *failure) {
	hop := "the control plane at " + c.url
	body, err := json.Marshal(c.body)
	if err != nil {
		return authAnswer{}, &failure{err: err, final: true}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url+authPath, bytes.NewReader(body))
	if err != nil {
		return authAnswer{}, &failure{err: err, final: true}
	}
	req.Header.Set("Authorization", "Bearer "+c.token.Reveal())
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "pipeops-agent-bootstrap/"+version.Version)
	resp, err := c.http.Do(req)
	if err != nil {
		return authAnswer{}, &failure{err: fmt.Errorf("%s %w", hop, explain(err))}
	}
	defer func() { _ = resp.Body.Close() }()
	const limit = 1 << 20
	data, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return authAnswer{}, &failure{err: fmt.Errorf("%s broke off its answer: %w: try again, and look at what stands between", hop, err)}
	}
	if resp.StatusCode != http.StatusOK {
		return authAnswer{}, c.refusal(hop, resp, data)
	}
	var answer authAnswer
	switch err := json.Unmarshal(data, &answer); {
	case len(data) > limit:
		err = fmt.Errorf("%s answers with more than 1 MiB: check agent.api_url (PIPEOPS_API_URL)", hop)
		return authAnswer{}, &failure{err: err, final: true}
	case err != nil:
		err = fmt.Errorf("%s answers with something that is no lease (%s, %w): check agent.api_url (PIPEOPS_API_URL)", hop, contentType(resp), err)
		return authAnswer{}, &failure{err: err, final: true}
	case answer.FRPToken == "":
		err = fmt.Errorf("%s answers without frp_token: check agent.api_url (PIPEOPS_API_URL), or tell those who run it", hop)
		return authAnswer{}, &failure{err: err, final: true}
	}
	return answer, nil
}

// refusal says what an answer other than 200 means.
func (c *controlPlane) refusal(hop string, resp *http.Response, body []byte) *failure {
	said := resp.Status
	if detail := c.detail(body); detail != "" {
		said += ": " + detail
	}
	retryAfter := 0 * time.Second
	if seconds, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && seconds > 0 {
		retryAfter = time.Duration(seconds) * time.Second
	}
	switch code := resp.StatusCode; {
	case code == http.StatusUnauthorized:
		return &failure{final: true, err: fmt.Errorf("%s refuses the agent's token (%s): check agent.token (PIPEOPS_AGENT_TOKEN), or get a new one from the control plane", hop, said)}
	case code == http.StatusForbidden:
		return &failure{final: true, err: fmt.Errorf("%s knows the token but does not let agent %q connect (%s): check agent.id (PIPEOPS_AGENT_ID), and whether the agent was revoked", hop, c.body.AgentID, said)}
	case code >= 300 && code < 400:
		return &failure{final: true, err: fmt.Errorf("%s redirects to %.200q, and the token is not sent there: set agent.api_url (PIPEOPS_API_URL) to that if it is right", hop, resp.Header.Get("Location"))}
	case code == http.StatusRequestTimeout, code == http.StatusTooManyRequests, code >= 500:
		return &failure{retryAfter: retryAfter, err: fmt.Errorf("%s cannot give a lease now (%s): wait, or look at its logs", hop, said)}
	default:
		return &failure{final: true, err: fmt.Errorf("%s does not know the request (%s, %s): check agent.api_url (PIPEOPS_API_URL), it is the part before %s", hop, said, contentType(resp), authPath)}
	}
}

// detail is what a JSON body says of an error, short, and never if it repeats the token.
func (c *controlPlane) detail(body []byte) string {
	var problem struct{ Detail, Message, Error string }
	if json.Unmarshal(body, &problem) != nil {
		return ""
	}
	for _, text := range []string{problem.Detail, problem.Message, problem.Error} {
		if text != "" && !strings.Contains(text, c.token.Reveal()) {
			return fmt.Sprintf("%.200s", text)
		}
	}
	return ""
}

func contentType(resp *http.Response) string {
	if t := resp.Header.Get("Content-Type"); t != "" {
		return fmt.Sprintf("%.100s", t)
	}
	return "no content type"
}

// explain turns an error of the HTTP client into what happened and what to do.
func explain(err error) error {
	var dns *net.DNSError
	var unknownCA x509.UnknownAuthorityError
	var wrongName x509.HostnameError
	var invalid x509.CertificateInvalidError
	var noTLS tls.RecordHeaderError
	var timeout net.Error
	switch {
	case errors.As(err, &dns):
		return fmt.Errorf("cannot be found: %w: check agent.api_url (PIPEOPS_API_URL) and the cluster's DNS", dns)
	case errors.As(err, &unknownCA):
		return fmt.Errorf("shows a certificate that nobody known has signed: %w: set agent.ca_file (PIPEOPS_API_CA_FILE) to its authority", unknownCA)
	case errors.As(err, &wrongName):
		return fmt.Errorf("shows a certificate for another name: %w: check agent.api_url (PIPEOPS_API_URL)", wrongName)
	case errors.As(err, &invalid):
		return fmt.Errorf("shows a certificate that is not valid: %w: check the clocks, or renew the certificate", invalid)
	case errors.As(err, &noTLS), errors.Is(err, http.ErrSchemeMismatch):
		return errors.New("does not speak TLS: check the port in agent.api_url (PIPEOPS_API_URL)")
	case errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("does not answer: %w: check agent.api_url (PIPEOPS_API_URL), and that the network lets HTTPS out to it", errors.Unwrap(err))
	default:
		if inner := errors.Unwrap(err); inner != nil {
			err = inner // without "Post <url>", which the sentence has already
		}
		return fmt.Errorf("cannot be reached: %w: check agent.api_url (PIPEOPS_API_URL), and that the network lets HTTPS out to it", err)
	}
}

// newLease joins the configuration and the control plane's answer; the answer wins.
func newLease(cfg *config.Config, answer authAnswer) (frpc.Lease, error) {
	if answer.AuthMethod != "" && answer.AuthMethod != "token" {
		return frpc.Lease{}, fmt.Errorf("the control plane's lease has auth_method %.100q, which this version does not know: update the agent", answer.AuthMethod)
	}
	name := cfg.Agent.ID + "." + cfg.Agent.Instance
	tunnel, configured := answer.Tunnel, cfg.FRP.Tunnel
	if tunnel.Type == "" {
		tunnel.Type = configured.Type
	}
	if tunnel.Type == configured.Type {
		if tunnel.Subdomain == "" && len(tunnel.CustomDomains) == 0 {
			tunnel.Subdomain, tunnel.CustomDomains = configured.Subdomain, configured.CustomDomains
		}
		if tunnel.RemotePort == 0 {
			tunnel.RemotePort = configured.RemotePort
		}
	}
	tunnel.LocalIP, tunnel.LocalPort = configured.LocalIP, configured.LocalPort
	if tunnel.Type != "http" && tunnel.Type != "tcp" {
		return frpc.Lease{}, fmt.Errorf("the control plane's lease has a tunnel of type %.100q, which this version does not know: update the agent", tunnel.Type)
	}
	for _, port := range []int{answer.ServerPort, tunnel.RemotePort} {
		if port < 0 || port > 65535 {
			return frpc.Lease{}, fmt.Errorf("the control plane's lease has port %d, which is none: tell those who run it", port)
		}
	}
	tunnel.Name = name
	lease := frpc.Lease{
		IssuedAt:    time.Now().UTC().Truncate(time.Second),
		ExpiresAt:   answer.ExpiresAt,
		Permissions: answer.Permissions,
		Frpc: frpc.Config{
			ServerAddr: cfg.FRP.ServerAddr,
			ServerPort: cfg.FRP.ServerPort,
			User:       answer.User,
			ClientID:   name,
			Protocol:   cfg.FRP.Protocol,
			ProxyURL:   cfg.FRP.ProxyURL,
			TLS:        cfg.FRP.TLS,
			Token:      answer.FRPToken,
			Metadatas:  answer.Metadatas,
			LogLevel:   cfg.Logging.Level,
			Admin:      frpc.Admin{Port: cfg.FRP.AdminPort, User: "pipeops", Password: frpc.Secret(rand.Text())},
			Tunnel:     tunnel,
		},
	}
	if answer.ServerAddr != "" {
		lease.Frpc.ServerAddr = answer.ServerAddr
	}
	if answer.ServerPort != 0 {
		lease.Frpc.ServerPort = answer.ServerPort
	}
	return lease, nil
}
