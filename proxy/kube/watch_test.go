package kube

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/rest"
)

// watching is a watch through a proxy. The API server sends what is written to events.
type watching struct {
	proxy  *Proxy
	events chan string // closed: the API server ends the watch
	body   *bufio.Reader

	accepted string // the encodings that the API server may use
}

func watch(t *testing.T, target, contentType string) *watching {
	t.Helper()
	w := &watching{events: make(chan string)}
	api := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.accepted = r.Header.Get("Accept-Encoding")
		rw.Header().Set("Content-Type", contentType)
		_ = http.NewResponseController(rw).Flush()
		for {
			select {
			case part, ok := <-w.events:
				if !ok {
					return
				}
				_, _ = io.WriteString(rw, part)
				_ = http.NewResponseController(rw).Flush()
			case <-r.Context().Done():
				return
			}
		}
	}))
	t.Cleanup(api.Close)
	w.proxy = proxyTo(t, &rest.Config{Host: api.URL})
	server := httptest.NewServer(w.proxy)
	t.Cleanup(server.Close)
	resp, err := http.Get(server.URL + Prefix + "/api/v1/" + target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = resp.Body.Close() })
	w.body = bufio.NewReader(resp.Body)
	return w
}

// sent sends a part and waits until the caller has read it.
func (w *watching) sent(t *testing.T, part string) {
	t.Helper()
	w.events <- part
	got := make([]byte, len(part))
	if _, err := io.ReadFull(w.body, got); err != nil || string(got) != part {
		t.Fatalf("got %q, %v, want %q", got, err, part)
	}
}

// ends expects that the caller reads rest and a clean end.
func (w *watching) ends(t *testing.T, rest string) {
	t.Helper()
	got, err := io.ReadAll(w.body)
	if err != nil || string(got) != rest {
		t.Errorf("the watch ended with %q, %v, want %q and a clean end", got, err, rest)
	}
}

func TestIdleWatchEndsAtOnce(t *testing.T) {
	for _, contentType := range []string{"application/json", "application/json;stream=watch",
		"application/vnd.kubernetes.protobuf;stream=watch"} {
		w := watch(t, "pods?watch=true", contentType)
		w.proxy.Drain() // before the first event
		w.ends(t, "")
		if w.accepted != "identity" { // not the caller's gzip
			t.Errorf("Kubernetes 1.37 compresses watches for those who accept %s: the end of an event is not seen", w.accepted)
		}
	}
	w := watch(t, "watch/pods", "application/json") // the old form
	w.proxy.Drain()
	w.ends(t, "")
	w = watch(t, "pods?watch=1", "application/json")
	w.sent(t, "{}\n")
	w.proxy.Drain()
	w.proxy.Drain() // twice is as good as once
	w.ends(t, "")
}

func TestWatchEndsAfterTheCurrentEvent(t *testing.T) {
	w := watch(t, "pods?watch", "application/json")
	w.sent(t, `{"type":"ADDED","object"`)
	w.proxy.Drain()
	w.events <- ":{}}\n"
	w.ends(t, ":{}}\n")
}

