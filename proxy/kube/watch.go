package kube

import (
	"context"
	"encoding/binary"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
)

// isWatch reads ?watch as the API server does: anything but false and 0 is true.
// Source: k8s.io/apimachinery/pkg/runtime/conversion.go, Convert_Slice_string_To_bool.
func isWatch(u *url.URL) bool {
	if !strings.Contains(u.RawQuery, "watch") {
		return false // most requests: nothing to parse
	}
	values, ok := u.Query()["watch"]
	return ok && !strings.EqualFold(values[0], "false") && values[0] != "0"
}

// endOnDrain replaces a watch's body by one that ends cleanly between two events once the proxy drains. client-go takes
// that for the end that every watch has after a while, and watches again from where it was. A watch in a format whose
// events cannot be told apart is left alone, and runs until the drain timeout.
func (p *Proxy) endOnDrain(resp *http.Response) {
	body := &watchBody{ReadCloser: resp.Body, draining: p.draining, endsEvent: endsLine, between: true}
	switch contentType := resp.Header.Get("Content-Type"); {
	case strings.HasPrefix(contentType, "application/vnd.kubernetes.protobuf"):
		body.endsEvent = new(framedEvents).read
	case !strings.HasPrefix(contentType, "application/json"):
		return
	}
	body.forget = context.AfterFunc(p.draining, func() { body.advance(nil) })
	body.advance(nil) // ends it now if the proxy drains already
	resp.Body = body
}

// watchBody is the body of a watch.
type watchBody struct {
	io.ReadCloser

	draining  context.Context        // ends when the proxy drains
	forget    func() bool            // releases the body from draining
	endsEvent func(part []byte) bool // takes the next part and reports whether it ends with an event

	mu      sync.Mutex
	between bool // the caller has got whole events only
	ended   bool
}

func (b *watchBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.advance(p[:n]) {
		return 0, io.EOF // the caller's next watch delivers the events that came since
	}
	return n, err
}

func (b *watchBody) Close() error {
	b.forget()
	return b.ReadCloser.Close()
}

// advance records a part that the caller is about to get, and reports whether the body has ended before. If the proxy
// drains and the caller has whole events only, it ends the body: the next Read, or one that waits, returns io.EOF.
func (b *watchBody) advance(part []byte) (ended bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended {
		return true
	}
	if len(part) > 0 {
		b.between = b.endsEvent(part)
	}
	if b.draining.Err() != nil && b.between {
		b.ended = true
		_ = b.ReadCloser.Close() // ends a Read that waits
	}
	return false
}

// endsLine reports whether a part ends with an event in JSON: the API server breaks lines nowhere else.
func endsLine(part []byte) bool { return part[len(part)-1] == '\n' }

// framedEvents finds the ends of events that begin with their length in four bytes.
// Source: k8s.io/apimachinery/pkg/util/framer.
type framedEvents struct {
	header []byte // the bytes of the length that have come
	rest   int64  // bytes of the event that are still to come
}

func (f *framedEvents) read(part []byte) bool {
	for int64(len(part)) > f.rest {
		f.header = append(f.header, part[f.rest])
		part, f.rest = part[f.rest+1:], 0
		if len(f.header) == 4 {
			f.rest = int64(binary.BigEndian.Uint32(f.header))
			f.header = f.header[:0]
		}
	}
	f.rest -= int64(len(part))
	return f.rest == 0 && len(f.header) == 0
}
