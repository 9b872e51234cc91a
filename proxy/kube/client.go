package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// Client sends the agent's own requests to the API server. Safe for concurrent use.
type Client struct {
	target    *url.URL
	transport *transport
}

// NewClient returns a client for the API server of config, which connects to nothing yet. It calls latency with the
// seconds from each request, a Proxy's included, to the headers of the answer.
func NewClient(config *rest.Config, latency func(seconds float64)) (*Client, error) {
	config = rest.CopyConfig(config)
	config.DisableCompression = true // else Go would change bodies and their headers
	config.Timeout = 0               // watches, logs and exec have no end
	target, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, fmt.Errorf("the API server's address %q: %w", config.Host, err)
	}
	transport, err := newTransport(config, target, latency)
	if err != nil {
		return nil, err
	}
	return &Client{target: target, transport: transport}, nil
}

// What the agent's own requests accept: whole objects, or of each only its metadata.
const (
	acceptObjects  = "application/json"
	acceptMetadata = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
)

// failedCheck is a line of the API server's /readyz.
var failedCheck = regexp.MustCompile(`\[-\][^:\n]*`)

// call sends a request, with object unless it is nil, and reads a 2xx answer. Others are an *apierrors.StatusError.
func (c *Client) call(ctx context.Context, method, path, accept string, object any, read reader) error {
	var body io.Reader
	if object != nil {
		data, err := json.Marshal(object)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimRight(c.target.String(), "/")+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", accept)
	resp, err := c.transport.RoundTrip(req)
	if err != nil {
		_, message := explain(c.target.Host, err)
		return errors.New(message)
	}
	defer func() {
		_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // a body read to its end frees its connection
		_ = resp.Body.Close()
	}()
	if resp.StatusCode == http.StatusUnauthorized {
		return statusError(resp, errCredential.Error())
	}
	server, what := "the Kubernetes API server at "+c.target.Host, method+" "+req.URL.Path
	if resp.StatusCode >= 300 {
		var status metav1.Status
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		if err := json.Unmarshal(body, &status); err != nil || status.Message == "" {
			failed := failedCheck.FindAllString(string(body), -1) // of /readyz
			status.Message = strings.Join(append([]string{resp.Status}, failed...), "; ")
		}
		return statusError(resp, fmt.Sprintf("%s answers %s: %s", server, what, status.Message))
	}
	if err := read(resp.Body); err != nil {
		return fmt.Errorf("the answer of %s to %s cannot be read: %w", server, what, err)
	}
	return nil
}

// reader reads the body of an answer.
type reader func(body io.Reader) error

func decodeInto(object any) reader {
	return func(body io.Reader) error { return json.NewDecoder(body).Decode(object) }
}

func ignore(io.Reader) error { return nil }

// CheckReady returns an error unless the API server and its storage are ready, or the credential may not ask for that.
func (c *Client) CheckReady(ctx context.Context) error {
	err := c.call(ctx, http.MethodGet, "/readyz", acceptObjects, nil, ignore)
	if apierrors.IsForbidden(err) || apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// Secret is a Kubernetes Secret.
type Secret struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Data map[string][]byte `json:"data"`
}

// ReadSecret returns a Secret, an empty one if it does not exist.
func (c *Client) ReadSecret(ctx context.Context, namespace, name string) (*Secret, error) {
	secret := &Secret{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
	}
	path := secretsPath(namespace) + "/" + name
	err := c.call(ctx, http.MethodGet, path, acceptObjects, nil, decodeInto(secret))
	if secret.Data == nil {
		secret.Data = map[string][]byte{}
	}
	if apierrors.IsNotFound(err) {
		err = nil
	}
	return secret, err
}

func secretsPath(namespace string) string { return "/api/v1/namespaces/" + namespace + "/secrets" }

// Change changes a Secret's data. If it returns an error, nothing is written.
type Change func(data map[string][]byte) error

// ChangeSecret reads a Secret, applies change and writes it. If another wrote it in between, it starts again.
func (c *Client) ChangeSecret(ctx context.Context, namespace, name string, change Change) error {
	for {
		secret, err := c.ReadSecret(ctx, namespace, name)
		if err != nil {
			return err
		}
		if err := change(secret.Data); err != nil {
			return err
		}
		method, path := http.MethodPut, secretsPath(namespace)+"/"+name
		if secret.ResourceVersion == "" {
			method, path = http.MethodPost, secretsPath(namespace)
		}
		err = c.call(ctx, method, path, acceptObjects, secret, ignore)
		if !apierrors.IsConflict(err) {
			return err
		}
		select {
		case <-time.After(rand.N(100 * time.Millisecond)): //nolint:gosec // no secret
		case <-ctx.Done():
			return err
		}
	}
}
