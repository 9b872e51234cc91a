// Package inbound limits the number of connections, and the memory for unfinished headers. Beyond a limit it closes a
// connection. It never leaves one unread, because frpc would have to buffer the data.
package inbound

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// handshakeCost and headerCost are the bytes of memory per byte read, at most. Measured with the shortest headers.
const handshakeCost, headerCost = 2, 20

// readBuffer and writeBuffer are the bytes that the kernel buffers for a connection; it uses twice the memory. By
// default a caller who does not read uses several MiB. With less than 48 KiB to read, loopback has 8 MB/s.
const readBuffer, writeBuffer = 64 << 10, 32 << 10

// Why a connection was closed.
const (
	TooMany      = "connections"   // all connections are in use
	Evicted      = "idle"          // it made room for another
	HeaderMemory = "header_memory" // unfinished headers used too much memory, and it had been unfinished for longest
	Invalid      = "handshake"     // it sent no valid PROXY header or TLS handshake
)

// Config holds the limits of a Listener.
type Config struct {
	Connections  int           // open at the same time
	HeaderMemory int64         // bytes of memory for headers until their request is authenticated
	HelloTimeout time.Duration // until the end of the TLS handshake
	TLS          *tls.Config   // nil: neither TLS nor PROXY headers
	// Closed is called for each connection that a limit closes. err may be nil.
	Closed func(reason string, caller net.Addr, err error)
}

// Listener wraps a net.Listener. Its Accept returns a *Conn, or a *tls.Conn around one after its handshake.
type Listener struct {
	*net.TCPListener

	config Config
	ready  chan net.Conn
	closed chan struct{}

	mu      sync.Mutex
	open    int
	waiting *list.List // of *Conn without an authenticated request, the one that has waited longest first
	headers int64      // bytes of memory that their headers may use
}

// New returns a Listener and starts to accept from inner, until either is closed.
func New(inner *net.TCPListener, config Config) *Listener {
	l := &Listener{
		TCPListener: inner, config: config, waiting: list.New(),
		ready: make(chan net.Conn), closed: make(chan struct{}),
	}
	go l.accept()
	return l
}

// Accept returns the next connection after its hello.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.ready:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *Listener) accept() {
	defer close(l.closed)
	for {
		accepted, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // for example, no file descriptors are left
			time.Sleep(100 * time.Millisecond)
			continue
		}
		c := &Conn{TCPConn: accepted, listener: l, remote: accepted.RemoteAddr()}
		_ = c.SetReadBuffer(readBuffer)
		_ = c.SetWriteBuffer(writeBuffer)
		if l.admit(c) {
			go l.begin(c)
		}
	}
}

// admit counts a connection. If there are too many, it closes the one that has waited longest, or c if none waits.
func (l *Listener) admit(c *Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open >= l.config.Connections {
		oldest := l.waiting.Front()
		if oldest == nil {
			l.config.Closed(TooMany, c.remote, nil)
			c.reset()
			return false
		}
		l.evict(oldest.Value.(*Conn), Evicted)
	}
	l.open++
	c.place = l.waiting.PushBack(c)
	return true
}

// evict closes a connection. l.mu is held.
func (l *Listener) evict(c *Conn, reason string) {
	l.forget(c)
	l.config.Closed(reason, c.remote, nil)
	c.reset() // net/http's next read or write fails
}

// forget removes a connection from the counts, once. l.mu is held.
func (l *Listener) forget(c *Conn) {
	if c.gone {
		return
	}
	c.gone = true
	l.open--
	l.releaseHeaders(c)
	l.protect(c)
}

// protect removes a connection from those that may be evicted. l.mu is held.
func (l *Listener) protect(c *Conn) {
	if c.place != nil {
		l.waiting.Remove(c.place)
		c.place = nil
	}
}

// releaseHeaders stops counting the memory of a connection's headers. l.mu is held.
func (l *Listener) releaseHeaders(c *Conn) { l.headers, c.memory = l.headers-c.memory, 0 }

// begin reads a connection's hello, and passes it to Accept.
func (l *Listener) begin(c *Conn) {
	conn := net.Conn(c)
	if l.config.TLS != nil {
		c.cost.Store(handshakeCost)
		_ = c.SetDeadline(time.Now().Add(l.config.HelloTimeout))
		var err error
		if conn, err = c.hello(l.config.TLS); err != nil {
			l.config.Closed(Invalid, c.remote, err)
			_ = c.Close()
			return
		}
		_ = c.SetDeadline(time.Time{})
		c.locked(l.releaseHeaders)
	}
	c.cost.Store(headerCost)
	select {
	case l.ready <- conn:
	case <-l.closed:
		_ = conn.Close()
	}
}

