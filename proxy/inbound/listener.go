// Package inbound limits the number of connections, and the memory for unfinished headers. Beyond a limit it closes a
// connection. It never leaves one unread, because frpc would have to buffer the data.
package inbound

import (
	"bytes"
	"container/list"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/util/sets"
)

const (
	// Bytes of memory per byte read, at most. Measured with the shortest headers.
	handshakeCost, headerCost = 2, 20

	// A connection of HTTP/2 counts as so many. Measured: it takes 37 KB while idle, where one of HTTP/1.1 takes 30, and
	// up to 25 more for HPACK's tables. Headers are counted apart.
	http2Connections = 2

	// Bytes of memory for an unauthenticated request of HTTP/2, besides its headers: there can be many on a connection.
	streamCost = 16 << 10

	// Bytes that the kernel buffers for a connection; it uses twice the memory. By default a caller who does not read
	// uses several MiB. With less than 48 KiB to read, loopback has 8 MB/s.
	readBuffer, writeBuffer = 64 << 10, 32 << 10

	handshakeRecord = 0x16                     // begins every TLS connection (RFC 8446, 5.1), and no HTTP request
	signature       = "\r\n\r\n\x00\r\nQUIT\n" // begins a PROXY header
	maxProxyHeader  = 512                      // bytes after the first 16: addresses, ports, and further fields

	// frps keeps idle connections for 60 s: if this end closed first, a request would be lost.
	idleTimeout = 120 * time.Second
)

// Why a connection was closed.
const (
	TooMany      = "connections"   // all connections are in use
	Evicted      = "idle"          // it made room for another
	HeaderMemory = "header_memory" // unfinished headers used too much memory, and its own most of it: see charge
	Certificate  = "certificate"   // the caller's certificate is not valid any more
	Invalid      = "handshake"     // it sent no valid PROXY header or TLS handshake
)

// Config holds the limits of a Listener.
type Config struct {
	Connections  int           // open at the same time; one of HTTP/2 counts as http2Connections
	HeaderMemory int64         // bytes of memory for headers until their request is authenticated
	Window       int64         // bytes that HTTP/2 keeps of the bodies of a connection
	HelloTimeout time.Duration // until the end of the TLS handshake
	TLS          *tls.Config   // nil: neither TLS nor PROXY headers
	// Closed is called for each connection that a limit closes. err may be nil.
	Closed func(reason string, caller net.Addr, err error)
}

// Listener wraps a net.Listener. Its Accept returns a *Conn, or one around it after its TLS handshake: a *tls.Conn, and
// for HTTP/2 one of plain bytes, which http.Server takes for HTTP/2 without TLS.
type Listener struct {
	*net.TCPListener

	config Config
	ready  chan net.Conn
	closed chan struct{}

	mu      sync.Mutex
	open    sets.Set[*Conn]
	count   int        // of open, as Config.Connections counts
	waiting *list.List // of *Conn without an authenticated request, the one that has waited longest first
	headers int64      // bytes of memory that headers of unauthenticated requests may use
}

// New returns a Listener and starts to accept from inner, until either is closed.
func New(inner *net.TCPListener, config Config) *Listener {
	l := &Listener{
		TCPListener: inner, config: config, ready: make(chan net.Conn), closed: make(chan struct{}),
		open: sets.New[*Conn](), waiting: list.New(),
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
		c := &Conn{TCPConn: accepted, listener: l, remote: accepted.RemoteAddr(), Begun: time.Now()}
		_ = c.SetReadBuffer(readBuffer)
		_ = c.SetWriteBuffer(writeBuffer)
		c.locked(func() { l.open.Insert(c) })
		if l.admit(c, 1) {
			go l.begin(c)
		}
	}
}