func TestWatchThatBeginsWhileDrainingEnds(t *testing.T) {
	w := watch(t, "pods?watch=true", "application/json")
	w.proxy.Drain()
	w.ends(t, "")
	late := &http.Response{
		Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader("{}\n")),
	}
	forwarded(w.proxy).endBetweenEvents(late)
	if got, err := io.ReadAll(late.Body); err != nil || len(got) != 0 {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestOnlyWatchesEndWithTheDrain(t *testing.T) {
	for query, contentType := range map[string]string{
		"pods?follow=true": "text/plain", "pods?watch=false": "application/json", "pods?watch=0": "application/json",
		"pods/p?watch=true": "application/json", "pods?watch=true": "application/cbor-seq",
	} {
		w := watch(t, query, contentType)
		w.sent(t, "first\n")
		w.proxy.Drain()
		w.sent(t, "second\n")
		close(w.events)
		w.ends(t, "")
	}
}

func TestClosedWatchesAreReleased(t *testing.T) {
	w := watch(t, "pods?watch=true", "application/json")
	resp := &http.Response{Header: http.Header{"Content-Type": {"application/json"}}, Body: http.NoBody}
	forwarded(w.proxy).endBetweenEvents(resp)
	if err := resp.Body.Close(); err != nil {
		t.Error(err)
	}
	if resp.Body.(*watchBody).forget() {
		t.Error("the watch is still tracked")
	}
}

func forwarded(p *Proxy) *forward { return &forward{Proxy: p, Request: &Request{}} }

// TestWatchWithoutARightEnds between two events: one in JSON with an event that says why.
func TestWatchWithoutARightEnds(t *testing.T) {
	for contentType, want := range map[string]string{
		"application/json": `{"object":{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure",` +
			`"message":"the agent has ended the request: because","reason":"Forbidden","code":403},"type":"ERROR"}` + "\n",
		"application/vnd.kubernetes.protobuf;stream=watch": "",
	} {
		body, events := io.Pipe()
		f := forwarded(proxyTo(t, &rest.Config{Host: "http://127.0.0.1"}))
		resp := &http.Response{Header: http.Header{"Content-Type": {contentType}}, Body: body}
		f.endBetweenEvents(resp)
		first, rest := "{", "}\n"
		if want == "" {
			first, rest = "\x00\x00\x00\x02a", "b"
		}
		go func() {
			_, _ = io.WriteString(events, first)
			// Until the reader knows that an event has begun.
			for between, w := true, f.watch.Load(); between; runtime.Gosched() {
				w.mu.Lock()
				between = w.between
				w.mu.Unlock()
			}
			if !f.EndWatch(&Ended{Why: "because", Code: http.StatusForbidden}) {
				t.Error("it is no watch")
			}
			_, _ = io.WriteString(events, rest)
		}()
		if got, err := io.ReadAll(resp.Body); err != nil || string(got) != first+rest+want {
			t.Errorf("%s: got %q, %v, want %q", contentType, got, err, first+rest+want)
		}
	}
	if forwarded(nil).EndWatch(&Ended{}) {
		t.Error("a request without a watch has ended one")
	}
}

func FuzzFramedEvents(f *testing.F) {
	f.Add([]byte("one"), []byte(""), uint8(1))
	f.Add([]byte("\x00\x00\x00\x05"), []byte("three"), uint8(3))
	f.Fuzz(func(t *testing.T, first, second []byte, size uint8) {
		frame := func(data []byte) []byte {
			return append(binary.BigEndian.AppendUint32(nil, uint32(len(data))), data...)
		}
		stream := append(frame(first), frame(second)...)
		ends := map[int]bool{4 + len(first): true, len(stream): true}
		events := &framedEvents{}
		for at := 0; at < len(stream); {
			next := min(at+max(1, int(size)), len(stream))
			if got := events.read(stream[at:next]); got != ends[next] {
				t.Fatalf("after %d of %d bytes: between events %v, want %v", next, len(stream), got, ends[next])
			}
			at = next
		}
	})
}

// TestWatchesShareConnections: as many as the API server allows on each. When they end, no goroutine is left.
func TestWatchesShareConnections(t *testing.T) {
	const watches, perConnection = 2000, 100
	var connections atomic.Int32
	api := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}))
	// connections that are closed before they are made
	api.Config.ErrorLog = log.New(io.Discard, "", 0)
	api.Config.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: perConnection} // kube-apiserver's default
	api.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	api.EnableHTTP2 = true
	api.StartTLS()
	defer api.Close()
	server := front(t, api.URL)
	before := runtime.NumGoroutine()
	client := &http.Client{Transport: &http.Transport{}}
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	for range watches {
		group.Go(func() {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL+Prefix+"/api/v1/pods?watch=true", nil)
			if err != nil {
				t.Error(err)
				return
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { _ = resp.Body.Close() })
		})
	}
	group.Wait()
	// Some connections are dialled at the same time, and not all of them are needed.
	if n := connections.Load(); n < watches/perConnection || n > 2*watches/perConnection {
		t.Errorf("%d watches use %d connections", watches, n)
	}
	cancel()
	for deadline := time.Now().Add(30 * time.Second); ; runtime.Gosched() {
		// Idle connections keep their goroutines.
		left := runtime.NumGoroutine() - before
		if left < 5*int(connections.Load()) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines are left", left)
		}
	}
}

// TestCompressedWatchIsLeftAlone: a byte of compressed data may look like the end of an event.
func TestCompressedWatchIsLeftAlone(t *testing.T) {
	f := &forward{Proxy: &Proxy{}, Request: &Request{}}
	body := io.NopCloser(strings.NewReader("\x1f\x8b\n"))
	resp := &http.Response{Body: body, Header: http.Header{
		"Content-Type": {"application/json"}, "Content-Encoding": {"gzip"}}}
	f.endBetweenEvents(resp)
	if resp.Body != body || f.EndWatch(&Ended{}) {
		t.Error("it would end within the data")
	}
}
