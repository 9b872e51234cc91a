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

// isWatch follows the API server's reading of ?watch: anything but false and 0 is true.
// Source: k8s.io/apimachinery/pkg/runtime/conversion.go, Convert_Slice_string_To_bool.
func isWatch(u *url.URL) bool {
	if !strings.Contains(u.RawQuery, "watch") {
		return false // most requests: nothing to parse
	}
	values, ok := u.Query()["watch"]
	return ok && !strings.EqualFold(values[0], "false") && values[0] != "0"
}

// track puts a body in place of a watch's that ends between two events once the proxy drains, with a clean end.
// client-go takes that for the end that every watch has after a while, and watches again from where it was.
func (p *Proxy) track(resp *http.Response) {
	body := &watchBody{ReadCloser: resp.Body, draining: p.draining, endsEvent: endsLine, between: true}
	switch contentType := resp.Header.Get("Content-Type"); {
	case strings.HasPrefix(contentType, "application/vnd.kubernetes.protobuf"):
		body.endsEvent = new(framedEvents).read
	case !strings.HasPrefix(contentType, "application/json"):
		return // where its events end is not known: it runs on until the drain timeout
	}
	body.forget = context.AfterFunc(p.draining, func() { body.advance(nil) })
	body.advance(nil) // ends it now, if it comes late
	resp.Body = body
}

// watchBody is the body of a watch.
type watchBody struct {
	io.ReadCloser

	draining  context.Context        // ends when the proxy drains
	forget    func() bool            // takes the body from what is ended then
	endsEvent func(part []byte) bool // takes the next part and says whether it ends with an event

	mu      sync.Mutex
	between bool // the caller has got whole events only
	ended   bool
}

func (b *watchBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.advance(p[:n]) {
		return 0, io.EOF // what came since belongs to events that the caller will get from its next watch
	}
	return n, err
}

func (b *watchBody) Close() error {
	b.forget()
	return b.ReadCloser.Close()
}

// advance takes note of a part that the caller gets, unless the body has ended before, which it reports. If the proxy
// drains and the caller has whole events only, the next Read, or the one that waits, returns the end of the body.
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

// endsLine finds the ends of events in JSON: a line break, which the API server has nowhere else.
func endsLine(part []byte) bool { return part[len(part)-1] == '\n' }

// framedEvents begin with their length in four bytes.
// Source: k8s.io/apimachinery/pkg/util/framer.
type framedEvents struct {
	header []byte // what has come of the length
	rest   int64  // bytes of the event that are still to come
}

func (f *framedEvents) read(part []byte) bool {
	for len(part) > 0 {
		if f.rest > 0 {
			n := min(f.rest, int64(len(part)))
			f.rest -= n
			part = part[n:]
			continue
		}
		f.header = append(f.header, part[0])
		part = part[1:]
		if len(f.header) == 4 {
			f.rest = int64(binary.BigEndian.Uint32(f.header))
			f.header = f.header[:0]
		}
	}
	return f.rest == 0 && len(f.header) == 0
}