// admit counts an open connection as n more. Beyond the limit it closes those that have waited longest. It returns
// false if c is closed.
func (l *Listener) admit(c *Conn, n int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.open.Has(c) {
		return false
	}
	c.count += n
	l.count += n
	c.setWaiting(true)
	for l.count > l.config.Connections {
		oldest, reason := l.waiting.Front().Value.(*Conn), Evicted
		if oldest == c {
			reason = TooMany
		}
		oldest.evict(reason)
	}
	return l.open.Has(c)
}

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
		c.locked(func() { c.releaseHeaders(c.memory) })
	}
	c.cost.Store(headerCost)
	if c.http2 {
		c.cost.Store(0)
		conn = &framed{Conn: conn, conn: c, preface: preface}
		if !l.admit(c, http2Connections-1) {
			return
		}
	}
	select {
	case l.ready <- conn:
	case <-l.closed:
		_ = conn.Close()
	}
}

// hello reads the PROXY header, if there is one, and does the TLS handshake if the next byte begins one. Else the
// caller speaks plain HTTP: frpc's health check always does, and a lease may change the tunnel's type.
func (c *Conn) hello(config *tls.Config) (net.Conn, error) {
	first, err := c.peek()
	if err == nil && first[0] == signature[0] {
		if err = c.readProxyHeader(); err == nil {
			first, err = c.peek()
		}
	}
	switch {
	case err != nil:
		return nil, err
	case string(first) == "PRI": // net/http would take it from anybody, and nothing would count its frames
		return nil, errors.New("HTTP/2 without TLS")
	case first[0] != handshakeRecord:
		return c, nil
	}
	conn := tls.Server(c, config)
	err = conn.HandshakeContext(context.Background()) // the connection has a deadline
	state := conn.ConnectionState()
	if c.http2 = state.NegotiatedProtocol == "h2"; c.http2 {
		c.State = &state
	}
	c.locked(func() { c.peer = state.PeerCertificates })
	return conn, err
}

// CloseUnless closes the connections whose callers have shown a certificate that is no longer valid. It returns how
// many.
func (l *Listener) CloseUnless(valid func(peer []*x509.Certificate) bool) (closed int) {
	l.mu.Lock()
	peers := map[*Conn][]*x509.Certificate{}
	for c := range l.open {
		if len(c.peer) > 0 {
			peers[c] = c.peer
		}
	}
	l.mu.Unlock()
	for c, peer := range peers {
		if !valid(peer) {
			c.locked(func() { c.evict(Certificate) })
			closed++
		}
	}
	return closed
}

// peek returns the next three bytes, which stay unread. Every hello and every request has more.
func (c *Conn) peek() ([]byte, error) {
	var first [3]byte
	if _, err := io.ReadFull(c, first[:]); err != nil {
		return nil, err
	}
	c.unread = first[:]
	return c.unread, nil
}

// readProxyHeader sets the caller's address from the PROXY header that frpc sends for tunnels of type https and tcp.
// Source: the PROXY protocol, version 2, section 2.2.
func (c *Conn) readProxyHeader() error {
	var head [16]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return fmt.Errorf("the PROXY header is incomplete: %w", err)
	}
	length := binary.BigEndian.Uint16(head[14:])
	if !bytes.HasPrefix(head[:], []byte(signature)) || head[12]>>4 != 2 || length > maxProxyHeader {
		return errors.New("not a PROXY header of version 2")
	}
	rest := make([]byte, length)
	if _, err := io.ReadFull(c, rest); err != nil {
		return fmt.Errorf("the PROXY header is incomplete: %w", err)
	}
	if command := head[12] & 0xf; command == 0 { // LOCAL: the connection is the proxy's own
		return nil
	}
	size := map[byte]int{0x11: 4, 0x21: 16}[head[13]] // TCP over IPv4 and IPv6
	if size == 0 || len(rest) < 2*size+4 {
		return errors.New("the PROXY header holds no TCP address")
	}
	addr, _ := netip.AddrFromSlice(rest[:size])
	remote := netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(rest[2*size:]))
	c.locked(func() { c.remote, c.Proxied = net.TCPAddrFromAddrPort(remote), true })
	return nil
}

