// Package inbound accepts connections within bounds: of their number, and of the memory that unfinished
// headers may take. Beyond a bound it closes a connection, and never leaves one unread: what the agent does not
// read, frpc would have to buffer.
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

// What a byte that is read costs in memory, at most. Measured with the shortest headers.
const handshakeCost, headerCost = 2, 20

// What the kernel may hold for a connection, in bytes; it takes twice that. By default it takes several MiB for a
// caller who does not read, of the pod's memory. With less than 48 KiB to read, loopback has 8 MB/s.
const readBuffer, writeBuffer = 64 << 10, 32 << 10

// Reasons for Config.Closed: there were too many connections, all of them in use; it made room for another; its headers
// were unfinished for longest, and all of them too large together; it sent no valid PROXY header or TLS handshake.
const TooMany, Evicted, HeaderMemory, Invalid = "connections", "idle", "header_memory", "handshake"

// Config is what a Listener keeps to.
type Config struct {
	Connections  int           // how many may be open
	HeaderMemory int64         // bytes of memory that headers may take until their request is authenticated
	HelloTimeout time.Duration // how long a connection may take until its TLS handshake is over
	TLS          *tls.Config   // for connections that begin with a handshake; nil: neither TLS nor PROXY headers
	// Closed is told of each connection that was closed. err may be nil.
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
	waiting *list.List // of *Conn whose request is not authenticated, the one that has waited longest first
	headers int64      // memory that their headers may take
}

// New starts to accept from inner. It ends when inner, or what it returns, is closed.
func New(inner *net.TCPListener, config Config) *Listener {
	l := &Listener{
		TCPListener: inner, config: config, waiting: list.New(),
		ready: make(chan net.Conn), closed: make(chan struct{}),
	}
	go l.accept()
	return l
}

// Accept returns the next connection that has said what it is.
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
		if err != nil { // no file descriptors are left, for example
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

// admit counts a connection in. If there are too many, the one that has waited longest makes room.
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

// forget takes a connection out of the counts, once. l.mu is held.
func (l *Listener) forget(c *Conn) {
	if c.gone {
		return
	}
	c.gone = true
	l.open--
	l.settle(c)
	l.keep(c)
}

// keep takes a connection out of those that may be evicted. l.mu is held.
func (l *Listener) keep(c *Conn) {
	if c.place != nil {
		l.waiting.Remove(c.place)
		c.place = nil
	}
}

// settle ends what a connection's headers count for. l.mu is held.
func (l *Listener) settle(c *Conn) { l.headers, c.memory = l.headers-c.memory, 0 }

// begin finds out what a connection is, and hands it to Accept.
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
		l.mu.Lock()
		l.settle(c)
		l.mu.Unlock()
	}
	c.cost.Store(headerCost)
	select {
	case l.ready <- conn:
	case <-l.closed:
		_ = conn.Close()
	}
}

// ConnState is for http.Server. A connection that becomes idle begins the wait for its next request.
func (l *Listener) ConnState(conn net.Conn, state http.ConnState) {
	c := unwrap(conn)
	if c == nil || state != http.StateIdle {
		return
	}
	c.cost.Store(headerCost)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.settle(c)
	if c.place != nil {
		l.waiting.MoveToBack(c.place)
	}
}

// InUse returns how many connections are open, and how much memory unfinished headers may take.
func (l *Listener) InUse() (connections int, headers int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open, l.headers
}

// Conn is one connection. A nil *Conn does nothing: it is that of requests which came by another listener.
type Conn struct {
	*net.TCPConn

	listener *Listener
	remote   net.Addr
	proxied  bool         // remote is what a PROXY header said
	unread   []byte       // what was read to find out what the connection is
	cost     atomic.Int64 // memory that a byte which is read now may take

	// Guarded by the listener's mu.
	place  *list.Element // in waiting; nil while an authenticated request is being answered
	memory int64         // what its headers count for
	gone   bool
}

type contextKey struct{}

// ConnContext is for http.Server.
func ConnContext(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, contextKey{}, unwrap(conn))
}

// From returns the connection that a request came by, nil if that is not known.
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

// RemoteAddr returns the caller's address: what the PROXY header says, if there was one.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// Proxied reports whether a PROXY header said who the caller is.
func (c *Conn) Proxied() bool { return c != nil && c.proxied }

// HeadersRead is called when a request's headers are complete: what comes now is its body.
func (c *Conn) HeadersRead() {
	if c != nil {
		c.cost.Store(0)
	}
}

// Authenticated is called when a request's credential is accepted: the connection is safe from eviction until Answered.
func (c *Conn) Authenticated() {
	if c == nil {
		return
	}
	c.listener.mu.Lock()
	defer c.listener.mu.Unlock()
	c.listener.settle(c)
	c.listener.keep(c)
}

// Answered is called when a handler has returned. The last bytes of the answer may still be on their way.
func (c *Conn) Answered() {
	if c == nil {
		return
	}
	c.listener.mu.Lock()
	defer c.listener.mu.Unlock()
	if c.place == nil && !c.gone {
		c.place = c.listener.waiting.PushBack(c)
	}
}

func (c *Conn) Read(p []byte) (int, error) {
	if len(c.unread) > 0 {
		n := copy(p, c.unread)
		c.unread = c.unread[n:]
		return n, nil
	}
	n, err := c.TCPConn.Read(p)
	if cost := c.cost.Load(); cost > 0 && n > 0 && !c.listener.charge(c, int64(n)*cost) {
		return 0, errors.New("the headers of all requests take too much memory")
	}
	return n, err
}

// charge counts what was read of headers. Beyond the bound, connections are closed, the one whose headers are
// unfinished for longest first: those who are slow, or send without end, must not keep out those who come with whole
// headers at once. It returns false if that is c.
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

// Abort closes the connection under a write that does not return.
func (c *Conn) Abort() {
	if c != nil {
		_ = c.SetLinger(0)
		_ = c.Close()
	}
}

// reset drops what the kernel still holds for a caller who does not read.
func (c *Conn) reset() {
	_ = c.SetLinger(0)
	_ = c.TCPConn.Close()
}

// Close closes the connection and takes it out of the counts.
func (c *Conn) Close() error {
	c.listener.mu.Lock()
	c.listener.forget(c)
	c.listener.mu.Unlock()
	return c.TCPConn.Close()
}
