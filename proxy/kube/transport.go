package kube

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"sync/atomic"
	"time"

	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
)

const (
	// streamWindow is how many bytes of an answer the API server may send ahead of its caller; Go's default is 4 MiB.
	streamWindow = 64 << 10
	// socketBuffer is the same for connections of HTTP/1.1, where the kernel holds them.
	socketBuffer = 128 << 10
	// maxResponseHeaders is the size in bytes of the headers of an answer, which a pod behind services/proxy chooses.
	maxResponseHeaders = 64 << 10
	// headersTimeout is how long an API server of HTTP/1.1 may take to begin its answer: longer than it gives
	// itself (--request-timeout, 60 s). Over HTTP/2 pings tell whether it is there.
	headersTimeout = 75 * time.Second
	// maxDials is how many connections are made at a time, not how many there are. Before it is made, a connection
	// cannot be shared: two thousand watches that began at once dialled five thousand.
	maxDials = 3
)

// lanes sends upgrades over HTTP/1.1 and all other requests over HTTP/2, if the API server speaks it.
type lanes struct {
	http2, http1 http.RoundTripper
	latency      func(seconds float64)
	major        atomic.Int32  // version of HTTP that the API server speaks; 0: not known yet
	first        chan struct{} // holds the request that finds out
	plugin       *plugin       // nil: the credential comes from no plugin
}

func newLanes(config *rest.Config, target *url.URL, latency func(seconds float64)) (*lanes, error) {
	l := &lanes{latency: latency, first: make(chan struct{}, 1)}
	if target.Scheme == "http" {
		l.major.Store(1)
	}
	if config.ExecProvider != nil {
		l.plugin = &plugin{command: config.ExecProvider.Command}
	}
	// With a dialer, client-go makes a transport for this lane alone; it shares the others in a cache. And with
	// protocols said, although they are the default: without TLS it hands out http.DefaultTransport.
	dial := config.Dial
	if dial == nil {
		dial = (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext // as client-go
	}
	config.Dial, config.NextProtos = dial, []string{"h2", "http/1.1"}
	var err error
	if l.http2, err = transportFor(config, func(t *http.Transport) { t.MaxConnsPerHost = maxDials }); err != nil {
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
	if l.http1, err = transportFor(config, func(t *http.Transport) { t.ResponseHeaderTimeout = headersTimeout }); err != nil {
		return nil, err
	}
	return l, nil
}

// transportFor returns client-go's transport with bounds on what it holds of answers.
func transportFor(config *rest.Config, bound func(*http.Transport)) (http.RoundTripper, error) {
	config = rest.CopyConfig(config)
	bounded := false
	config.Wrap(func(rt http.RoundTripper) http.RoundTripper {
		inner := rt
		for w, ok := inner.(utilnet.RoundTripperWrapper); ok; w, ok = inner.(utilnet.RoundTripperWrapper) {
			inner = w.WrappedRoundTripper() // such as the one that reloads CA files
		}
		if t, ok := inner.(*http.Transport); ok {
			t.HTTP2 = &http.HTTP2Config{MaxReceiveBufferPerStream: streamWindow}
			t.MaxResponseHeaderBytes = maxResponseHeaders
			bound(t)
			bounded = true
		}
		return rt
	})
	transport, err := rest.TransportFor(config)
	if err == nil && !bounded {
		err = errors.New("client-go has no *http.Transport to set limits on")
	}
	if err != nil {
		return nil, fmt.Errorf("the connection to the API server: %w", err)
	}
	return transport, nil
}

func (l *lanes) RoundTrip(r *http.Request) (*http.Response, error) {
	start := time.Now()
	send := l.call
	if r.Header.Get("Upgrade") != "" {
		send = l.http1.RoundTrip
	}
	if l.plugin != nil {
		send = l.plugin.bound(send)
	}
	resp, err := send(r)
	if err != nil && worthAnother(r, err) {
		resp, err = send(r)
	}
	if err == nil {
		l.latency(time.Since(start).Seconds())
	}
	return resp, err
}

// call sends a request that is no upgrade.
func (l *lanes) call(r *http.Request) (*http.Response, error) {
	if l.major.Load() == 0 && r.Body == nil { // one at a time: over HTTP/1.1 watches behind maxDials would wait for ever
		select {
		case l.first <- struct{}{}:
			defer func() { <-l.first }()
		case <-time.After(5 * time.Second):
		}
	}
	if l.major.Load() == 1 {
		return l.http1.RoundTrip(r)
	}
	resp, err := l.http2.RoundTrip(r)
	if err == nil {
		l.major.CompareAndSwap(0, int32(resp.ProtoMajor))
	}
	return resp, err
}

// worthAnother says whether a connection has died under a request that can be sent again on a new one: another
// API server behind the same address may answer. client-go does the same where nothing is between.
// Source: k8s.io/client-go/rest/request.go, isErrRetryableFunc.
func worthAnother(r *http.Request, err error) bool {
	return (r.Method == http.MethodGet || r.Method == http.MethodHead) && r.Body == nil && r.Header.Get("Upgrade") == "" &&
		r.Context().Err() == nil && (utilnet.IsHTTP2ConnectionLost(err) || utilnet.IsConnectionReset(err) || utilnet.IsProbableEOF(err))
}

// plugin is the program that the kubeconfig names for its credential. client-go waits for it without end.
type plugin struct {
	command   string
	abandoned atomic.Int32 // requests that wait for it though their callers have gone
}

const pluginTimeout, maxAbandoned = 30 * time.Second, 32

// bound ends the wait for the plugin with the caller, and after pluginTimeout.
func (p *plugin) bound(send func(*http.Request) (*http.Response, error)) func(*http.Request) (*http.Response, error) {
	return func(r *http.Request) (*http.Response, error) {
		if p.abandoned.Load() >= maxAbandoned {
			return nil, &pluginError{p.command}
		}
		ctx, cancel := context.WithCancel(r.Context())
		limit := time.AfterFunc(pluginTimeout, cancel) // later it ends with r's: the caller reads the answer
		var given atomic.Bool                          // the credential
		traced := r.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GetConn: func(string) { limit.Stop(); given.Store(true) }}))
		var resp *http.Response
		var err error
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			resp, err = send(traced) //nolint:bodyclose // below, or by the caller
		}()
		select {
		case <-answered:
			return resp, err
		case <-ctx.Done():
		}
		p.abandoned.Add(1)
		go func() {
			defer p.abandoned.Add(-1)
			if <-answered; err == nil {
				_ = resp.Body.Close()
			}
		}()
		if given.Load() {
			return nil, context.Cause(ctx)
		}
		return nil, &pluginError{p.command}
	}
}

// pluginError is a credential plugin that does not come to its end.
type pluginError struct{ command string }

func (e *pluginError) Error() string {
	return fmt.Sprintf("the kubeconfig's credential plugin %s does not answer: check it, or use a kubeconfig with another credential", e.command)
}
