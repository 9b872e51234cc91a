package inbound

import (
	"bufio"
	"container/list"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/sets"
)

// world is a server behind a Listener.
type world struct {
	*Listener

	addr    string
	entered chan *Conn    // of each request for /hold
	release chan struct{} // lets these go

	mu     sync.Mutex
	closed map[string]int // by reason
}

func start(t *testing.T, config Config) *world {
	t.Helper()
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{addr: socket.Addr().String(), entered: make(chan *Conn, 10), release: make(chan struct{}),
		closed: map[string]int{}}
	config.Closed = func(reason string, _ net.Addr, _ error) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.closed[reason]++
	}
	if config.HelloTimeout == 0 {
		config.HelloTimeout = time.Minute
	}
	w.Listener = New(socket.(*net.TCPListener), config)
	server := &http.Server{
		MaxHeaderBytes: 1 << 20, ConnContext: ConnContext, ConnState: w.ConnState, ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			c := From(r.Context())
			c.HeadersRead(0)
			defer c.Answered(0, true)
			if r.URL.Path == "/hold" {
				c.Authenticated(0)
				w.entered <- c
				<-w.release
			}
			scheme := "plain"
			if r.TLS != nil {
				scheme = "tls"
			}
			_, _ = io.WriteString(rw, scheme+" "+r.RemoteAddr)
		}),
	}
	go func() { _ = server.Serve(w) }()
	t.Cleanup(func() { _ = server.Close() })
	return w
}

// busy reports whether a connection is not idle.
func (w *world) busy() bool {
	w.Listener.mu.Lock()
	defer w.Listener.mu.Unlock()
	for e := w.waiting.Front(); e != nil; e = e.Next() {
		if e.Value.(*Conn).cost.Load() != headerCost {
			return true
		}
	}
	return false
}

// count returns how many connections were closed for a reason.
func (w *world) count(reason string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.closed[reason]
}

func (w *world) dial(t *testing.T, first string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(conn, first); err != nil {
		t.Fatal(err)
	}
	return conn
}

const get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"

// answer reads one answer's body.
func answer(conn net.Conn) (string, error) {
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return "", err
	}
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

