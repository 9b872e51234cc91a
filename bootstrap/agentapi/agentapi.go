// Package agentapi holds what bootstrap and the proxy of one agent must agree on: paths, names and JSON types. The
// answer of VersionPath is a version.Info.
package agentapi

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc/secret"
)

// Paths of the proxy's HTTP API that bootstrap and frpc use.
const (
	HealthPath       = "/health"
	ReadyPath        = "/ready"
	VersionPath      = "/version"
	ActivityPath     = "/activity" // operations listener only
	KubernetesPrefix = "/api/k8s"

	// TunnelHealthPath is where frpc asks, always in plain HTTP, whether to keep the tunnel registered. It names the
	// one check that decides this, so that another check of readiness never withdraws every tunnel.
	TunnelHealthPath = ReadyPath + "?only=" + CheckShutdown

	// Names of the checks of ReadyPath. Its query may select checks with only=NAME, and leave some out with exclude=NAME.
	CheckKubernetes = "kubernetes"
	CheckTunnel     = "tunnel"
	CheckShutdown   = "shutdown"
)

// RunnersRegistry is the name of the Secret, in the agent's namespace, that holds the registry of runners.
const RunnersRegistry = "pipeops-agent-runners"

// Ready is the answer of ReadyPath.
type Ready struct {
	Checks map[string]Check `json:"checks"`
	Status string           `json:"status"` // ready or not ready
}

// Check is the outcome of one check of readiness.
type Check struct {
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"` // for callers that may know it
}

// Activity is the answer of ActivityPath.
type Activity struct {
	RequestsInFlight int64 `json:"requests_in_flight"` // on the tunnel listener, streams included
}

// Client calls the proxy of this pod, past every HTTP proxy of the environment.
type Client struct {
	ListenAddr string        // of one of the proxy's listeners, as configured
	Token      secret.Secret // of the agent; empty: none is sent
	TLS        *tls.Config   // nil: plain HTTP
}

// Call decodes the JSON answer to a GET, or to a POST if there is a body. A status from 400 on is a *RefusedError, and
// the answer is decoded all the same: that of ReadyPath says more. Calls take ten seconds at most.
func (c Client) Call(ctx context.Context, path string, body []byte, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	method, scheme := http.MethodGet, "http"
	if body != nil {
		method = http.MethodPost
	}
	if c.TLS != nil {
		scheme = "https"
	}
	url := scheme + "://" + config.Local(c.ListenAddr) + path
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if c.Token != "" {
		req.Header.Set("Authorization", "Bearer "+c.Token.Reveal())
	}
	resp, err := (&http.Transport{DisableKeepAlives: true, TLSClientConfig: c.TLS}).RoundTrip(req)
	if err != nil {
		return fmt.Errorf("the proxy does not answer: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	err = cmp.Or(err, json.Unmarshal(data, answer))
	if resp.StatusCode >= http.StatusBadRequest {
		var body struct{ Detail, Message string } // of a problem, or of a metav1.Status
		_ = json.Unmarshal(data, &body)           // it may be neither
		why := cmp.Or(body.Detail, body.Message, "it gives no reason")
		err = fmt.Errorf("the proxy answers %s to %s %s: %s", resp.Status, method, path, why)
		return &RefusedError{err, resp.StatusCode, why}
	}
	return err
}

// RefusedError is an answer with a status from 400 on.
type RefusedError struct {
	error

	Code int
	Why  string // what the answer says: what happened, and what to do
}