// ConnState is for http.Server. It moves a connection that becomes idle to the end of those that wait. Over HTTP/2 what
// has not reached the handler by then is counted apart. The server must have no IdleTimeout: by that, net/http keeps a
// connection of HTTP/2 that was cut during a request, and nothing counts it.
func (l *Listener) ConnState(conn net.Conn, state http.ConnState) {
	c := unwrap(conn)
	if c != nil && c.idle != nil {
		c.idle.Stop()
	}
	switch {
	case c == nil || state != http.StateIdle:
	case c.http2: // has no timeout: what is idle makes room, and the server's pings find a caller who has gone
		c.countHeaders(0, (*blocks).idle)
	default:
		c.idle = time.AfterFunc(idleTimeout, func() { _ = conn.Close() })
		c.cost.Store(headerCost)
		c.locked(func() {
			c.releaseHeaders(c.memory)
			c.setWaiting(true)
		})
	}
}

// InUse returns how many connections are open, as Config.Connections counts, and how many bytes of memory the headers
// of unauthenticated requests may use.
func (l *Listener) InUse() (connections int, headers int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count, l.headers
}

// Conn is one connection.
type Conn struct {
	*net.TCPConn

	Proxied bool                 // its RemoteAddr is from a PROXY header
	Begun   time.Time            // when it was accepted
	State   *tls.ConnectionState // of HTTP/2, for which net/http does not know it

	listener *Listener
	remote   net.Addr
	unread   []byte       // read by peek
	cost     atomic.Int64 // bytes of memory that a byte read now may cost
	http2    bool
	idle     *time.Timer // over HTTP/1.1
	known    atomic.Bool // a request was authenticated; else the caller is a stranger

	// Guarded by the listener's mu.
	count    int           // as how many it counts
	place    *list.Element // in waiting; nil while an authenticated request is being answered
	requests int           // authenticated and being answered
	memory   int64         // counted for its headers
	since    time.Time     // when memory was 0 last
	blocks   blocks        // over HTTP/2, what of it has not reached the handler
	peer     []*x509.Certificate
}

type contextKey struct{}

// ConnContext is for http.Server. It lets From find the connection.
func ConnContext(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, contextKey{}, unwrap(conn))
}

// From returns the connection of a request's context, one of no account if it came by another listener.
func From(ctx context.Context) *Conn {
	if c, _ := ctx.Value(contextKey{}).(*Conn); c != nil {
		return c
	}
	return &Conn{TCPConn: &net.TCPConn{}, listener: &Listener{}}
}

func unwrap(conn net.Conn) *Conn {
	switch conn := conn.(type) {
	case *Conn:
		return conn
	case *framed:
		return conn.conn
	case *tls.Conn:
		return unwrap(conn.NetConn())
	}
	return nil
}

// RemoteAddr returns the caller's address, from the PROXY header if there was one.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// HeadersRead must be called when a request's headers are complete, with how much memory they use. It returns false if
// that is too much: the request must end.
func (c *Conn) HeadersRead(memory int64) bool {
	if c.http2 {
		return c.countHeaders(memory+streamCost, (*blocks).done)
	}
	c.cost.Store(0) // they were counted while they were read
	return true
}

// Authenticated must be called when a request's credential is accepted: until Answered, the connection is not evicted.
// headers is what HeadersRead was told.
func (c *Conn) Authenticated(headers int64) {
	c.locked(func() {
		bodies := c.unhandled()
		c.known.Store(true)
		c.releaseHeaders(bodies - c.unhandled() + headers + streamCost)
		c.requests++
		c.setWaiting(false)
	})
}

