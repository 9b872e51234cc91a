// Command tunnels runs the ends of tunnels that are libraries, or whose programs are no module that can be required.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"github.com/rancher/remotedialer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	konnectivity "sigs.k8s.io/apiserver-network-proxy/konnectivity-client/pkg/client"
)

func main() {
	err := errors.New("usage: tunnels END CERTIFICATES LISTEN SERVER TARGET")
	if len(os.Args) == 6 {
		e := end{certificates: os.Args[2], listen: os.Args[3], server: os.Args[4], target: os.Args[5]}
		switch os.Args[1] {
		case "remotedialer-server":
			err = e.remotedialerServer()
		case "remotedialer-agent":
			err = e.remotedialerAgent()
		case "user-server":
			err = e.userServer()
		case "service-proxy":
			err = e.serviceProxy()
		}
	}
	fmt.Fprintln(os.Stderr, "tunnels:", err)
	os.Exit(1)
}

// end is one end of a tunnel.
type end struct {
	certificates string // directory of tls.crt and tls.key, which all ends show to each other, and trust
	listen       string // address that requests come to
	server       string // address of the tunnel's server, for its agent
	target       string // address that requests go to
}

// token stands for the credentials of agents and of callers.
const token = "Bearer token"

// remotedialerServer is the server of Rancher's tunnel: requests go through it to the agent's target.
func (e end) remotedialerServer() error {
	tunnel := remotedialer.New(func(r *http.Request) (string, bool, error) {
		return "agent", r.Header.Get("Authorization") == token, nil
	}, remotedialer.DefaultErrorWriter)
	failed := make(chan error, 2)
	go func() { failed <- e.serveTLS(e.server, tunnel) }()
	go func() {
		failed <- serve(e.listen, proxy("http://"+e.target, &http.Transport{
			DialContext: tunnel.Dialer("agent"), MaxIdleConnsPerHost: 100, DisableCompression: true,
		}))
	}()
	return <-failed
}

// remotedialerAgent is the agent of Rancher's tunnel, with a proxy that authenticates to the API server.
func (e end) remotedialerAgent() error {
	config, err := e.client()
	if err != nil {
		return err
	}
	go func() {
		dialer := &websocket.Dialer{TLSClientConfig: config, HandshakeTimeout: 10 * time.Second}
		for { // it waits between two tries
			_ = remotedialer.ClientConnect(context.Background(), "wss://"+e.server, http.Header{"Authorization": {token}},
				dialer, func(_, address string) bool { return address == e.listen }, nil)
		}
	}()
	return serve(e.listen, proxy("https://"+e.target, &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true, DisableCompression: true,
	}))
}

// userServer is the front of Open Cluster Management's cluster-proxy: for each request it makes a connection to
// konnectivity's server, and through it one to the cluster's service proxy.
func (e end) userServer() error {
	config, err := e.client()
	if err != nil {
		return err
	}
	return e.serveTLS(e.listen, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tunnel, err := konnectivity.CreateSingleUseGrpcTunnelWithContext(context.Background(), r.Context(), e.server,
			grpc.WithTransportCredentials(credentials.NewTLS(config)),
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Minute}))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		proxy("https://"+e.target, &http.Transport{
			DialContext:     func(ctx context.Context, n, a string) (net.Conn, error) { return tunnel.DialContext(ctx, n, a) },
			TLSClientConfig: config.Clone(),
		}).ServeHTTP(w, r)
	}))
}

// serviceProxy is cluster-proxy's proxy in the cluster. It speaks HTTP/1.1 to the API server, for upgrades.
func (e end) serviceProxy() error {
	return e.serveTLS(e.listen, proxy("https://"+e.target, &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, MaxIdleConns: 100, IdleConnTimeout: 90 * time.Second,
	}))
}

// proxy forwards to a URL with the API server's token.
func proxy(to string, transport http.RoundTripper) http.Handler {
	target, err := url.Parse(to)
	if err != nil {
		panic(err) // made of an address
	}
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Header.Set("Authorization", token)
		},
		Transport: transport, BufferPool: buffers{},
	}
}

// buffers are ReverseProxy's for copying: without them it allocates 32 KiB for each answer.
type buffers struct{}

var pool = sync.Pool{New: func() any { return new([32 << 10]byte) }}

func (buffers) Get() []byte  { return pool.Get().(*[32 << 10]byte)[:] }
func (buffers) Put(b []byte) { pool.Put((*[32 << 10]byte)(b)) }

// client returns a configuration that trusts the other ends, and shows the certificate to them.
func (e end) client() (*tls.Config, error) {
	authority, err := os.ReadFile(filepath.Join(e.certificates, "tls.crt"))
	if err != nil {
		return nil, err
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
	config.RootCAs.AppendCertsFromPEM(authority)
	pair, err := tls.LoadX509KeyPair(filepath.Join(e.certificates, "tls.crt"), filepath.Join(e.certificates, "tls.key"))
	config.Certificates = []tls.Certificate{pair}
	return config, err
}

func serve(address string, handler http.Handler) error {
	server := &http.Server{Addr: address, Handler: handler, ReadHeaderTimeout: time.Minute}
	return server.ListenAndServe()
}

func (e end) serveTLS(address string, handler http.Handler) error {
	server := &http.Server{Addr: address, Handler: handler, ReadHeaderTimeout: time.Minute}
	return server.ListenAndServeTLS(filepath.Join(e.certificates, "tls.crt"), filepath.Join(e.certificates, "tls.key"))
}
