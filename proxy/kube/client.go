package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// RESTConfig returns the API server's address and the agent's credential: from the kubeconfig if one is named (several
// paths as in KUBECONFIG), else from the pod's ServiceAccount, else, unless inCluster, from ~/.kube/config.
func RESTConfig(kubeconfig string, inCluster bool) (*rest.Config, error) {
	if kubeconfig == "" {
		config, err := rest.InClusterConfig()
		if err == nil {
			return config, nil
		}
		if inCluster || !errors.Is(err, rest.ErrNotInCluster) {
			return nil, fmt.Errorf("kubernetes.in_cluster: %w: run in a pod with a mounted ServiceAccount token, "+
				"or set kubernetes.kubeconfig (KUBECONFIG)", err)
		}
		kubeconfig = clientcmd.RecommendedHomeFile
		if _, err := os.Stat(kubeconfig); err != nil {
			return nil, fmt.Errorf("not in a pod, and no %s: set kubernetes.kubeconfig (KUBECONFIG)", kubeconfig)
		}
	}
	rules := &clientcmd.ClientConfigLoadingRules{Precedence: filepath.SplitList(kubeconfig)}
	if len(rules.Precedence) == 1 {
		rules = &clientcmd.ClientConfigLoadingRules{ExplicitPath: kubeconfig} // must exist
	}
	// Not clientcmd's deferred loading: where the files are empty, it falls back to the ServiceAccount.
	var config *rest.Config
	loaded, err := rules.Load()
	if err == nil {
		config, err = clientcmd.NewDefaultClientConfig(*loaded, nil).ClientConfig()
	}
	if err != nil {
		return nil, fmt.Errorf("kubernetes.kubeconfig (KUBECONFIG) %s: %w", kubeconfig, err)
	}
	return config, nil
}

// Client sends requests to the API server: the agent's own, and as a RoundTripper those of a Proxy. Upgrades go over
// HTTP/1.1, and all others over HTTP/2 if the API server speaks it. Safe for concurrent use.
type Client struct {
	target       *url.URL
	http2, http1 http.RoundTripper
	latency      func(seconds float64)
	major        atomic.Int32  // version of HTTP that the API server speaks; 0: not known yet
	first        chan struct{} // holds the request that finds out
	noCredential error         // of a credential plugin that does not return; nil: there is no plugin
	abandoned    atomic.Int32  // requests that wait for the plugin although their callers have gone
}

// NewClient returns a client of the API server of config. It calls latency with the seconds from each request to the
// headers of the answer. It connects to nothing yet.
func NewClient(config *rest.Config, latency func(seconds float64)) (*Client, error) {
	config = rest.CopyConfig(config)
	config.DisableCompression = true // else Go would change bodies and their headers
	target, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, fmt.Errorf("the API server's address %q: %w", config.Host, err)
	}
	c := &Client{target: target, latency: latency, first: make(chan struct{}, 1)}
	if target.Scheme == "http" {
		c.major.Store(1)
	}
	if config.ExecProvider != nil {
		c.noCredential = fmt.Errorf("the kubeconfig's credential plugin %s %w", config.ExecProvider.Command, errPlugin)
	}
	// client-go caches and shares transports, but makes a new one where a dialer is set. Protocols are set although
	// they are the default: without TLS, client-go would return http.DefaultTransport.
	dial := config.Dial
	if dial == nil {
		dial = (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext // as client-go
	}
	config.Dial, config.NextProtos = dial, []string{"h2", "http/1.1"}
	if c.http2, err = transportFor(config, func(t *http.Transport) { t.MaxConnsPerHost = maxDials }); err != nil {
		return nil, err
	}
	// HTTP/2 has no upgrades: exec, attach and port-forward need connections of their own.
	config.NextProtos = []string{"http/1.1"}
	config.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetReadBuffer(socketBuffer)
		}
		return conn, err
	}
	c.http1, err = transportFor(config, func(t *http.Transport) { t.ResponseHeaderTimeout = headersTimeout })
	return c, err
}

// What the agent's own requests accept: whole objects, or of each only its metadata.
const (
	acceptObjects  = "application/json"
	acceptMetadata = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
)

// failedCheck is a line of the API server's /readyz.
var failedCheck = regexp.MustCompile(`\[-\][^:\n]*`)

// call sends a request, with body as JSON if it is not nil, and calls read with the body of a 2xx answer. Any other
// answer is an *apierrors.StatusError.
func (c *Client) call(ctx context.Context, method, path, accept string, body io.Reader, read reader) error {
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimRight(c.target.String(), "/")+path, body)
	if err != nil {
		return err
	}
	req.Header = http.Header{"Content-Type": {"application/json"}, "Accept": {accept}}
	resp, err := c.RoundTrip(req)
	if err != nil {
		_, message := explain(c.target.Host, err)
		return errors.New(message)
	}
	defer func() {
		_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // a body read to its end frees its connection
		_ = resp.Body.Close()
	}()
	if resp.StatusCode >= 300 {
		var status metav1.Status
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		if err := json.Unmarshal(body, &status); err != nil || status.Message == "" {
			failed := failedCheck.FindAllString(string(body), -1)
			status.Message = strings.Join(append([]string{resp.Status}, failed...), "; ")
		}
		message := fmt.Sprintf("the Kubernetes API server at %s answers %s %s: %s",
			c.target.Host, method, req.URL.Path, status.Message)
		if resp.StatusCode == http.StatusUnauthorized {
			message = errCredential.Error()
		}
		// Without its reason: for an existing Secret that is AlreadyExists, which ChangeSecret must see as a conflict.
		return &apierrors.StatusError{ErrStatus: metav1.Status{Code: int32(resp.StatusCode), Message: message}}
	}
	if err := read(resp.Body); err != nil {
		return fmt.Errorf("the answer of the Kubernetes API server at %s to %s %s cannot be read: %w",
			c.target.Host, method, req.URL.Path, err)
	}
	return nil
}

// reader reads the body of an answer.
type reader func(body io.Reader) error

func decodeInto(object any) reader {
	return func(body io.Reader) error { return json.NewDecoder(body).Decode(object) }
}

func ignore(io.Reader) error { return nil }

// CheckReady returns an error unless the API server says that it is ready, which includes its storage. A credential
// that may not ask for that passes too.
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
	err := c.call(ctx, http.MethodGet, secretsPath(namespace)+"/"+name, acceptObjects, nil, decodeInto(secret))
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

// ChangeSecret reads a Secret, applies change and writes it. If the Secret was written by another in between, it starts
// again, so that no change is lost.
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
		data, err := json.Marshal(secret)
		if err != nil {
			return err
		}
		err = c.call(ctx, method, path, acceptObjects, bytes.NewReader(data), ignore)
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