// isClosed reports whether the other end has closed a connection, and is not merely silent.
func isClosed(conn net.Conn) bool {
	_, err := conn.Read(make([]byte, 1))
	return err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

func TestOldestIdleConnectionIsEvicted(t *testing.T) {
	w := start(t, Config{Connections: 3, HeaderMemory: 1 << 20})
	var conns []net.Conn
	for range 4 {
		conn := w.dial(t, get)
		if _, err := answer(conn); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
		for w.busy() { // until the server has seen that the answer is complete
			runtime.Gosched()
		}
	}
	if !isClosed(conns[0]) || w.count(Evicted) != 1 {
		t.Errorf("the oldest is open; closed: %v", w.closed)
	}
	for _, conn := range conns[1:] {
		if _, err := io.WriteString(conn, get); err != nil {
			t.Error(err)
		}
		if _, err := answer(conn); err != nil {
			t.Error(err)
		}
	}
}

func TestConnectionsOfAuthenticatedRequestsAreNotEvicted(t *testing.T) {
	w := start(t, Config{Connections: 2, HeaderMemory: 1 << 20})
	hold := strings.Replace(get, "/", "/hold", 1)
	held := []net.Conn{w.dial(t, hold), w.dial(t, hold)}
	for range held {
		<-w.entered
	}
	if late, err := net.Dial("tcp", w.addr); err == nil && !isClosed(late) || w.count(TooMany) != 1 {
		t.Errorf("a third connection is open (%v); closed: %v", err, w.closed)
	}
	close(w.release)
	for _, conn := range held {
		if _, err := answer(conn); err != nil {
			t.Error(err)
		}
	}
	// After the answers they are idle, and can be evicted.
	if _, err := answer(w.dial(t, get)); err != nil {
		t.Error(err)
	}
}

func TestAbortEndsARequest(t *testing.T) {
	w := start(t, Config{Connections: 2, HeaderMemory: 1 << 20})
	conn := w.dial(t, strings.Replace(get, "/", "/hold", 1))
	c := <-w.entered
	c.Abort()
	c.Abort() // once more does no harm
	close(w.release)
	if !isClosed(conn) {
		t.Error("the connection is open")
	}
	if open, _ := w.InUse(); open != 0 {
		t.Errorf("%d connections count as open", open)
	}
}

// TestManyUnfinishedHeadersDoNotBlockOthers: however small they are, they do not block whole requests, even larger
// ones.
func TestManyUnfinishedHeadersDoNotBlockOthers(t *testing.T) {
	const memory = 200 << 10
	w := start(t, Config{Connections: 1000, HeaderMemory: memory})
	unfinished := "GET / HTTP/1.1\r\nHost: a\r\nA: " + strings.Repeat("b", 70)
	fit := memory / headerCost / len(unfinished)
	for range 2 * fit {
		w.dial(t, unfinished)
	}
	for w.count(HeaderMemory) < fit { // until all were read
		runtime.Gosched()
	}
	for range 20 {
		request := strings.Replace(get, "\r\n\r\n", "\r\nA: "+strings.Repeat("b", 2000)+"\r\n\r\n", 1)
		if body, err := answer(w.dial(t, request)); err != nil {
			t.Fatalf("a whole request is refused: %q, %v", body, err)
		}
	}
}

// TestLargeUnfinishedHeadersDoNotBlockOthers: nor use more than the memory for headers.
func TestLargeUnfinishedHeadersDoNotBlockOthers(t *testing.T) {
	const memory = 100 << 10
	w := start(t, Config{Connections: 1000, HeaderMemory: memory})
	var floods []net.Conn
	for range 4 { // of which two fit
		floods = append(floods, w.dial(t, "GET / HTTP/1.1\r\n"+strings.Repeat("a:b\r\n", 400)))
	}
	for range 50 {
		if body, err := answer(w.dial(t, get)); err != nil {
			t.Fatalf("a small request is refused: %q, %v", body, err)
		}
	}
	if _, headers := w.InUse(); headers > memory {
		t.Errorf("headers take %d bytes", headers)
	}
	if w.count(HeaderMemory) == 0 {
		t.Error("no flood was closed")
	}
	for _, conn := range floods {
		_ = conn.Close()
	}
	for headers := int64(1); headers > 0; { // until the server has seen it
		_, headers = w.InUse()
		runtime.Gosched()
	}
	whole := strings.Replace(get, "\r\n\r\n", "\r\n"+strings.Repeat("a:b\r\n", 900)+"\r\n", 1)
	if body, err := answer(w.dial(t, whole)); err != nil {
		t.Errorf("large headers alone: %q, %v", body, err)
	}
	if !isClosed(w.dial(t, strings.Replace(get, "\r\n\r\n", "\r\n"+strings.Repeat("a:b\r\n", 2000), 1))) {
		t.Error("headers larger than all memory are read on")
	}
}

// TestHeadersBesideAuthenticatedRequestsDoNotBlockOthers: a connection of HTTP/2 may send headers without end beside a
// watch. Those that use least of the memory stay.
func TestHeadersBesideAuthenticatedRequestsDoNotBlockOthers(t *testing.T) {
	const memory = 400 << 10
	w := start(t, Config{Connections: 1000, HeaderMemory: memory})
	hold := func(unfinished int64) *Conn {
		w.dial(t, strings.Replace(get, "/", "/hold", 1))
		c := <-w.entered
		c.countHeaders(unfinished, func(*blocks) {})
		return c
	}
	small := hold(memory / 100)
	large := strings.Replace(get, "\r\n\r\n", "\r\nA: "+strings.Repeat("b", 2000)+"\r\n\r\n", 1)
	for range 40 {
		hold(memory / 20)
		if body, err := answer(w.dial(t, large)); err != nil {
			t.Fatalf("a whole request is refused: %q, %v", body, err)
		}
	}
	if !small.countHeaders(0, func(*blocks) {}) {
		t.Error("the smallest was closed")
	}
	close(w.release)
}

// TestLargeOldHeadersAreClosedFirst: a caller who is slow to shake hands is older than those who came since, but uses
// less.
func TestLargeOldHeadersAreClosedFirst(t *testing.T) {
	w := start(t, Config{Connections: 1000, HeaderMemory: 1 << 20})
	begin := func(memory int64, age time.Duration) *Conn {
		w.dial(t, "")
		var c *Conn
		for c == nil { // until it is accepted
			w.Listener.mu.Lock()
			for other := range w.open {
				if other.memory == 0 {
					c = other
				}
			}
			w.Listener.mu.Unlock()
		}
		c.countHeaders(memory, func(*blocks) {})
		c.locked(func() { c.since = time.Now().Add(-age) })
		return c
	}
	slow, large := begin(4<<10, time.Second), begin(1000<<10, 500*time.Millisecond)
	begin(100<<10, 0)
	w.Listener.mu.Lock()
	defer w.Listener.mu.Unlock()
	if !w.open.Has(slow) || w.open.Has(large) {
		t.Errorf("open: the slow %v, the large %v", w.open.Has(slow), w.open.Has(large))
	}
}

// TestOnlyAuthenticatedRequestsKeepAConnection: others do not make it younger than one that has had them.
func TestOnlyAuthenticatedRequestsKeepAConnection(t *testing.T) {
	w := start(t, Config{Connections: 3, HeaderMemory: 1 << 20})
	stranger := w.dial(t, "")
	for open := 0; open < 1; open, _ = w.InUse() { // until it is accepted
		runtime.Gosched()
	}
	hold := w.dial(t, strings.Replace(get, "/", "/hold", 1))
	<-w.entered
	close(w.release)
	if _, err := answer(hold); err != nil {
		t.Fatal(err)
	}
	w.Listener.mu.Lock()
	for c := range w.open {
		if !c.known.Load() {
			go c.Answered(0, false)
		}
	}
	w.Listener.mu.Unlock()
	w.dial(t, "")
	w.dial(t, "")
	if !isClosed(stranger) || w.count(Evicted) != 1 {
		t.Errorf("the stranger is open; closed: %v", w.closed)
	}
}

// TestHandlersOfResetStreamsCountOnce: a stream that the caller resets at once is closed, and the connection perhaps
// idle, before its handler begins. Requests that come meanwhile stay counted.
func TestHandlersOfResetStreamsCountOnce(t *testing.T) {
	l := &Listener{config: Config{Connections: 10, HeaderMemory: 64 << 20}, open: sets.New[*Conn](), waiting: list.New()}
	c := &Conn{listener: l, http2: true}
	l.open.Insert(c)
	l.admit(c, 1)
	f := &framed{conn: c, in: frames{head: [9]byte{3: headersFrame, 4: endHeaders}}, began: true}
	for range 15 {
		f.count(100, true)
	}
	l.ConnState(f, http.StateIdle)
	for range 14 { // that net/http answers itself
		f.block = 0
		f.count(1000, true)
	}
	_, want := l.InUse()
	for range 15 { // whose streams were reset
		c.HeadersRead(0)
	}
	for range 15 {
		c.Answered(0, false)
	}
	if _, headers := l.InUse(); headers < want*9/10 || want < 14*1000*firstCost {
		t.Errorf("%d bytes are counted, and %d before", headers, want)
	}
}

func TestHeaderMemoryIsReturned(t *testing.T) {
	w := start(t, Config{Connections: 10, HeaderMemory: 1 << 20})
	conn := w.dial(t, "")
	for range 100 { // together more than the memory
		if _, err := io.WriteString(conn, strings.Replace(get, "\r\n\r\n", "\r\nA: "+strings.Repeat("b", 2000)+"\r\n\r\n",
			1)); err != nil {
			t.Fatal(err)
		}
		if _, err := answer(conn); err != nil {
			t.Fatal(err)
		}
	}
}

// proxyHeader returns a PROXY header of version 2.
func proxyHeader(command, family byte, addresses []byte) string {
	length := binary.BigEndian.AppendUint16(nil, uint16(len(addresses)))
	return signature + string([]byte{command, family}) + string(length) + string(addresses)
}

func TestPROXYHeaderSetsTheCaller(t *testing.T) {
	servers := httptest.NewUnstartedServer(nil)
	servers.StartTLS()
	servers.Close()
	config := &tls.Config{Certificates: servers.TLS.Certificates, MinVersion: tls.VersionTLS12}
	w := start(t, Config{Connections: 100, HeaderMemory: 1 << 20, TLS: config})
	v4 := []byte{192, 0, 2, 7, 192, 0, 2, 8, 0x12, 0x67, 0x01, 0xbb}
	v6 := append(append(net.ParseIP("2001:db8::7"), net.ParseIP("2001:db8::8")...), 0x12, 0x67, 0x01, 0xbb)
	for name, test := range map[string]struct{ header, want string }{
		"none":                   {"", "127.0.0.1:"},
		"IPv4":                   {proxyHeader(0x21, 0x11, v4), "192.0.2.7:4711"},
		"IPv4 and more fields":   {proxyHeader(0x21, 0x11, append(v4, 0x20, 0, 1, 0)), "192.0.2.7:4711"},
		"IPv6":                   {proxyHeader(0x21, 0x21, v6), "[2001:db8::7]:4711"},
		"local":                  {proxyHeader(0x20, 0, nil), "127.0.0.1:"},
		"Unix":                   {proxyHeader(0x21, 0x31, make([]byte, 216)), ""},
		"version 1":              {"PROXY TCP4 192.0.2.7 192.0.2.8 4711 443\r\n", ""},
		"version 3":              {proxyHeader(0x31, 0x11, v4), ""},
		"too short":              {proxyHeader(0x21, 0x11, v4[:8]), ""},
		"too long":               {proxyHeader(0x21, 0x11, make([]byte, 513)), ""},
		"another signature":      {"\r\n\r\n\x00\r\nQUIT\r" + proxyHeader(0x21, 0x11, v4)[12:], ""},
		"two of them":            {proxyHeader(0x21, 0x11, v4) + proxyHeader(0x21, 0x11, v4), ""},
		"an empty line in front": {"\r\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			if body, _ := answer(w.dial(t, test.header+get)); test.want == "" && strings.HasPrefix(body, "plain") ||
				test.want != "" && !strings.HasPrefix(body, "plain "+test.want) {
				t.Errorf("plain: answered %q, want %q", body, test.want)
			}
			conn := tls.Client(w.dial(t, test.header), &tls.Config{InsecureSkipVerify: true})
			_, err := io.WriteString(conn, get)
			body := ""
			if err == nil {
				body, _ = answer(conn)
			}
			if test.want == "" && body != "" || test.want != "" && !strings.HasPrefix(body, "tls "+test.want) {
				t.Errorf("TLS: answered %q, %v, want %q", body, err, test.want)
			}
		})
	}
}

