package kube

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"sync/atomic"
	"time"
)

// Body is a request's body as its caller sends it. A nil *Body is that of a request without one.
type Body struct {
	io.ReadCloser

	control  *http.ResponseController
	received func(bytes float64)
	patience time.Duration // between two parts; 0: as long as it takes
	blocked  atomic.Int64
	reading  context.Context         // its cause is what reading has ended with: io.EOF if all has come
	end      context.CancelCauseFunc // ends reading
}

// NewBody wraps the body of a request that w answers. It tells received how many bytes have come.
func NewBody(w http.ResponseWriter, body io.ReadCloser, received func(bytes float64)) *Body {
	b := &Body{ReadCloser: body, control: http.NewResponseController(w), received: received}
	b.reading, b.end = context.WithCancelCause(context.Background())
	return b
}

// Within gives the caller so long to send all of it. Else there is no limit: it may be a stream.
func (b *Body) Within(limit time.Duration) {
	if b != nil {
		_ = b.control.SetReadDeadline(time.Now().Add(limit))
	}
}

// Blocked returns since when a read has not returned, in Unix nanoseconds; 0 if none is under way.
func (b *Body) Blocked() int64 {
	if b == nil {
		return 0
	}
	return b.blocked.Load()
}

// Ended reports whether there is nothing more to read.
func (b *Body) Ended() bool { return b == nil || b.reading.Err() != nil }

// Failure returns why the body could not be read to its end, nil if it could, or is being read.
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
		// From here net/http reads, and would take the end of the limit for the caller's leaving.
		_ = b.control.SetReadDeadline(time.Time{})
	}
	if err != nil {
		b.end(err)
	}
	return n, err
}

// afterAnswer reads what is left of a body that the API server has not read to its end, for a moment, and else ends the
// connection. net/http would do that after the handler, reads on then as if for the next request, and panics when that is
// read (Go 1.26, finishRequest).
func (b *Body) afterAnswer(answer http.Header) {
	if b.Ended() && b.Failure() == nil {
		return
	}
	_ = b.control.Flush()
	b.Within(2 * time.Second)
	if err := b.Close(); (err != nil || b.Failure() != nil) && answer.Get("Connection") != "close" {
		panic(http.ErrAbortHandler) // what comes next is no request
	}
}

// late reports whether the body did not come in its time. net/http then ends the request's context, as if the caller
// had gone, a moment before that read returns.
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

// writeBroken answers for a body that could not be read.
func writeBroken(w http.ResponseWriter, r *http.Request, err error) {
	w.Header().Set("Connection", "close")
	if errors.Is(err, os.ErrDeadlineExceeded) {
		WriteStatus(w, r, http.StatusRequestTimeout, "the body of the request does not come to its end: nothing came for a minute, or for a second while others wait, or a small body took longer than 32 s", 0)
		return
	}
	WriteStatus(w, r, http.StatusBadRequest, "the body of the request cannot be read: its length or its chunks are wrong, or it has ended early", 0)
}
