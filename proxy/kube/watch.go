package kube

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
)

// isWatch reads ?watch as the API server does: anything but false and 0 is true.
// Source: k8s.io/apimachinery/pkg/runtime/conversion.go, Convert_Slice_string_To_bool.
func isWatch(u *url.URL) bool {
	values, ok := u.Query()["watch"]
	return ok && !strings.EqualFold(values[0], "false") && values[0] != "0"
}

// endBetweenEvents replaces a watch's body by one that can end cleanly between two events: when the proxy drains, and
// when the caller loses its right. client-go takes that for the end that every watch has after a while, and watches
// again from where it was. A watch in a format whose events cannot be told apart is left alone, and ends less cleanly.
func (f *forward) endBetweenEvents(resp *http.Response) {
	contentType := resp.Header.Get("Content-Type")
	body := &watchBody{ReadCloser: resp.Body, endsEvent: endsLine, between: true,
		isJSON: strings.HasPrefix(contentType, "application/json")}
	switch isProtobuf := strings.HasPrefix(contentType, "application/vnd.kubernetes.protobuf"); {
	case resp.Header.Get("Content-Encoding") != "", !isProtobuf && !body.isJSON:
		return
	case isProtobuf:
		body.endsEvent = new(framedEvents).read
	}
	body.forget = context.AfterFunc(f.draining, func() { body.end(&Ended{}) })
	if f.draining.Err() != nil {
		body.end(&Ended{})
	}
	resp.Body = body
	f.watch.Store(body)
}

// watchBody is the body of a watch.
type watchBody struct {
	io.ReadCloser

	forget    func() bool            // releases the body from the drain
	endsEvent func(part []byte) bool // takes the next part and reports whether it ends with an event
	isJSON    bool

	mu      sync.Mutex
	between bool   // the caller has got whole events only
	ending  *Ended // why it ends after the event that is being sent; nil: it goes on
	ended   bool
	last    bytes.Buffer // what the caller still gets once it has ended
}

// Read returns io.EOF once the body has ended: the caller's next watch delivers the events that came since.
func (b *watchBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended {
		return b.last.Read(p)
	}
	if n > 0 {
		b.between = b.endsEvent(p[:n])
		b.endBetween()
	}
	return n, err
}

func (b *watchBody) Close() error {
	b.forget()
	return b.ReadCloser.Close()
}

// end ends the body, at the latest when the event that is being sent has ended.
func (b *watchBody) end(why *Ended) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ending = why
	b.endBetween()
}

// endBetween ends the body if it is ending and between events: the next Read, or one that waits, returns what is last.
// b.mu is held.
func (b *watchBody) endBetween() {
	if b.ending == nil || !b.between || b.ended {
		return
	}
	b.ended = true
	if b.isJSON && b.ending.Code != 0 {
		status := newStatus(int(b.ending.Code), b.ending.Error())
		_ = json.NewEncoder(&b.last).Encode(map[string]any{"type": "ERROR", "object": status})
	}
	_ = b.ReadCloser.Close() // ends a Read that waits
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
