// Package relay stands between a client and a server, and can fall silent as middleboxes do.
package relay

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// Relay forwards connections to a server. On connections made while it is silent, it forwards only the given number
// of the server's first bytes, and holds back the rest forever.
type Relay struct {
	Addr   string // host:port to connect to
	Silent atomic.Bool

	server   string
	after    int64        // bytes of the server that are forwarded while it is silent
	held     atomic.Int32 // connections on which bytes were held back
	received atomic.Int64 // bytes from the server
	conns    sync.Map     // that are open
	running  sync.WaitGroup
	listener net.Listener
	stop     context.CancelFunc
}

// Start starts a relay on a free port of ip. It is silent after the given number of bytes until Silent is set to
// false.
func Start(ctx context.Context, ip, server string, after int64) (*Relay, error) {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort(ip, "0"))
	if err != nil {
		return nil, err
	}
	r := &Relay{Addr: listener.Addr().String(), server: server, after: after, listener: listener}
	r.Silent.Store(true)
	ctx, r.stop = context.WithCancel(context.WithoutCancel(ctx))
	r.running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			r.running.Go(func() { r.forward(ctx, conn) })
		}
	})
	return r, nil
}

// Close ends the relay and all its connections.
func (r *Relay) Close() {
	_ = r.listener.Close()
	r.stop()
	r.running.Wait()
}

// Cut ends all connections.
func (r *Relay) Cut() {
	r.conns.Range(func(conn, _ any) bool {
		_ = conn.(net.Conn).Close()
		return true
	})
}

// Held returns the number of connections on which bytes were held back.
func (r *Relay) Held() int { return int(r.held.Load()) }

// Received returns how many bytes the server has sent while the relay was not silent.
func (r *Relay) Received() int64 { return r.received.Load() }

type counter struct{ n *atomic.Int64 }

func (c counter) Write(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}

func (r *Relay) forward(ctx context.Context, conn net.Conn) {
	silent := r.Silent.Load()
	r.conns.Store(conn, nil)
	defer r.conns.Delete(conn)
	defer func() { _ = conn.Close() }()
	upstream, err := (&net.Dialer{}).DialContext(ctx, "tcp", r.server)
	if err != nil {
		return
	}
	defer func() { _ = upstream.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close(); _ = upstream.Close() })
	defer stop()
	r.running.Go(func() {
		_, _ = io.Copy(upstream, conn)
		_ = upstream.Close()
	})
	if !silent {
		_, _ = io.Copy(conn, io.TeeReader(upstream, counter{&r.received}))
		return
	}
	_, _ = io.CopyN(conn, upstream, r.after)
	if _, err := upstream.Read(make([]byte, 1)); err == nil {
		r.held.Add(1)
		<-ctx.Done()
	}
}
