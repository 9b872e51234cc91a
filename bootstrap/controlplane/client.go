// Package controlplane is the client of the control plane.
package controlplane

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

const authPath = "/auth/frp-token" // the only endpoint of the control plane that the agent calls

var apiURL = config.Name("agent.api_url") // as messages name it

// Request is the body of POST /auth/frp-token.
type Request struct {
	AgentID     string `json:"agent_id"`
	AgentName   string `json:"agent_name"`
	ClusterName string `json:"cluster_name"`
	Instance    string `json:"instance"`
	Version     string `json:"version"`
	Certificate string `json:"tls_certificate,omitempty"` // PEM, for callers of a tunnel of type https
}

// Answer is the control plane's answer. Only frp_token is required.
type Answer struct {
	FRPToken   secret.Secret            `json:"frp_token"`
	ExpiresAt  time.Time                `json:"expires_at"`
	AuthMethod string                   `json:"auth_method"`
	ServerAddr string                   `json:"server_addr"`
	ServerPort int                      `json:"server_port"`
	User       string                   `json:"user"`
	Metadatas  map[string]secret.Secret `json:"metadatas"`
	Tunnel     frpc.Tunnel              `json:"tunnel"` // its local fields do not count

	Ends time.Time `json:"-"` // ExpiresAt by the clock of this host, not the control plane's; zero: never
}

// Client requests leases. Safe for concurrent use.
type Client struct {
	HTTP *http.Client
	cfg  *config.Config
}