// TestIncompleteHelloTimesOut: whatever part of it was sent.
func TestIncompleteHelloTimesOut(t *testing.T) {
	w := start(t, Config{Connections: 10, HeaderMemory: 1 << 20, HelloTimeout: 50 * time.Millisecond,
		TLS: &tls.Config{MinVersion: tls.VersionTLS12}})
	for _, said := range []string{"", signature[:5], signature, "\x16", "\x16\x03\x01\x02\x00"} {
		if !isClosed(w.dial(t, said)) {
			t.Errorf("%q: the connection is open", said)
		}
	}
	if n := w.count(Invalid); n != 5 {
		t.Errorf("%d connections count as invalid", n)
	}
}

func TestConnOfNoListenerDoesNothing(t *testing.T) {
	c := From(context.Background())
	c.HeadersRead(0)
	c.Authenticated(0)
	c.Answered(0, true)
	c.Abort()
	if c.Proxied {
		t.Error("no connection has a PROXY header")
	}
}

// TestNothingIsCountedOnceAllConnectionsAreClosed: in whatever order requests come, are evicted and end.
func TestNothingIsCountedOnceAllConnectionsAreClosed(t *testing.T) {
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = socket.Close() })
	go func() {
		for conn, err := socket.Accept(); err == nil; conn, err = socket.Accept() {
			_ = conn.Close()
		}
	}()
	for seed := range uint64(50) {
		random := rand.New(rand.NewPCG(seed, 0))
		l := &Listener{config: Config{Connections: 8, HeaderMemory: 1 << 20, Closed: func(string, net.Addr, error) {}},
			open: sets.New[*Conn](), waiting: list.New()}
		var conns []*Conn
		var ends []func()
		for range 300 {
			switch n := random.IntN(10); {
			case n == 0 || len(conns) == 0:
				dialed, err := net.Dial("tcp", socket.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				c := &Conn{TCPConn: dialed.(*net.TCPConn), listener: l, http2: random.IntN(2) == 0}
				conns = append(conns, c)
				l.open.Insert(c)
				l.admit(c, 1+random.IntN(2))
			case n == 1:
				_ = conns[random.IntN(len(conns))].Close()
			case n < 6:
				c, headers, authenticated := conns[random.IntN(len(conns))], random.Int64N(200<<10), random.IntN(2) == 0
				if c.http2 {
					f := &framed{conn: c, in: frames{head: [9]byte{3: headersFrame, 4: endHeaders}}, began: true}
					f.count(random.IntN(16<<10), true)
				} else {
					c.countHeaders(headers, func(*blocks) {})
				}
				if random.IntN(4) == 0 {
					break // it does not reach the handler
				}
				if c.HeadersRead(headers) && authenticated {
					c.Authenticated(headers)
				}
				ends = append(ends, func() { c.Answered(headers, authenticated) })
			case len(ends) > 0:
				i := random.IntN(len(ends))
				ends[i]()
				ends = slices.Delete(ends, i, i+1)
			}
			if l.count < 0 || l.count > 8 || l.headers < 0 || l.headers > 1<<20 {
				t.Fatalf("seed %d: %d connections and %d bytes are counted", seed, l.count, l.headers)
			}
		}
		for _, c := range conns {
			_ = c.Close()
		}
		for _, end := range ends {
			end()
		}
		if l.count != 0 || l.headers != 0 || l.waiting.Len() != 0 || l.open.Len() != 0 {
			t.Fatalf("seed %d: %d connections, %d bytes, %d waiting, %d open", seed, l.count, l.headers, l.waiting.Len(),
				l.open.Len())
		}
	}
}

