package frpc

import (
	"bufio"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
)

// connect asks the HTTP proxy at the other end of conn to connect it to addr.
func connect(conn net.Conn, proxy *url.URL, addr string) error {
	request := &http.Request{Method: http.MethodConnect, URL: &url.URL{Host: addr}, Host: addr, Header: http.Header{}}
	if proxy.User != nil {
		password, _ := proxy.User.Password()
		credential := proxy.User.Username() + ":" + password
		request.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(credential)))
	}
	return exchangeHead(conn, conn, request, http.StatusOK) // frps says nothing before it is spoken to
}

// exchangeHead sends a request and reads the head of the answer, which must have the status want.
func exchangeHead(conn net.Conn, answer io.Reader, request *http.Request, want int) error {
	if err := request.Write(conn); err != nil {
		return err
	}
	head := bufio.NewReaderSize(&io.LimitedReader{R: answer, N: 64 << 10}, 16)
	resp, err := http.ReadResponse(head, request) //nolint:bodyclose // what follows the head is the connection
	if err == nil && resp.StatusCode != want {
		err = fmt.Errorf("it answers %.200s", resp.Status)
	}
	return err
}

// webSocket reads and writes a stream of bytes in the frames of a WebSocket.
type webSocket struct {
	net.Conn

	reader *bufio.Reader
	left   uint64 // bytes to come of the current frame
}

// openWebSocket opens frp's WebSocket on conn. Source: frp pkg/util/net/websocket.go.
func openWebSocket(conn net.Conn, host string) (net.Conn, error) {
	w := &webSocket{Conn: conn, reader: bufio.NewReader(conn)}
	return w, exchangeHead(conn, w.reader, &http.Request{URL: &url.URL{Opaque: "/~!frp"}, Host: host, Header: http.Header{
		"Origin": {"http://" + host}, "Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"},
		"Sec-Websocket-Key": {base64.StdEncoding.EncodeToString(make([]byte, 16))},
	}}, http.StatusSwitchingProtocols)
}

// Write sends a binary frame. Its mask, which a client must name, is zero. Source: RFC 6455, 5.2.
func (w *webSocket) Write(p []byte) (int, error) {
	if len(p) > 1<<16-1 {
		return 0, errors.New("too long for a frame")
	}
	frame := binary.BigEndian.AppendUint16([]byte{0x82, 0x80 | 126}, uint16(len(p)))
	frame = append(frame, 0, 0, 0, 0)
	if _, err := w.Conn.Write(append(frame, p...)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Read returns bytes of binary frames, and skips all other frames.
func (w *webSocket) Read(p []byte) (int, error) {
	for w.left == 0 {
		var header [2]byte
		if _, err := io.ReadFull(w.reader, header[:]); err != nil {
			return 0, err
		}
		size := make([]byte, 8) // of the payload: 7 bits, or 2 or 8 bytes after them
		size[7] = header[1] & 0x7f
		if long := map[byte]int{126: 2, 127: 8}[size[7]]; long > 0 {
			size[7] = 0
			if _, err := io.ReadFull(w.reader, size[8-long:]); err != nil {
				return 0, err
			}
		}
		w.left = binary.BigEndian.Uint64(size)
		if control := header[0]&0x08 != 0; control {
			if _, err := w.reader.Discard(int(w.left)); err != nil {
				return 0, err
			}
			w.left = 0
		}
	}
	n, err := w.reader.Read(p[:min(uint64(len(p)), w.left)])
	w.left -= uint64(n)
	return n, err
}