// ConnState is for http.Server. It moves a connection that becomes idle to the end of those that wait.
func (l *Listener) ConnState(conn net.Conn, state http.ConnState) {
	c := unwrap(conn)
	if c == nil || state != http.StateIdle {
		return
	}
	c.cost.Store(headerCost)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.releaseHeaders(c)
	if c.place != nil {
		l.waiting.MoveToBack(c.place)
	}
}

// InUse returns how many connections are open, and how many bytes of memory unfinished headers may use.
func (l *Listener) InUse() (connections, headers int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return int64(l.open), l.headers
}

// Conn is one connection. A nil *Conn, that of a request which came by another listener, does nothing.
type Conn struct {
	*net.TCPConn

	listener *Listener
	remote   net.Addr
	proxied  bool         // remote is what a PROXY header said
	unread   []byte       // read by peek
	cost     atomic.Int64 // bytes of memory that a byte read now may cost

	// Guarded by the listener's mu.
	place  *list.Element // in waiting; nil while an authenticated request is being answered
	memory int64         // counted for its headers
	gone   bool
}

type contextKey struct{}

// ConnContext is for http.Server. It lets From find the connection.
func ConnContext(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, contextKey{}, unwrap(conn))
}

// From returns the connection of a request's context, nil if there is none.
func From(ctx context.Context) *Conn {
	c, _ := ctx.Value(contextKey{}).(*Conn)
	return c
}

func unwrap(conn net.Conn) *Conn {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	c, _ := conn.(*Conn)
	return c
}

// RemoteAddr returns the caller's address, from the PROXY header if there was one.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// Proxied reports whether RemoteAddr is from a PROXY header.
func (c *Conn) Proxied() bool { return c != nil && c.proxied }

// HeadersRead must be called when a request's headers are complete: its body costs no memory.
func (c *Conn) HeadersRead() {
	if c != nil {
		c.cost.Store(0)
	}
}

// Authenticated must be called when a request's credential is accepted: until Answered, the connection is not evicted.
func (c *Conn) Authenticated() {
	if c != nil {
		c.locked(c.listener.releaseHeaders)
		c.locked(c.listener.protect)
	}
}

// Answered must be called when a handler has returned. The last bytes of the answer may still be in transit.
func (c *Conn) Answered() {
	if c == nil {
		return
	}
	c.locked(func(*Conn) {
		if c.place == nil && !c.gone {
			c.place = c.listener.waiting.PushBack(c)
		}
	})
}

func (c *Conn) Read(p []byte) (int, error) {
	if len(c.unread) > 0 {
		n := copy(p, c.unread)
		c.unread = c.unread[n:]
		return n, nil
	}
	n, err := c.TCPConn.Read(p)
	if cost := c.cost.Load(); cost > 0 && n > 0 && !c.listener.charge(c, int64(n)*cost) {
		return 0, errors.New("the headers of all requests use too much memory")
	}
	return n, err
}

// charge counts memory for headers, and returns false if c was closed. Beyond the limit, connections are closed whose
// headers have been unfinished for longest: slow or endless headers must not block those that arrive at once.
func (l *Listener) charge(c *Conn, memory int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.gone {
		return false
	}
	if c.memory == 0 && c.place != nil {
		l.waiting.MoveToBack(c.place)
	}
	c.memory += memory
	l.headers += memory
	for e := l.waiting.Front(); e != nil && l.headers > l.config.HeaderMemory; {
		other := e.Value.(*Conn)
		e = e.Next()
		if other.memory > 0 {
			l.evict(other, HeaderMemory)
		}
	}
	return !c.gone
}

// Abort closes the connection, also during a write that waits.
func (c *Conn) Abort() {
	if c != nil {
		_ = c.SetLinger(0)
		_ = c.Close()
	}
}

// reset closes the connection and drops what the kernel has buffered for a caller who does not read.
func (c *Conn) reset() {
	_ = c.SetLinger(0)
	_ = c.TCPConn.Close()
}

// Close closes the connection and removes it from the counts.
func (c *Conn) Close() error {
	c.locked(c.listener.forget)
	return c.TCPConn.Close()
}

// locked calls change with the connection while the listener's mu is held.
func (c *Conn) locked(change func(*Conn)) {
	c.listener.mu.Lock()
	defer c.listener.mu.Unlock()
	change(c)
}