// Answered must be called when a handler has returned. The last bytes of the answer may still be in transit.
func (c *Conn) Answered(headers int64, authenticated bool) {
	c.locked(func() {
		if authenticated {
			c.requests--
		} else {
			c.releaseHeaders(headers + streamCost)
		}
		if authenticated && c.requests == 0 {
			c.setWaiting(true)
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
	if n > 0 && c.idle != nil && c.idle.Stop() { // a request begins: its headers have their time, as in net/http
		c.idle.Reset(c.listener.config.HelloTimeout)
	}
	if cost := c.cost.Load(); cost > 0 && n > 0 && !c.countHeaders(int64(n)*cost, func(*blocks) {}) {
		return 0, errTooMuch
	}
	return n, err
}

var errTooMuch = errors.New("the headers of all requests use too much memory")

// countHeaders counts more bytes of memory, and what change changes of blocks. It returns false if the connection is
// closed.
func (c *Conn) countHeaders(more int64, change func(*blocks)) bool {
	c.listener.mu.Lock()
	defer c.listener.mu.Unlock()
	more -= c.unhandled()
	change(&c.blocks)
	more += c.unhandled()
	if more <= 0 {
		c.releaseHeaders(-more)
		return c.listener.open.Has(c)
	}
	return c.listener.charge(c, more)
}

// Abort closes the connection, also during a write that waits.
func (c *Conn) Abort() {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// Close closes the connection and removes it from the counts.
func (c *Conn) Close() error {
	c.locked(c.forget)
	return c.TCPConn.Close()
}

// locked calls change while the listener's mu is held.
func (c *Conn) locked(change func()) {
	c.listener.mu.Lock()
	defer c.listener.mu.Unlock()
	change()
}

// The listener's mu is held during what follows.

// charge counts memory for headers that were read. Beyond the limit it closes connections: of known callers, who may
// use half of it, the one that uses most, and of strangers the one that has used most for longest. Callers who are
// slow, or send without end, must not keep out those who send whole headers at once. It returns false if c was closed.
func (l *Listener) charge(c *Conn, memory int64) bool {
	if !l.open.Has(c) {
		return false
	}
	now := time.Now()
	if c.memory == 0 {
		c.since = now
	}
	c.memory += memory
	l.headers += memory
	for l.headers > l.config.HeaderMemory {
		var known, stranger *Conn
		var used, longest int64
		for other := range l.open {
			if other.known.Load() {
				used += other.memory
				if known == nil || other.memory > known.memory {
					known = other
				}
			} else if other.memory > 0 {
				held := now.Sub(other.since).Microseconds() * other.memory
				if stranger == nil || held > longest {
					stranger, longest = other, held
				}
			}
		}
		if used > l.config.HeaderMemory/2 {
			known.evict(HeaderMemory)
		} else {
			stranger.evict(HeaderMemory)
		}
	}
	return l.open.Has(c)
}

// evict closes the connection, so that net/http's next read or write fails, and drops what the kernel has buffered for
// a caller who does not read.
func (c *Conn) evict(reason string) {
	c.forget()
	c.listener.config.Closed(reason, c.remote, nil)
	_ = c.SetLinger(0)
	_ = c.TCPConn.Close()
}

// forget removes the connection from the counts.
func (c *Conn) forget() {
	c.listener.open.Delete(c)
	c.listener.count -= c.count
	c.count = 0
	c.releaseHeaders(c.memory)
	c.setWaiting(false)
}

// setWaiting makes an open connection the last of those that may be evicted, or removes it from them.
func (c *Conn) setWaiting(waiting bool) {
	if c.place != nil {
		c.listener.waiting.Remove(c.place)
		c.place = nil
	}
	if waiting && c.listener.open.Has(c) {
		c.place = c.listener.waiting.PushBack(c)
	}
}

// releaseHeaders stops counting memory of headers: over HTTP/1.1 all that was counted for the connection's only
// request.
func (c *Conn) releaseHeaders(memory int64) {
	if memory = min(memory, c.memory); !c.http2 {
		memory = c.memory
	}
	c.listener.headers -= memory
	c.memory -= memory
}