// New returns a client for the agent's control plane. It fails only on the file that agent.ca_file names.
func New(cfg *config.Config) (*Client, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone() // HTTPS_PROXY and NO_PROXY apply
	if cfg.Agent.CAFile != "" && cfg.FRP.Token == "" {
		pool, err := tlsutil.CertPool(cfg.Agent.CAFile)
		if err != nil {
			mistake := fmt.Sprintf("%s: %v: correct the path or mount the file", config.Name("agent.ca_file"), err)
			return nil, &config.Error{Mistakes: []string{mistake}}
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	return &Client{cfg: cfg, HTTP: &http.Client{
		Transport: transport, Timeout: 30 * time.Second,
		// A redirect would carry the token to a host that nobody configured.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// Failure is why a request got no lease. Its error names the hop, the cause and the next step.
type Failure struct {
	Err        error
	Final      bool          // another request cannot do better
	Refused    bool          // status 401 or 403, from the control plane or anything on the way to it
	Revoked    bool          // the control plane itself says that the agent is revoked
	RetryAfter time.Duration // what the control plane asked for, if anything
}

func (f *Failure) Error() string { return f.Err.Error() }

func (f *Failure) Unwrap() error { return f.Err }

// Reach asks for any answer at all, without the token. It returns the state of TLS, nil over plain HTTP.
func (c *Client) Reach(ctx context.Context) (*tls.ConnectionState, error) {
	req, _ := http.NewRequestWithContext(ctx, http.MethodGet, c.cfg.Agent.APIURL+"/", nil) // checked by its setting
	resp, err := c.HTTP.Do(req)
	if err != nil {
		return nil, fmt.Errorf("the control plane at %s %w", c.cfg.Agent.APIURL, explain(err))
	}
	_ = resp.Body.Close()
	return resp.TLS, nil
}

// RequestLease requests a lease once, with the agent's token as it now is. certificate is the PEM that callers of a
// tunnel of type https will see, or empty. The failure never holds the token, though the control plane may repeat it.
// Where frp.token is set, there is no control plane: then the lease is that token.
func (c *Client) RequestLease(ctx context.Context, certificate []byte) (answer Answer, fail *Failure) {
	token, err := c.cfg.Credential()
	if err != nil {
		return Answer{}, &Failure{Err: err}
	}
	if c.cfg.FRP.Token != "" {
		return Answer{FRPToken: token}, nil
	}
	agent, hop := c.cfg.Agent, "the control plane at "+c.cfg.Agent.APIURL
	defer func() {
		if fail != nil {
			fail.Err = token.RedactIn(fail.Err)
		}
	}()
	body, _ := json.Marshal(Request{ // cannot fail: strings only
		AgentID: agent.ID, AgentName: agent.Name, ClusterName: agent.ClusterName,
		Instance: agent.Instance, Version: version.Version, Certificate: string(certificate),
	})
	req, _ := http.NewRequestWithContext(ctx, http.MethodPost, agent.APIURL+authPath, bytes.NewReader(body))
	req.Header = http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json"},
		"Authorization": {"Bearer " + token.Reveal()}, "User-Agent": {"pipeops-agent-bootstrap/" + version.Version}}
	resp, err := c.HTTP.Do(req)
	if err != nil {
		return Answer{}, &Failure{Err: fmt.Errorf("%s %w", hop, explain(err))}
	}
	defer func() { _ = resp.Body.Close() }()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20+1))
	if err != nil {
		return Answer{}, &Failure{Err: fmt.Errorf("%s broke off its answer: %w: check the network to it", hop, err)}
	}
	if resp.StatusCode != http.StatusOK {
		return Answer{}, c.refusal(hop, resp, data)
	}
	switch err = json.Unmarshal(data, &answer); {
	case len(data) > 1<<20:
		err = fmt.Errorf("%s answers with more than 1 MiB: check %s", hop, apiURL)
	case err != nil:
		err = fmt.Errorf("%s answers with something other than a lease (%s, %w): check %s",
			hop, contentType(resp), err, apiURL)
	case answer.FRPToken == "":
		err = fmt.Errorf("%s answers without frp_token: check %s, or contact the control plane's operator", hop, apiURL)
	}
	if err != nil {
		return Answer{}, &Failure{Err: err, Final: true}
	}
	if answer.ExpiresAt.Year() > 9000 { // how some control planes say never
		answer.ExpiresAt = time.Time{}
	}
	answer.Ends = answer.ExpiresAt
	if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil && !answer.Ends.IsZero() {
		answer.Ends = time.Now().Add(answer.ExpiresAt.Sub(date)).UTC().Truncate(time.Second)
	}
	return answer, nil
}

// refusal explains an answer with a status other than 200.
func (c *Client) refusal(hop string, resp *http.Response, body []byte) *Failure {
	var problem struct {
		Detail, Message, Error string
		Revoked                bool
	}
	isProblem := json.Unmarshal(body, &problem) == nil
	said := resp.Status
	if detail := cmp.Or(problem.Detail, problem.Message, problem.Error); isProblem && detail != "" {
		said += fmt.Sprintf(": %.200s", detail)
	}
	// A proxy or firewall on the way may refuse requests too; its answers are not those of the contract.
	mediaType, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	fromControlPlane := mediaType == "application/json"
	code := resp.StatusCode
	denied := code == http.StatusUnauthorized || code == http.StatusForbidden
	revoked := denied && fromControlPlane && isProblem && problem.Revoked
	fail := &Failure{Final: true, Refused: denied, Revoked: revoked}
	switch {
	case denied && !fromControlPlane:
		fail.Err = fmt.Errorf("%s, or something on the way to it, refuses the request (%s, %s): "+
			"check %s, and the proxies and firewalls on the way", hop, said, contentType(resp), apiURL)
	case code == http.StatusUnauthorized:
		fail.Err = fmt.Errorf("%s refuses the agent's token (%s): check %s, or get a new one from the control plane",
			hop, said, config.Name("agent.token"))
	case denied:
		fail.Err = fmt.Errorf("%s accepts the token but does not let agent %q connect (%s): "+
			"check %s, and whether the agent was revoked", hop, c.cfg.Agent.ID, said, config.Name("agent.id"))
	case code >= 300 && code < 400:
		fail.Err = fmt.Errorf("%s redirects to %.200q, and the token is not sent there: set %s to that if it is right",
			hop, resp.Header.Get("Location"), apiURL)
	case code == http.StatusRequestTimeout, code == http.StatusTooManyRequests, code >= 500:
		fail.Final, fail.RetryAfter = false, retryAfter(resp)
		fail.Err = fmt.Errorf("%s cannot give a lease now (%s): wait, or see its log", hop, said)
	default:
		fail.Err = fmt.Errorf("%s does not know the request (%s, %s): check %s, which is the part before %s",
			hop, said, contentType(resp), apiURL, authPath)
	}
	return fail
}

// retryAfter returns how long the header Retry-After asks to wait, at most a day where it is a number; 0 without one.
func retryAfter(resp *http.Response) time.Duration {
	value := resp.Header.Get("Retry-After")
	if seconds, err := strconv.Atoi(value); err == nil {
		return time.Duration(max(0, min(seconds, 24*60*60))) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return time.Until(at)
	}
	return 0
}

func contentType(resp *http.Response) string {
	return fmt.Sprintf("%.100s", cmp.Or(resp.Header.Get("Content-Type"), "no content type"))
}

// explain turns an error of the HTTP client into what happened and what to do, as the predicate of a sentence.
func explain(err error) error {
	if rejected := tlsutil.Explain(err, config.Name("agent.ca_file"), apiURL); rejected != nil {
		return rejected
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		return fmt.Errorf("cannot be found: %w: check %s and the cluster's DNS", dns, apiURL)
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok || errors.Is(err, http.ErrSchemeMismatch) {
		return errors.New("does not speak TLS: check the port in " + apiURL)
	}
	problem := "cannot be reached"
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		problem = "does not answer"
	}
	err = cmp.Or(errors.Unwrap(err), err) // without "Post <url>", which the sentence already has
	return fmt.Errorf("%s: %w: check %s, and that the network allows HTTPS connections to it", problem, err, apiURL)
}
