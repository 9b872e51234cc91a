package kube

import (
	"encoding/binary"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
)

// Drain ends all watches between two events; it does not wait. Those that come later end at once.
func (p *Proxy) Drain() { p.watches.drain() }

// watches ends the running watches when the proxy drains: between two events, with a clean end of the body.
// client-go takes that for the end that every watch has after a while, and watches again from where it was.
type watches struct {
	mu       sync.Mutex
	open     map[*watchBody]struct{}
	draining bool
}

// isWatch follows the API server's reading of ?watch: anything but false and 0 is true.
// Source: k8s.io/apimachinery/pkg/runtime/conversion.go, Convert_Slice_string_To_bool.
func isWatch(u *url.URL) bool {
	if !strings.Contains(u.RawQuery, "watch") {
		return false // most requests: nothing to parse
	}
	values, ok := u.Query()["watch"]
	return ok && !strings.EqualFold(values[0], "false") && values[0] != "0"
}

// track puts a body that can be ended between two events in place of a watch's.
func (w *watches) track(resp *http.Response) {
	body := &watchBody{body: resp.Body, all: w, events: jsonEvents{}, between: true}
	switch contentType := resp.Header.Get("Content-Type"); {
	case strings.HasPrefix(contentType, "application/vnd.kubernetes.protobuf"):
		body.events = &framedEvents{}
	case !strings.HasPrefix(contentType, "application/json"):
		return // where its events end is not known: it runs on until the drain timeout
	}
	resp.Body = body
	w.mu.Lock()
	w.open[body] = struct{}{}
	draining := w.draining
	w.mu.Unlock()
	if draining {
		body.drain()
	}
}

// drain ends all watches, those to come included.
func (w *watches) drain() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.draining = true
	for body := range w.open {
		go body.drain() // to close a body may take a while
	}
}

func (w *watches) forget(body *watchBody) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.open, body)
}

// watchBody is the body of a watch.
type watchBody struct {
	body   io.ReadCloser
	all    *watches
	events events

	mu       sync.Mutex
	draining bool
	between  bool // the caller has got whole events only
	ended    bool
}

func (b *watchBody) Read(p []byte) (int, error) {
	n, err := b.body.Read(p)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended {
		return 0, io.EOF // what came since belongs to events that the caller will get from its next watch
	}
	if n > 0 {
		b.between = b.events.read(p[:n])
	}
	b.endIfDrained()
	return n, err
}

func (b *watchBody) Close() error {
	b.all.forget(b)
	return b.body.Close()
}

func (b *watchBody) drain() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.draining = true
	b.endIfDrained()
}

// endIfDrained makes the next Read, or the one that waits, return the end of the body.
func (b *watchBody) endIfDrained() {
	if b.draining && b.between && !b.ended {
		b.ended = true
		_ = b.body.Close() // ends a Read that waits
	}
}

// events finds the ends of events in a stream.
type events interface {
	// read takes the next part and says whether it ends with an event.
	read(part []byte) bool
}

// jsonEvents end with a line break, which JSON of the API server has nowhere else.
type jsonEvents struct{}

func (jsonEvents) read(part []byte) bool { return part[len(part)-1] == '\n' }

// framedEvents begin with their length in four bytes.
// Source: k8s.io/apimachinery/pkg/util/framer.
type framedEvents struct {
	header []byte // what has come of the length
	rest   uint32 // bytes of the event that are still to come
}

func (f *framedEvents) read(part []byte) bool {
	for len(part) > 0 {
		if f.rest == 0 {
			missing := min(4-len(f.header), len(part))
			f.header = append(f.header, part[:missing]...)
			part = part[missing:]
			if len(f.header) == 4 {
				f.rest = binary.BigEndian.Uint32(f.header)
				f.header = f.header[:0]
			}
			continue
		}
		n := min(uint64(f.rest), uint64(len(part)))
		f.rest -= uint32(n)
		part = part[n:]
	}
	return f.rest == 0 && len(f.header) == 0
}
