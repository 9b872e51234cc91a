package kube

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/transport"
)

// RESTConfig returns the API server's address and the agent's credential: from the kubeconfig if one is named (several
// paths as in KUBECONFIG), else from the pod's ServiceAccount, else, unless inCluster, from ~/.kube/config.
func RESTConfig(kubeconfig string, inCluster bool) (*rest.Config, error) {
	if kubeconfig == "" {
		switch config, err := rest.InClusterConfig(); {
		case err == nil:
			return config, nil
		case inCluster || !errors.Is(err, rest.ErrNotInCluster):
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

const (
	streamWindow       = 64 << 10  // bytes of an answer that the API server may send ahead; Go's default is 4 MiB
	socketBuffer       = 128 << 10 // the same for connections of HTTP/1.1, where the kernel holds the bytes
	maxResponseHeaders = 64 << 10  // bytes of an answer's headers: a pod behind services/proxy chooses them

	// headersTimeout is how long an API server of HTTP/1.1 may take to begin its answer: longer than its own
	// --request-timeout (60 s). Over HTTP/2, pings detect an API server that is gone.
	headersTimeout = 75 * time.Second
	// maxDials limits connections that are being made, not those that are open. A connection cannot be shared before
	// it is made: without the limit, two thousand watches that began at once dialled five thousand.
	maxDials = 3
)

// Client sends requests to the API server: the agent's own, and as a RoundTripper those of a Proxy. Upgrades go over
// HTTP/1.1, and all others over HTTP/2 if the API server speaks it. Safe for concurrent use.
type Client struct {
	target       *url.URL
	http2, http1 http.RoundTripper
	latency      func(r *http.Request, seconds float64)
	major        atomic.Int32  // version of HTTP that the API server speaks; 0: not known yet
	first        chan struct{} // held by the one request that finds out the version
	noCredential error         // the error if the credential plugin does not return; nil: there is no plugin
	abandoned    atomic.Int32  // requests that wait for the plugin although their callers have gone
}

// NewClient returns a client of the API server of config. It calls latency with each request and the seconds until the
// headers of its answer. It connects to nothing yet.
func NewClient(config *rest.Config, latency func(r *http.Request, seconds float64)) (*Client, error) {
	config = rest.CopyConfig(config)
	config.DisableCompression = true // else Go would change bodies and their headers
	if file := config.BearerTokenFile; file != "" {
		// client-go itself would not read the file again after a 401, but use a revoked token for up to 50 s.
		config.BearerToken, config.BearerTokenFile = "", ""
		config.Wrap(transport.ResettableTokenSourceWrapTransport(transport.NewCachedFileTokenSource(file)))
	}
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

// transportFor returns client-go's transport with limits on how much of an answer it holds.
func transportFor(config *rest.Config, limit func(*http.Transport)) (http.RoundTripper, error) {
	roundTripper, err := rest.TransportFor(config)
	if err != nil {
		return nil, fmt.Errorf("the connection to the API server: %w", err)
	}
	inner := roundTripper
	for w, ok := inner.(utilnet.RoundTripperWrapper); ok; w, ok = inner.(utilnet.RoundTripperWrapper) {
		inner = w.WrappedRoundTripper() // such as the one that adds the credential, or reloads CA files
	}
	limited, ok := inner.(*http.Transport)
	if !ok {
		return nil, errors.New("the connection to the API server: client-go has no *http.Transport to set limits on")
	}
	limited.HTTP2 = &http.HTTP2Config{MaxReceiveBufferPerStream: streamWindow}
	limited.MaxResponseHeaderBytes = maxResponseHeaders
	limit(limited)
	return roundTripper, nil
}

// RoundTrip sends a request, once more if its connection died and it can be repeated, and observes the latency.
func (c *Client) RoundTrip(r *http.Request) (*http.Response, error) {
	send := c.send
	if c.noCredential != nil {
		send = c.sendWithPlugin
	}
	start := time.Now()
	resp, err := send(r)
	if err != nil && isRetryable(r, err) {
		resp, err = send(r)
	}
	if err == nil {
		c.latency(r, time.Since(start).Seconds())
	}
	return resp, err
}

// send sends a request once. Until it is known whether the API server speaks HTTP/2, requests go one at a time: over
// HTTP/1.1, watches behind maxDials would wait for ever.
func (c *Client) send(r *http.Request) (*http.Response, error) {
	if r.Header.Get("Upgrade") != "" {
		return c.http1.RoundTrip(r)
	}
	if c.major.Load() == 0 && r.Body == nil {
		select {
		case c.first <- struct{}{}:
			defer func() { <-c.first }()
		case <-time.After(5 * time.Second):
		}
	}
	if c.major.Load() == 1 {
		return c.http1.RoundTrip(r)
	}
	resp, err := c.http2.RoundTrip(r)
	if err == nil {
		c.major.CompareAndSwap(0, int32(resp.ProtoMajor))
	}
	return resp, err
}

// isRetryable reports whether a connection died under a request that can be sent again on a new one: another API server
// behind the same address may answer. Source: k8s.io/client-go/rest/request.go, isErrRetryableFunc.
func isRetryable(r *http.Request, err error) bool {
	return (r.Method == http.MethodGet || r.Method == http.MethodHead) &&
		r.Body == nil && r.Header.Get("Upgrade") == "" && r.Context().Err() == nil &&
		(utilnet.IsHTTP2ConnectionLost(err) || utilnet.IsConnectionReset(err) || utilnet.IsProbableEOF(err))
}

// pluginTimeout is how long a request waits for the credential plugin. maxAbandoned is how many requests may still wait
// for it after their callers have gone: client-go itself waits without end.
const pluginTimeout, maxAbandoned = 30 * time.Second, 32

// sendWithPlugin is send, but returns noCredential if the plugin takes longer than the caller waits, or pluginTimeout.
func (c *Client) sendWithPlugin(r *http.Request) (*http.Response, error) {
	if c.abandoned.Load() >= maxAbandoned {
		return nil, c.noCredential
	}
	ctx, cancel := context.WithCancel(r.Context())
	limit := time.AfterFunc(pluginTimeout, cancel) // not deferred: the caller still reads the answer
	var given atomic.Bool                          // the plugin has returned a credential
	traced := r.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GetConn: func(string) {
		limit.Stop()
		given.Store(true)
	}}))
	var resp *http.Response
	var err error
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		resp, err = c.send(traced) //nolint:bodyclose // below, or by the caller
	}()
	select {
	case <-answered:
		return resp, err
	case <-ctx.Done():
	}
	c.abandoned.Add(1)
	go func() {
		defer c.abandoned.Add(-1)
		if <-answered; err == nil {
			_ = resp.Body.Close()
		}
	}()
	if given.Load() {
		return nil, context.Cause(ctx)
	}
	return nil, c.noCredential
}
