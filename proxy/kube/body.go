package kube

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pipeops/vm-agent/proxy/answer"
)

// maxRepeatable is up to how many bytes a body is kept, if memory allows, so that the transport can repeat the request
// when the API server rejects it unread (GOAWAY): to stop, or to balance its connections.
const maxRepeatable = 256 << 10

// UploadWindow is how many bytes of a body a caller of HTTP/2 may send ahead.
const UploadWindow = 256 << 10

// keepTimeout is how long a body that is kept may take to arrive, as headers may; uploadTimeout is how long any other
// body may take between two parts.
const keepTimeout, uploadTimeout = 32 * time.Second, time.Minute

// Body is a request's body as its caller sends it. A nil *Body is that of a request without one.
type Body struct {
	io.ReadCloser

	control  *http.ResponseController
	received func(bytes float64)
	patience time.Duration // between two parts; 0: no limit
	blocked  atomic.Int64

	mu       sync.Mutex
	released bool // the answer has ended: control must not be used any more

	reading context.Context         // its cause is the error that ended reading: io.EOF if all has arrived
	end     context.CancelCauseFunc // ends reading
}

// NewBody wraps the body of a request that w answers. It calls received with the number of bytes of each read.
func NewBody(w http.ResponseWriter, body io.ReadCloser, received func(bytes float64)) *Body {
	b := &Body{ReadCloser: body, control: http.NewResponseController(w), received: received}
	b.reading, b.end = context.WithCancelCause(context.Background())
	return b
}

// Within limits the time until all of the body has arrived. Without it there is no limit: the body may be a stream.
func (b *Body) Within(limit time.Duration) {
	if b != nil {
		b.readBefore(time.Now().Add(limit))
	}
}

// readBefore sets the deadline for reading. Over HTTP/2, net/http panics if that comes after the handler: the transport
// may still read.
func (b *Body) readBefore(deadline time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.released {
		_ = b.control.SetReadDeadline(deadline)
	}
}

// Release must be called when the handler ends.
func (b *Body) Release() {
	if b != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.released = true
	}
}

// Blocked returns since when a read has been waiting, in Unix nanoseconds; 0 if none is.
func (b *Body) Blocked() int64 {
	if b == nil {
		return 0
	}
	return b.blocked.Load()
}

// Ended reports whether there is nothing more to read.
func (b *Body) Ended() bool { return b == nil || b.reading.Err() != nil }

// Failure returns why the body could not be read to its end; nil if it could, or is still being read.
func (b *Body) Failure() error {
	if b == nil || errors.Is(context.Cause(b.reading), io.EOF) {
		return nil
	}
	return context.Cause(b.reading)
}

func (b *Body) Read(p []byte) (int, error) {
	if b.patience > 0 {
		b.Within(b.patience)
	}
	b.blocked.Store(time.Now().UnixNano())
	n, err := b.ReadCloser.Read(p)
	b.blocked.Store(0)
	b.received(float64(n))
	if errors.Is(err, io.EOF) {
		// From here net/http reads, and would take an expired deadline for a caller who has gone.
		b.readBefore(time.Time{})
	}
	if err != nil {
		b.end(err)
	}
	return n, err
}

// keep reads a small body in full, so that the transport can repeat the request.
func (b *Body) keep(r *http.Request) error {
	b.Within(keepTimeout)
	data := make([]byte, r.ContentLength)
	if _, err := io.ReadFull(b, data); err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, b) // to io.EOF; nothing is left
	r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	r.Body, _ = r.GetBody()
	return nil
}

// stream prepares a body to be sent while it arrives. afterAnswer must follow.
func (b *Body) stream(w http.ResponseWriter, r *http.Request) {
	b.patience = uploadTimeout
	// Else net/http closes the body when the answer begins, and the transport, still reading, breaks off the answer.
	_ = b.control.EnableFullDuplex()
	if r.Header.Get("Expect") != "" && r.ProtoMajor == 1 && r.ProtoMinor == 1 {
		// Else net/http tells the caller to continue when the transport, in another goroutine, first reads the body: a
		// race with a 1xx of the API server on the way back.
		w.WriteHeader(http.StatusContinue)
	}
}

// afterAnswer reads what is left of a body that the API server has not read to its end, for a moment, and else closes
// the connection. net/http would do that after the handler, read on as if for the next request, and panic when that is
// read (Go 1.26, finishRequest).
func (b *Body) afterAnswer(answer http.Header) {
	if b.Ended() && b.Failure() == nil {
		return
	}
	_ = b.control.Flush()
	b.Within(2 * time.Second)
	if err := b.Close(); (err != nil || b.Failure() != nil) && answer.Get("Connection") != "close" {
		panic(http.ErrAbortHandler) // the bytes that come next are not a request
	}
}

// late reports whether the body did not arrive in time. net/http then cancels the request's context, as if the caller
// had gone, a moment before the read returns.
func (b *Body) late() bool {
	if b == nil {
		return false
	}
	select {
	case <-b.reading.Done():
	case <-time.After(100 * time.Millisecond):
	}
	return errors.Is(b.Failure(), os.ErrDeadlineExceeded)
}

// writeBodyError answers for a body that could not be read; err is why.
func writeBodyError(w http.ResponseWriter, r *http.Request, err error) {
	code, why := answer.BodyError(err, "nothing came for a minute, or for a second while others wait, or a small body "+
		"took longer than 32 s")
	w.Header().Set("Connection", "close")
	WriteStatus(w, r, code, why, 0)
}
