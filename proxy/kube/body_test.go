package kube

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"testing"
	"time"
)

// TestAnswersToLargeBodiesAreComplete: a body that is too large to be kept is sent while it arrives, but net/http
// would close an HTTP/1.1 caller's body when the answer begins. The API server, or a backend behind services/proxy,
// may answer before it has read all of it.
func TestAnswersToLargeBodiesAreComplete(t *testing.T) {
	const padding = 64 << 10 // of an answer: more than comes with its headers
	answer := func(body []byte) []byte { return append(bytes.Repeat(body[:16], padding/16), body[:16]...) }
	for _, protocols := range [][2]string{
		{"HTTP/1.1", "HTTP/1.1"}, {"HTTP/1.1", "HTTP/2"}, {"HTTP/2", "HTTP/1.1"}, {"HTTP/2", "HTTP/2"},
	} {
		for _, test := range []struct {
			name   string
			unread int  // bytes of the body when the answer begins
			rest   bool // are read then
		}{
			{"all is read", 0, true},
			{"one byte is not", 1, true},
			{"some of it is not", 20 << 10, true},
			{"a part is never read", 100 << 10, false},
		} {
			t.Run("caller "+protocols[0]+", API server "+protocols[1]+", "+test.name, func(t *testing.T) {
				upstream := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if test.rest {
						_ = http.NewResponseController(w).EnableFullDuplex()
					}
					body := make([]byte, int(r.ContentLength)-test.unread)
					if _, err := io.ReadFull(r.Body, body); err != nil {
						panic(http.ErrAbortHandler)
					}
					whole := answer(body)
					w.Header().Set("Content-Length", strconv.Itoa(len(whole)))
					_, _ = w.Write(whole[:padding/2])
					_ = http.NewResponseController(w).Flush()
					if test.rest {
						if n, err := io.Copy(io.Discard, r.Body); n != int64(test.unread) || err != nil {
							t.Errorf("the API server read %d more bytes of %d: %v", n, test.unread, err)
						}
					}
					_, _ = w.Write(whole[padding/2:])
				}))
				if protocols[1] == "HTTP/2" {
					upstream.EnableHTTP2 = true
					upstream.StartTLS()
				} else {
					upstream.Start()
				}
				t.Cleanup(upstream.Close)
				server := front(t, upstream.URL)
				client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 8}}
				if protocols[0] == "HTTP/2" {
					server = frontHTTP2(t, upstream.URL)
					client = server.Client()
				}
				t.Cleanup(client.CloseIdleConnections)
				var group sync.WaitGroup
				for worker := range 8 {
					group.Go(func() {
						for i := range 8 {
							body := bytes.Repeat(fmt.Appendf(nil, "%15d\n", worker*100+i), (300<<10+(worker*8+i)*26<<10)/16)
							resp, err := client.Post(server.URL+Prefix+"/api/v1/pods", "text/plain", bytes.NewReader(body))
							if err != nil {
								t.Error(err)
								return
							}
							got, err := io.ReadAll(resp.Body)
							_ = resp.Body.Close()
							if err != nil || resp.StatusCode != http.StatusOK || !bytes.Equal(got, answer(body)) {
								t.Errorf("a body of %d bytes: %s, %d bytes came back: %v", len(body), resp.Status, len(got), err)
							}
						}
					})
				}
				group.Wait()
			})
		}
	}
}

// TestAnswerBeginsBeforeTheBodyEnds: a caller may wait for the answer's headers before it sends the end of the body.
func TestAnswerBeginsBeforeTheBodyEnds(t *testing.T) {
	upstream := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.ReadFull(r.Body, make([]byte, 16))
		_ = http.NewResponseController(w).Flush()
		_, _ = io.Copy(w, r.Body)
	}))
	upstream.EnableHTTP2 = true
	upstream.StartTLS()
	t.Cleanup(upstream.Close)
	server := front(t, upstream.URL)
	client := &http.Client{Transport: &http.Transport{}, Timeout: 10 * time.Second}
	t.Cleanup(client.CloseIdleConnections)
	body, send := io.Pipe()
	t.Cleanup(func() { _ = send.Close() })
	go func() { _, _ = io.WriteString(send, "the first of it;") }()
	resp, err := client.Post(server.URL+Prefix+"/api/v1/pods", "text/plain", body)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	_, _ = io.WriteString(send, "the last")
	_ = send.Close()
	if answer, err := io.ReadAll(resp.Body); err != nil || string(answer) != "the last" {
		t.Errorf("answered %s %q, %v", resp.Status, answer, err)
	}
}

// TestBodyIsUsedAfterItsHandler: the transport may still read it then, and net/http panics if a deadline is set.
func TestBodyIsUsedAfterItsHandler(t *testing.T) {
	var body *Body
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body = NewBody(w, r.Body, func(float64) {})
		body.stream(w, r)
		body.Release()
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	resp, err := server.Client().Post(server.URL, "text/plain", bytes.NewReader(make([]byte, 1<<20)))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	server.Close() // the handler has ended
	body.Within(time.Second)
	if _, err := io.Copy(io.Discard, body); err == nil {
		t.Error("the body was read to its end")
	}
}
