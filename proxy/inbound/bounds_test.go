package inbound

import (
	"container/list"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apimachinery/pkg/util/sets"
)

// bare returns a listener that accepts nothing, and why it closes connections.
func bare(config Config) (l *Listener, closed *[]string) {
	closed = &[]string{}
	config.Closed = func(reason string, _ net.Addr, _ error) { *closed = append(*closed, reason) }
	return &Listener{config: config, open: sets.New[*Conn](), waiting: list.New()}, closed
}

// opened returns an open connection of l, to nowhere.
func opened(l *Listener) *Conn {
	c := &Conn{TCPConn: &net.TCPConn{}, listener: l}
	l.open.Insert(c)
	l.admit(c, 1)
	return c
}

func (c *Conn) isOpen() (open bool) {
	c.locked(func() { open = c.listener.open.Has(c) })
	return open
}

// TestIdleConnectionsStayForTwoMinutes: twice as long as frps keeps them.
func TestIdleConnectionsStayForTwoMinutes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _ := bare(Config{Connections: 10, HeaderMemory: 1 << 20})
		idle, used := opened(l), opened(l)
		for _, c := range []*Conn{idle, used} {
			l.ConnState(c, http.StateIdle)
		}
		time.Sleep(119 * time.Second)
		l.ConnState(used, http.StateActive)
		if synctest.Wait(); !idle.isOpen() || !used.isOpen() {
			t.Error("closed before two minutes")
		}
		time.Sleep(2 * time.Second)
		if synctest.Wait(); idle.isOpen() || !used.isOpen() {
			t.Errorf("after two minutes, the idle one is open: %v, the other: %v", idle.isOpen(), used.isOpen())
		}
	})
}

// TestUnfinishedHeadersCountTwentyfold: as measured with short ones.
func TestUnfinishedHeadersCountTwentyfold(t *testing.T) {
	w := start(t, Config{Connections: 10, HeaderMemory: 1 << 20})
	part := get[:len(get)-2] + strings.Repeat("A:b\r\n", 200)
	w.dial(t, part)
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, headers := w.InUse(); headers == 20*int64(len(part)) {
			break
		} else if time.Now().After(end) {
			t.Fatalf("%d bytes are counted for %d", headers, len(part))
		}
	}
}

// TestConnectionsOfHTTP2CountTwice: and their requests 16 KiB each until they are authenticated.
func TestConnectionsOfHTTP2CountTwice(t *testing.T) {
	servers := httptest.NewUnstartedServer(nil)
	servers.StartTLS()
	servers.Close()
	w := start(t, Config{Connections: 10, HeaderMemory: 1 << 20, TLS: &tls.Config{
		Certificates: servers.TLS.Certificates, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12,
	}})
	conn := tls.Client(w.dial(t, ""), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if n, _ := w.InUse(); n == 2 {
			break
		} else if time.Now().After(end) {
			t.Fatalf("%d connections are counted", n)
		}
	}
	l, _ := bare(Config{Connections: 10, HeaderMemory: 1 << 20})
	c := opened(l)
	c.http2 = true
	c.HeadersRead(100)
	if _, headers := l.InUse(); headers != 100+16<<10 {
		t.Errorf("%d bytes are counted for a request of 100", headers)
	}
	c.Authenticated(100)
	if _, headers := l.InUse(); headers != 0 {
		t.Errorf("%d bytes are counted for an authenticated request", headers)
	}
}

// TestPROXYHeaderHas512BytesAtMost: addresses, ports and further fields.
func TestPROXYHeaderHas512BytesAtMost(t *testing.T) {
	w := start(t, Config{Connections: 10, HeaderMemory: 1 << 20, TLS: &tls.Config{MinVersion: tls.VersionTLS12}})
	for size, accepted := range map[int]bool{512: true, 513: false} {
		addresses := make([]byte, size)
		copy(addresses, []byte{192, 0, 2, 7, 192, 0, 2, 8, 0x12, 0x67, 0x01, 0xbb})
		got, _ := answer(w.dial(t, proxyHeader(0x21, 0x11, addresses)+get))
		if (got == "plain 192.0.2.7:4711") != accepted {
			t.Errorf("%d bytes: answered %q", size, got)
		}
	}
	if n := w.count(Invalid); n != 1 {
		t.Errorf("%d connections count as invalid", n)
	}
}

