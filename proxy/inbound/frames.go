package inbound

import (
	"encoding/binary"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// Bytes of memory per byte of a block of headers, at most. Measured: fields of one byte, each an entry of HPACK's
	// static table, cost 47 until net/http's limit ends their number, which is before firstBytes for all; then what counts
	// is the bytes, which HPACK may keep twice.
	firstCost, furtherCost, firstBytes = 50, 4, 9 << 10

	// Source: RFC 9113, 4.1, 6, and 7.
	frameHeader, endHeaders, refusedStream                                   = 9, 4, 7
	dataFrame, headersFrame, resetFrame, goAwayFrame, continuationFrame byte = 0, 1, 3, 7, 9

	// Bytes of a request's trailers. The proxy forwards none, but net/http keeps those that the headers have announced.
	maxTrailers = 256

	// Frames that are read while a write waits: net/http queues its answers to them. Such a write has room for more.
	maxAhead = 100

	// How long a write may wait for a caller who has never shown a valid credential: what they do not read, frpc keeps.
	strangerTimeout = 2 * time.Second
)

// preface begins a connection of HTTP/2. Source: RFC 9113, 3.4.
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// framed is a connection of HTTP/2. It counts the memory for headers until they reach the handler: those of requests
// that net/http answers itself (400, 431) never do, and may wait there for a caller who reads no answer.
type framed struct {
	net.Conn // of TLS

	conn    *Conn
	preface string // what is left of it
	in      frames
	block   int          // bytes of the block of headers
	last    uint32       // stream
	began   bool         // the block begins a stream
	single  bool         // the block has one frame
	trailer bool         // the block belongs to a stream that has begun before
	ahead   atomic.Int32 // frames read since the last write began

	writing sync.Mutex
	out     frames
	code    uint32      // of the frame that resets a stream
	leaving atomic.Bool // a GOAWAY was sent: net/http ignores new streams
}

// frames follows the frames of one direction.
type frames struct {
	head [frameHeader]byte
	have int // bytes of head
	left int // bytes of the payload
}

// next takes what p, which is not empty, has of one frame: of its header, and of its payload.
func (f *frames) next(p []byte) (payload, rest []byte, begins, ends bool) {
	if f.have < frameHeader {
		n := copy(f.head[f.have:], p)
		f.have, p = f.have+n, p[n:]
		if f.have < frameHeader {
			return nil, nil, false, false
		}
		begins, f.left = true, int(binary.BigEndian.Uint32(f.head[:])>>8)
	}
	n := min(f.left, len(p))
	if f.left -= n; f.left == 0 {
		f.have = 0
	}
	return p[:n], p[n:], begins, f.left == 0
}

func (f *frames) kind() byte { return f.head[3] }

// blocks counts the headers of a connection of HTTP/2 that have not reached the handler. Guarded by the listener's mu.
type blocks struct {
	unfinished int64 // bytes of memory for the block that is being read
	kept       int64 // bytes of memory that HPACK keeps of the largest block that had several frames
	read       int   // that have not reached the handler
	largest    int64 // bytes of memory for the largest of them
	late       int   // that were read before all streams had ended: their handlers may still begin
	data       int64 // bytes of bodies that net/http may keep for requests that are not authenticated
}

// unhandled returns the bytes of memory for what has not reached the handler. Bodies are counted for strangers, and as
// long as there may be a request that net/http answers itself: it does not read its body. The listener's mu is held.
func (c *Conn) unhandled() int64 {
	b := &c.blocks
	memory := b.unfinished + b.kept + int64(b.read)*b.largest
	if b.read > 0 || !c.known.Load() {
		memory += b.data
	}
	return memory
}

// done forgets one that was read.
func (b *blocks) done() {
	if b.late > 0 {
		b.late--
	} else if b.read = max(b.read-1, 0); b.read == 0 {
		b.largest = 0
	}
}

// idle records that no stream is open. A handler whose stream the caller has reset may still be about to begin: it must
// not be taken for that of a later request.
func (b *blocks) idle() { b.late, b.read, b.largest, b.data = b.late+b.read, 0, 0, 0 }

// Read follows the frames, and waits while a write does and too many have come: see maxAhead.
func (f *framed) Read(p []byte) (int, error) {
	if f.ahead.Load() > maxAhead {
		f.writing.Lock()
		f.writing.Unlock() //nolint:staticcheck // only waits
	}
	n, err := f.Conn.Read(p)
	read := p[:n]
	if n := min(n, len(f.preface)); n > 0 {
		if string(read[:n]) != f.preface[:n] { // net/http would take it for HTTP/1.1, whose headers nobody counts here
			return 0, errors.Join(errors.New("not HTTP/2"), f.conn.Close())
		}
		f.preface, read = f.preface[n:], read[n:]
	}
	for len(read) > 0 {
		var payload []byte
		var begins, ends bool
		payload, read, begins, ends = f.in.next(read)
		if begins {
			f.begin()
		}
		if !f.count(len(payload), ends) {
			return 0, errTooMuch
		}
	}
	return n, err
}

// Write follows the frames that net/http sends: by them it refuses streams, of which the handlers never hear.
func (f *framed) Write(p []byte) (int, error) {
	f.writing.Lock()
	defer f.writing.Unlock()
	f.ahead.Store(0)
	for rest := p; len(rest) > 0; {
		var payload []byte
		var ends bool
		payload, rest, _, ends = f.out.next(rest)
		switch f.out.kind() {
		case goAwayFrame:
			f.leaving.Store(true)
		case resetFrame:
			for _, b := range payload {
				f.code = f.code<<8 | uint32(b)
			}
			if ends && f.code == refusedStream { // it has not reached the handler
				f.conn.countHeaders(0, (*blocks).done)
			}
		}
	}
	deadline := time.Time{}
	if !f.conn.known.Load() {
		deadline = time.Now().Add(strangerTimeout)
	}
	_ = f.SetWriteDeadline(deadline)
	n, err := f.Conn.Write(p)
	if err != nil { // net/http would go on to read
		f.conn.Abort()
	}
	return n, err
}

// begin reads the header of a frame.
func (f *framed) begin() {
	f.ahead.Add(1)
	if f.single = f.in.kind() == headersFrame; f.single {
		stream := binary.BigEndian.Uint32(f.in.head[5:]) &^ (1 << 31) // a reserved bit, which net/http ignores too
		f.trailer = stream <= f.last
		f.began, f.block = !f.trailer && !f.leaving.Load(), 0
		f.last = max(f.last, stream)
	}
}

// count counts n bytes of a frame. It returns false if the connection was closed.
func (f *framed) count(n int, ends bool) bool {
	switch kind := f.in.kind(); {
	case kind == dataFrame:
		return f.conn.countHeaders(0, func(b *blocks) {
			if b.read == 0 && f.conn.known.Load() {
				b.data = 0
			} else {
				b.data = min(b.data+int64(n), f.conn.listener.config.Window)
			}
		})
	case kind != headersFrame && kind != continuationFrame:
		return true
	}
	first := max(min(n, firstBytes-f.block), 0)
	if f.block += n; f.trailer && f.block > maxTrailers {
		f.conn.Abort()
		return false
	}
	return f.conn.countHeaders(0, func(b *blocks) {
		b.unfinished += int64(n)*furtherCost + int64(first)*(firstCost-furtherCost)
		if !ends || f.in.head[4]&endHeaders == 0 {
			return
		}
		if f.began {
			b.read++
			b.largest = max(b.largest, b.unfinished+streamCost)
		}
		if !f.single {
			b.kept = max(b.kept, 2*int64(f.block))
		}
		b.unfinished = 0
	})
}
