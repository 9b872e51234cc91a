package inbound

import (
	"encoding/binary"
	"errors"
	"net"
	"sync"
)

const (
	// Bytes of memory per byte of a block of headers, at most. Measured: fields of one byte, each an entry of HPACK's
	// static table, cost 47 until net/http's limit ends their number, which is before firstBytes for all; then what counts
	// is the bytes, which HPACK may keep twice.
	firstCost, furtherCost, firstBytes = 50, 4, 9 << 10

	frameHeader, headersFrame, continuationFrame, endHeaders = 9, 1, 9, 4 // Source: RFC 9113, 4.1 and 6.

)

// preface begins a connection of HTTP/2. Source: RFC 9113, 3.4.
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// framed is a connection of HTTP/2. It counts the memory for headers until they reach the handler: those of requests
// that net/http answers itself (400, 431) never do, and may wait there for a caller who reads no answer.
type framed struct {
	net.Conn // of TLS

	conn    *Conn
	preface string // what is left of it
	writing sync.Mutex
	head    [frameHeader]byte
	have    int    // bytes of head
	left    int    // bytes of the frame
	block   int    // bytes of the block of headers
	last    uint32 // stream
	began   bool   // the block begins a stream
	single  bool   // the block has one frame
}

// blocks counts the headers of a connection of HTTP/2 that have not reached the handler. Guarded by the listener's mu.
type blocks struct {
	unfinished int64 // bytes of memory for the block that is being read
	kept       int64 // bytes of memory that HPACK keeps of the largest block that had several frames
	read       int   // that have not reached the handler
	largest    int64 // bytes of memory for the largest of them
}

func (b *blocks) memory() int64 { return b.unfinished + b.kept + int64(b.read)*b.largest }

// Read reads no frame while a write waits: net/http would queue its answers to frames.
func (f *framed) Read(p []byte) (int, error) {
	if f.left == 0 && f.have == 0 {
		f.writing.Lock()
		f.writing.Unlock() //nolint:staticcheck // only waits
	}
	n, err := f.Conn.Read(p)
	for read := p[:n]; len(read) > 0; {
		if got := min(len(read), len(f.preface)); got > 0 {
			if string(read[:got]) != f.preface[:got] { // net/http would take it for HTTP/1.1, whose headers nobody counts here
				return 0, errors.Join(errors.New("not HTTP/2"), f.conn.Close())
			}
			f.preface, read = f.preface[got:], read[got:]
			continue
		}
		if f.left == 0 {
			got := copy(f.head[f.have:], read)
			f.have, read = f.have+got, read[got:]
			if f.have < frameHeader {
				continue
			}
			f.begin()
		}
		got := min(f.left, len(read))
		f.left, read = f.left-got, read[got:]
		if !f.count(got) {
			return 0, errTooMuch
		}
	}
	return n, err
}

func (f *framed) Write(p []byte) (int, error) {
	f.writing.Lock()
	defer f.writing.Unlock()
	return f.Conn.Write(p)
}

// begin reads the header of a frame.
func (f *framed) begin() {
	f.left = int(binary.BigEndian.Uint32(f.head[:]) >> 8)
	if f.head[3] == headersFrame {
		stream := binary.BigEndian.Uint32(f.head[5:]) &^ (1 << 31) // a reserved bit, which net/http ignores too
		f.began, f.block, f.single = stream > f.last, 0, true
		f.last = max(f.last, stream)
	} else {
		f.single = false
	}
}

// count counts n bytes of a frame. It returns false if the connection was closed.
func (f *framed) count(n int) bool {
	ended := f.left == 0
	if ended {
		f.have = 0
	}
	if kind := f.head[3]; kind != headersFrame && kind != continuationFrame {
		return true
	}
	first := max(min(n, firstBytes-f.block), 0)
	f.block += n
	return f.conn.countHeaders(func(b *blocks) int64 {
		b.unfinished += int64(n)*furtherCost + int64(first)*(firstCost-furtherCost)
		if !ended || f.head[4]&endHeaders == 0 {
			return 0
		}
		if f.began {
			b.read++
			b.largest = max(b.largest, b.unfinished+streamCost)
		}
		if !f.single {
			b.kept = max(b.kept, 2*int64(f.block))
		}
		b.unfinished = 0
		return 0
	})
}
