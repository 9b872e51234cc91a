// Package attack holds clients and runners that try to exhaust the agent's memory, and an honest caller that measures
// the effect on others.
package attack

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Target is a server and the way to reach it.
type Target struct {
	Addr      string      // IP:port to dial
	From      string      // IP to dial from, by which the server distinguishes callers; empty: the kernel chooses
	Namespace string      // file of the network namespace to dial in; empty: this process's
	TLS       *tls.Config // nil: plain HTTP
	Host      string      // of the URL
	Prefix    string      // of the paths of the Kubernetes API
	Token     string      // of the agent; empty: anonymous
}

// URL returns the URL of a path on the target.
func (t Target) URL(path string) string {
	scheme := "http://"
	if t.TLS != nil {
		scheme = "https://"
	}
	return scheme + cmp.Or(t.Host, t.Addr) + path
}

// Transport returns an HTTP/1.1 transport that connects to the target, whatever host a URL names.
func (t Target) Transport(keepAlive bool) *http.Transport {
	return &http.Transport{
		DialContext:     func(ctx context.Context, _, _ string) (net.Conn, error) { return t.dial(ctx, 0) },
		TLSClientConfig: t.TLS, DisableKeepAlives: !keepAlive, DisableCompression: true, MaxIdleConnsPerHost: 100,
		ResponseHeaderTimeout: time.Minute,
	}
}

// dial opens a TCP connection. The receive buffer is the kernel's default if receiveBuffer is 0.
func (t Target) dial(ctx context.Context, receiveBuffer int) (conn net.Conn, err error) {
	dialer := net.Dialer{Timeout: 10 * time.Second, KeepAlive: -1}
	if t.From != "" {
		dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(t.From)}
	}
	dialer.Control = func(_, _ string, raw syscall.RawConn) (err error) {
		// The kernel chooses the port when it knows the destination, so that one local port serves several.
		control := func(fd uintptr) {
			if t.From != "" {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
			}
			if err == nil && receiveBuffer > 0 {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
			}
		}
		return errors.Join(raw.Control(control), err)
	}
	if t.Namespace == "" {
		return dialer.DialContext(ctx, "tcp", t.Addr)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		var namespace *os.File
		if namespace, err = os.Open(t.Namespace); err != nil {
			return
		}
		defer func() { _ = namespace.Close() }()
		if err = unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET); err == nil {
			conn, err = dialer.DialContext(ctx, "tcp", t.Addr)
		}
	}()
	<-done
	return conn, err
}

// Attack is one attempt of one attacker. It returns when the server has answered or closed the connection, or when
// ctx ends. It returns true to make another attempt at once.
type Attack func(ctx context.Context, c *Counts) (again bool)

// Run has n attackers repeat an attack until ctx ends. They begin evenly at rate attempts per second. After each
// attempt an attacker pauses long enough that all n together stay below that rate, and for at least a second, because
// an attack on memory must not become a benchmark of the CPU.
func Run(ctx context.Context, n int, rate float64, attack Attack) *Counts {
	c := &Counts{attackers: n, answers: map[int]int{}}
	var attackers sync.WaitGroup
	for i := range n {
		attackers.Go(func() {
			wait := seconds(float64(i) / rate)
			for {
				select {
				case <-time.After(wait):
				case <-ctx.Done():
					return
				}
				for attack(ctx, c) && ctx.Err() == nil {
					continue
				}
				wait = max(time.Second, seconds(float64(n)/rate))
			}
		})
	}
	attackers.Wait()
	return c
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// Counts counts the outcomes of an attack's attempts. Safe for concurrent use.
type Counts struct {
	attackers int

	mu                               sync.Mutex
	opened, refused, cut, open, most int
	answers                          map[int]int // by status code
	broken                           error
}

// Broken returns the first error by which this machine, and not the server, stopped an attacker.
func (c *Counts) Broken() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken
}

func (c *Counts) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := fmt.Sprintf("%d attackers, at most %d at once: %d connections opened, %d refused, %d cut",
		c.attackers, c.most, c.opened, c.refused, c.cut)
	for _, code := range slices.Sorted(maps.Keys(c.answers)) {
		text += fmt.Sprintf(", %d × %d", c.answers[code], code)
	}
	if c.broken != nil {
		text += "; stopped by this machine: " + c.broken.Error()
	}
	return text
}

func (c *Counts) add(to *int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	*to++
}

func (c *Counts) answer(code int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answers[code]++
}

// connection is an attacker's connection. It is closed when the attacker's context ends.
type connection struct {
	net.Conn

	tcp   *net.TCPConn
	ctx   context.Context
	stop  func() bool
	count *Counts
}

// connect opens a connection, or counts a refusal and returns nil.
func (t Target) connect(ctx context.Context, c *Counts, receiveBuffer int) *connection {
	conn, err := t.dial(ctx, receiveBuffer)
	if err != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		if ctx.Err() == nil {
			c.refused++
			if c.broken == nil && (errors.Is(err, unix.EMFILE) || errors.Is(err, unix.EADDRNOTAVAIL)) {
				c.broken = err
			}
		}
		return nil
	}
	made := &connection{Conn: conn, tcp: conn.(*net.TCPConn), ctx: ctx, count: c}
	if t.TLS != nil {
		secure := tls.Client(conn, t.TLS)
		if err := secure.HandshakeContext(ctx); err != nil {
			_ = conn.Close()
			if ctx.Err() == nil {
				c.add(&c.refused)
			}
			return nil
		}
		made.Conn = secure
	}
	// Not the TLS connection's Close, which waits to send its alert.
	made.stop = context.AfterFunc(ctx, func() { _ = conn.Close() })
	c.mu.Lock()
	defer c.mu.Unlock()
	c.opened++
	c.open++
	c.most = max(c.most, c.open)
	return made
}

// end closes the connection. cut says that no answer came: unless ctx has ended, it counts as cut by the server.
func (c *connection) end(cut bool) {
	c.stop()
	_ = c.tcp.Close()
	c.count.mu.Lock()
	defer c.count.mu.Unlock()
	c.count.open--
	if cut && c.ctx.Err() == nil {
		c.count.cut++
	}
}

// established reports whether neither end has closed the connection, without reading from it.
func (c *connection) established() bool {
	raw, err := c.tcp.SyscallConn()
	if err != nil {
		return false
	}
	var info *unix.TCPInfo
	controlErr := raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	})
	if controlErr != nil || err != nil {
		return false
	}
	const tcpEstablished = 1 // Source: Linux, include/net/tcp_states.h.
	return info.State == tcpEstablished
}

// shortHeaders returns about size bytes of the shortest headers, each with a name of its own.
func shortHeaders(size int) []byte {
	var b strings.Builder
	for i := 0; b.Len() < size-16; i++ {
		fmt.Fprintf(&b, "a%d: b\r\n", i)
	}
	return []byte(b.String())
}