// TestHeadersThatStraddleTheIdleTimeoutAreRead: a request whose first bytes came in time would be lost, for its caller
// takes the connection for a good one.
func TestHeadersThatStraddleTheIdleTimeoutAreRead(t *testing.T) {
	for _, headersIn := range []time.Duration{time.Hour, 10 * time.Millisecond} {
		socket, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l := New(socket.(*net.TCPListener), Config{Connections: 1, HeaderMemory: 1 << 20, HelloTimeout: headersIn})
		caller, err := net.Dial("tcp", socket.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		l.ConnState(conn, http.StateIdle)
		const left = 200 * time.Millisecond // of the idle timeout
		conn.(*Conn).idle.Reset(left)
		end := time.Now().Add(2 * left)
		if _, err := io.WriteString(caller, "GET "); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(end)
		_, err = conn.Read(make([]byte, 4))
		if open := errors.Is(err, os.ErrDeadlineExceeded); open != (headersIn == time.Hour) {
			t.Errorf("where headers may take %s: %v", headersIn, err)
		}
		l.ConnState(conn, http.StateActive)
		if conn.(*Conn).idle.Stop() {
			t.Error("a request that is being answered can still be cut as idle")
		}
		_, _, _ = conn.Close(), caller.Close(), socket.Close()
	}
}