// TestHTTP2InClearIsRefused: nobody would count its frames.
func TestHTTP2InClearIsRefused(t *testing.T) {
	w := start(t, Config{Connections: 10, HeaderMemory: 1 << 20, TLS: &tls.Config{MinVersion: tls.VersionTLS12}})
	conn := w.dial(t, preface)
	if got, err := io.ReadAll(conn); len(got) > 0 || w.count(Invalid) != 1 {
		t.Errorf("answered %q, %v", got, err)
	}
}

// TestOneOfTwoRequestsKeepsTheConnection: it is not evicted before both are answered.
func TestOneOfTwoRequestsKeepsTheConnection(t *testing.T) {
	l, _ := bare(Config{Connections: 1, HeaderMemory: 1 << 20})
	c := opened(l)
	for range 2 {
		c.HeadersRead(0)
		c.Authenticated(0)
	}
	if c.Answered(0, true); l.waiting.Len() != 0 {
		t.Error("it may be evicted while a request is being answered")
	}
	if c.Answered(0, true); l.waiting.Len() != 1 {
		t.Error("it may not be evicted after the last answer")
	}
	if _ = c.Close(); l.count != 0 || l.waiting.Len() != 0 {
		t.Errorf("%d connections are counted after it has closed", l.count)
	}
}

// TestStrangersDoNotKeepOutKnownCallers: beyond the limit, those lose their connections who use most of it, strangers
// before callers who use less than half.
func TestStrangersDoNotKeepOutKnownCallers(t *testing.T) {
	l, closed := bare(Config{Connections: 10, HeaderMemory: 1000})
	known, large, small, late := opened(l), opened(l), opened(l), opened(l)
	known.known.Store(true)
	l.charge(known, 400)
	l.charge(large, 400)
	large.since = time.Now().Add(-time.Second)
	l.charge(small, 100)
	small.since = time.Now().Add(-time.Second)
	if !l.charge(late, 200) || !l.open.Has(known) || l.open.Has(large) || !l.open.Has(small) || len(*closed) != 1 {
		t.Errorf("closed %v; open are: known %v, large %v, small %v", *closed, l.open.Has(known), l.open.Has(large),
			l.open.Has(small))
	}
	greedy := opened(l)
	greedy.known.Store(true)
	if l.charge(greedy, 600) || !l.open.Has(known) || l.headers != 700 {
		t.Errorf("a known caller keeps more than half: %d bytes in use", l.headers)
	}
}

// TestStrangersAreNotWaitedFor: for longer than two seconds, while a known caller may take any time to read.
func TestStrangersAreNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, known := range []bool{false, true} {
			l, _ := bare(Config{Connections: 10, HeaderMemory: 1 << 20})
			here, there := net.Pipe()
			f := &framed{Conn: here, conn: opened(l)}
			f.conn.known.Store(known)
			begin := time.Now()
			reading := time.AfterFunc(time.Minute, func() { _, _ = there.Read(make([]byte, 9)) })
			_, err := f.Write(make([]byte, 9))
			want := map[bool]time.Duration{true: time.Minute, false: 2 * time.Second}[known]
			if took := time.Since(begin); (err == nil) != known || took != want {
				t.Errorf("known %v: written after %s, %v", known, took, err)
			}
			if f.conn.isOpen() != known {
				t.Errorf("known %v: the connection is open: %v", known, f.conn.isOpen())
			}
			reading.Stop()
			_, _ = here.Close(), there.Close()
		}
	})
}

// TestFramesAreNotReadWhileAWriteWaits: beyond 100, of which net/http queues the answers.
func TestFramesAreNotReadWhileAWriteWaits(t *testing.T) {
	l, _ := bare(Config{Connections: 10, HeaderMemory: 1 << 20})
	here, there := net.Pipe()
	f := &framed{Conn: here, conn: opened(l)}
	f.conn.known.Store(true) // waits for as long as it takes
	var ended sync.WaitGroup
	ended.Go(func() { _, _ = f.Write(make([]byte, 9)) })
	for f.writing.TryLock() { // until the write waits
		f.writing.Unlock()
		runtime.Gosched()
	}
	ended.Go(func() {
		for buffer := make([]byte, 17); ; {
			if _, err := f.Read(buffer); err != nil {
				return
			}
		}
	})
	ping := make([]byte, 17)
	ping[2], ping[3] = 8, 6 // the payload's length, and the kind
	n := 0
	for ; n < 1000; n++ {
		_ = there.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := there.Write(ping); err != nil {
			break
		}
	}
	if n < 100 || n > 102 {
		t.Errorf("%d frames were read", n)
	}
	_, _ = here.Close(), there.Close()
	ended.Wait()
}
