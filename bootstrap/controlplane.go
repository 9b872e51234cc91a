package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"mime"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/version"
	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/secret"
	"github.com/pipeops/vm-agent/frpc/tlsutil"
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
	// Certificate is what the proxy will show to callers of a tunnel of type https, PEM; none for the others.
	Certificate string `json:"tls_certificate,omitempty"`
}

// authAnswer is the control plane's answer. Only frp_token is required.
type authAnswer struct {
	FRPToken    secret.Secret            `json:"frp_token"`
	ExpiresAt   time.Time                `json:"expires_at"`
	AuthMethod  string                   `json:"auth_method"`
	ServerAddr  string                   `json:"server_addr"`
	ServerPort  int                      `json:"server_port"`
	User        string                   `json:"user"`
	Metadatas   map[string]secret.Secret `json:"metadatas"`
	Tunnel      frpc.Tunnel              `json:"tunnel"` // type, subdomain, custom_domains, remote_port, group and group_key
	Permissions []string                 `json:"permissions"`

	// ends is ExpiresAt by the clock of this host, which may differ from the control plane's; zero: no end.
	ends time.Time
}

// controlPlane is a client of the control plane.
type controlPlane struct {
	cfg  *config.Config
	http *http.Client
}

func newControlPlane(cfg *config.Config) (*controlPlane, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone() // HTTPS_PROXY and NO_PROXY apply
	if cfg.Agent.CAFile != "" {
		pool, err := tlsutil.CertPool(cfg.Agent.CAFile)
		if err != nil {
			return nil, &config.Error{Mistakes: []string{fmt.Sprintf("agent.ca_file (PIPEOPS_API_CA_FILE): %v: correct the path or mount the file", err)}}
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	return &controlPlane{cfg: cfg, http: &http.Client{
		Transport: transport,
		Timeout:   30 * time.Second,
		// A redirect would carry the token to a host that nobody configured.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// failure is why an attempt got no lease. Final: another attempt cannot do better.
type failure struct {
	err        error
	final      bool
	refused    bool          // 401 or 403, from whoever is on the way
	revoked    bool          // the control plane itself says that the agent is revoked
	confirmed  bool          // and has said so before
	retryAfter time.Duration // what the control plane asked for, if anything
}

func (f *failure) Error() string { return f.err.Error() }

// persist asks until it gets a lease, the failure is final, or ctx ends.
func persist(ctx context.Context, once source, log *slog.Logger, certificate []byte) (authAnswer, *failure) {
	stopped := errors.New("stopped by a signal before there was a lease")
	for delay := time.Second; ; delay = min(2*delay, 30*time.Second) {
		answer, fail := once(ctx, certificate)
		if fail == nil || fail.final {
			return answer, fail
		}
		wait := max(jitter(delay), fail.retryAfter)
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < wait {
			return authAnswer{}, &failure{err: fmt.Errorf("%w (gave up after --timeout)", fail)}
		}
		log.Warn("no lease yet", "error", fail, "next_attempt_in", wait.String())
		select {
		case <-time.After(wait):
		case <-ctx.Done(): // there was time to wait, so it is a signal
			return authAnswer{}, &failure{err: stopped}
		}
	}
}

// jitter is a time around d, so that agents that failed together do not try again together.
func jitter(d time.Duration) time.Duration {
	return d/2 + mathrand.N(max(d, 1)) //nolint:gosec // no secret
}

// attempt asks once, with the token as it now is. Its errors say which hop, what happened and what to do.
func (c *controlPlane) attempt(ctx context.Context, certificate []byte) (authAnswer, *failure) {
	agent := c.cfg.Agent
	hop := "the control plane at " + agent.APIURL
	token, err := c.cfg.Agent.CurrentToken()
	if err != nil {
		return authAnswer{}, &failure{err: fmt.Errorf("agent.token_file (PIPEOPS_AGENT_TOKEN_FILE): %w", err)}
	}
	body, _ := json.Marshal(authRequest{ // texts alone: it cannot fail
		AgentID: agent.ID, AgentName: agent.Name, ClusterName: agent.ClusterName,
		Instance: agent.Instance, Version: version.Version, Certificate: string(certificate),
	})
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, agent.APIURL+authPath, bytes.NewReader(body))
	if err != nil {
		return authAnswer{}, &failure{err: err, final: true}
	}
	req.Header.Set("Authorization", "Bearer "+token.Reveal())
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
	if answer.ExpiresAt.Year() > 9000 { // never, as some say it
		answer.ExpiresAt = time.Time{}
	}
	if answer.ends = answer.ExpiresAt; !answer.ends.IsZero() {
		if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
			answer.ends = time.Now().Add(answer.ExpiresAt.Sub(date)).UTC().Truncate(time.Second)
		}
	}
	return answer, nil
}

// refusal says what an answer other than 200 means.
func (c *controlPlane) refusal(hop string, resp *http.Response, body []byte) *failure {
	var problem struct {
		Detail, Message, Error string
		Revoked                bool
	}
	isProblem := json.Unmarshal(body, &problem) == nil
	said := resp.Status
	if detail := cmp.Or(problem.Detail, problem.Message, problem.Error); isProblem && detail != "" {
		said += fmt.Sprintf(": %.200s", detail)
	}
	// What stands on the way may refuse requests too, and not as the contract has it.
	mediaType, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	fromControlPlane := mediaType == "application/json"
	revoked := fromControlPlane && isProblem && problem.Revoked
	retryAfter := 0 * time.Second
	if seconds, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && seconds > 0 {
		retryAfter = time.Duration(min(seconds, 24*60*60)) * time.Second
	} else if at, err := http.ParseTime(resp.Header.Get("Retry-After")); err == nil {
		retryAfter = time.Until(at)
	}
	switch code := resp.StatusCode; {
	case (code == http.StatusUnauthorized || code == http.StatusForbidden) && !fromControlPlane:
		return &failure{final: true, refused: true, err: fmt.Errorf("%s, or something on the way there, refuses the request (%s, %s): check agent.api_url (PIPEOPS_API_URL), and the proxies and firewalls on the way", hop, said, contentType(resp))}
	case code == http.StatusUnauthorized:
		return &failure{final: true, refused: true, revoked: revoked, err: fmt.Errorf("%s refuses the agent's token (%s): check agent.token (PIPEOPS_AGENT_TOKEN), or get a new one from the control plane", hop, said)}
	case code == http.StatusForbidden:
		return &failure{final: true, refused: true, revoked: revoked, err: fmt.Errorf("%s knows the token but does not let agent %q connect (%s): check agent.id (PIPEOPS_AGENT_ID), and whether the agent was revoked", hop, c.cfg.Agent.ID, said)}
	case code >= 300 && code < 400:
		return &failure{final: true, err: fmt.Errorf("%s redirects to %.200q, and the token is not sent there: set agent.api_url (PIPEOPS_API_URL) to that if it is right", hop, resp.Header.Get("Location"))}
	case code == http.StatusRequestTimeout, code == http.StatusTooManyRequests, code >= 500:
		return &failure{retryAfter: retryAfter, err: fmt.Errorf("%s cannot give a lease now (%s): wait, or look at its logs", hop, said)}
	default:
		return &failure{final: true, err: fmt.Errorf("%s does not know the request (%s, %s): check agent.api_url (PIPEOPS_API_URL), it is the part before %s", hop, said, contentType(resp), authPath)}
	}
}

func contentType(resp *http.Response) string {
	return fmt.Sprintf("%.100s", cmp.Or(resp.Header.Get("Content-Type"), "no content type"))
}

// explain turns an error of the HTTP client into what happened and what to do.
func explain(err error) error {
	var dns *net.DNSError
	var noTLS tls.RecordHeaderError
	var timeout net.Error
	if explained := tlsutil.Explain(err, "agent.ca_file (PIPEOPS_API_CA_FILE)", "agent.api_url (PIPEOPS_API_URL)"); explained != nil {
		return explained
	}
	switch {
	case errors.As(err, &dns):
		return fmt.Errorf("cannot be found: %w: check agent.api_url (PIPEOPS_API_URL) and the cluster's DNS", dns)
	case errors.As(err, &noTLS), errors.Is(err, http.ErrSchemeMismatch):
		return errors.New("does not speak TLS: check the port in agent.api_url (PIPEOPS_API_URL)")
	case errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("does not answer: %w: check agent.api_url (PIPEOPS_API_URL), and that the network lets HTTPS out to it", errors.Unwrap(err))
	default:
		err = cmp.Or(errors.Unwrap(err), err) // without "Post <url>", which the sentence has already
		return fmt.Errorf("cannot be reached: %w: check agent.api_url (PIPEOPS_API_URL), and that the network lets HTTPS out to it", err)
	}
}
