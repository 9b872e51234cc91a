package frpc

import (
	"bufio"
	"cmp"
	"context"
	"crypto/md5" //nolint:gosec // frp's login is defined with MD5
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/pipeops/vm-agent/frpc/tlsutil"
)

// ErrUnsupported means that Login supports neither the protocol nor the proxy.
var ErrUnsupported = errors.New("see frpc's log for the reason")

// LoginError names the stage at which a login failed. Its text has the hop and the cause; what to do depends on
// settings, which the caller knows.
type LoginError struct {
	Stage Stage
	Err   error
}

func (e *LoginError) Error() string { return e.Err.Error() }

func (e *LoginError) Unwrap() error { return e.Err }

// Stage is a stage of a login.
type Stage int

const (
	StageFiles          Stage = iota // read the files for TLS
	StageDial                        // connect to frps
	StageProxyDial                   // connect to the HTTP proxy
	StageProxyConnect                // have the HTTP proxy connect to frps
	StageWebSocket                   // open a WebSocket
	StageTLS                         // TLS handshake; Err may hold a *tlsutil.CertificateError
	StageOwnCertificate              // verify the certificate that frps makes for itself, which nobody can
	StageAnswer                      // frps answers the login
	StageAccept                      // frps accepts the login
)

// Login connects and logs in to frps as frpc does (HTTP proxy, TCP, TLS, WebSocket, login), and disconnects. It
// returns the version of frps. It exists because frpc reports the reason for a failed login only in its log. nil means
// that frps accepts the login; other errors are a *LoginError. For protocols quic and kcp, and for proxies other than
// HTTP, the error is ErrUnsupported. Login does not know frpc's environment, where http_proxy would be a proxy.
func Login(ctx context.Context, c Config) (version string, err error) {
	addr := net.JoinHostPort(c.ServerAddr, strconv.Itoa(c.ServerPort))
	proxy, err := url.Parse(c.ProxyURL.Reveal())
	if err != nil || !slices.Contains([]string{"", "http"}, proxy.Scheme) || c.Protocol == "quic" || c.Protocol == "kcp" {
		return "", fmt.Errorf("frpc is not logged in to frps at %s: %w", addr, ErrUnsupported)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	fail := func(stage Stage, format string, args ...any) (string, error) {
		return version, &LoginError{stage, fmt.Errorf(format, args...)}
	}
	next, stage, hop := addr, StageDial, "frps at "+addr
	if proxy.Host != "" {
		next, stage, hop = proxy.Host, StageProxyDial, "the proxy on the way to frps, "+proxy.Host+","
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", next)
	if err != nil {
		return fail(stage, "%s cannot be reached: %w", hop, err)
	}
	defer func() { _ = conn.Close() }()
	deadline, _ := ctx.Deadline() // in five seconds at most
	_ = conn.SetDeadline(deadline)
	if proxy.Host != "" {
		if err := connect(conn, proxy, addr); err != nil {
			return fail(StageProxyConnect, "the proxy at %s does not connect to frps at %s: %w", proxy.Host, addr, err)
		}
	}
	if c.Protocol == "websocket" {
		if conn, err = openWebSocket(conn, addr); err != nil {
			return fail(StageWebSocket, "frps at %s does not open a WebSocket: %w", addr, err)
		}
	}
	tlsConfig, err := c.TLS.clientConfig(c.ServerAddr)
	if err != nil {
		return fail(StageFiles, "files for TLS with frps: %w", err)
	}
	conn = tls.Client(conn, tlsConfig)
	err = conn.(*tls.Conn).HandshakeContext(ctx)
	network, isNet := errors.AsType[net.Error](err)
	switch rejected := tlsutil.Explain(err); {
	case err == nil:
	case rejected != nil && rejected.Nameless():
		return fail(StageOwnCertificate,
			"frps at %s presents the certificate that frps makes for itself, which nobody can verify", addr)
	case rejected != nil:
		return fail(StageTLS, "frps at %s %w", addr, rejected)
	case isNet && network.Timeout():
		return fail(StageTLS, "frps at %s accepts the connection and does not answer: %w", addr, err)
	default:
		return fail(StageTLS, "frps at %s fails the TLS handshake: %w", addr, err)
	}
	if c.Protocol == "wss" {
		if conn, err = openWebSocket(conn, tlsConfig.ServerName); err != nil {
			return fail(StageWebSocket, "frps at %s does not open a WebSocket: %w", addr, err)
		}
	}
	version, refusal, err := exchangeLogin(conn, c)
	operation, isNet := errors.AsType[*net.OpError](err)
	switch {
	case isNet && operation.Op == "remote error": // a TLS alert: with TLS 1.3 it comes after the handshake
		return fail(StageTLS, "frps at %s does not accept the agent's client certificate (%w)", addr, operation.Err)
	case err != nil:
		return fail(StageAnswer, "frps at %s does not answer a login: %w", addr, err)
	case refusal != "":
		return fail(StageAccept, "frps at %s refuses the login: %s", addr, refusal)
	}
	return version, nil
}

// Outdated says why a version of frps should not be used. It is empty for other versions.
func Outdated(version string) string {
	var minor int
	if n, _ := fmt.Sscanf(version, "0.%d", &minor); n == 1 && minor < 71 {
		return "frps before 0.71 may never complete the login of an agent whose connection has broken (frp #5391): update it"
	}
	return ""
}

func (t TLS) clientConfig(serverAddr string) (*tls.Config, error) {
	config := &tls.Config{ServerName: cmp.Or(t.ServerName, serverAddr), MinVersion: tls.VersionTLS12}
	config.InsecureSkipVerify = t.InsecureSkipVerify // bootstrap warns of it
	if t.CAFile != "" {
		var err error
		config.RootCAs, err = tlsutil.CertPool(t.CAFile)
		// RootsFile will hold what Go trusts by default.
		notYet := errors.Is(err, fs.ErrNotExist) && filepath.Base(t.CAFile) == RootsFile
		if err != nil && !notYet {
			return nil, err
		}
	}
	if t.CertFile == "" {
		return config, nil
	}
	cert, err := tls.LoadX509KeyPair(t.CertFile, t.KeyFile)
	config.Certificates = []tls.Certificate{cert}
	return config, err
}

// exchangeLogin sends frp's Login message on stream 1 of a yamux session and returns the version and the refusal in
// the answer, empty if there is none. Sources: frp pkg/msg (message 'o' and '1', eight bytes of length, JSON),
// pkg/auth/token.go (the key), and the yamux specification (frames of twelve bytes and their data).
func exchangeLogin(conn io.ReadWriter, c Config) (version, refusal string, err error) {
	now := time.Now().Unix()
	key := c.Token.Reveal() // of oidc
	if c.AuthMethod != "oidc" {
		key = fmt.Sprintf("%x", md5.Sum([]byte(key+strconv.FormatInt(now, 10)))) //nolint:gosec // see above
	}
	login, _ := json.Marshal(map[string]any{ // fails for none of these types
		"version": "0.0.0", "hostname": "login-check", "user": c.User, "timestamp": now,
		"privilege_key": key, "metas": c.Metadatas,
	})
	const typeData, flagSYN, streamID, messageHeader = 0, 1, 1, 9
	frame := []byte{0, typeData, 0, flagSYN, 0, 0, 0, streamID}
	frame = binary.BigEndian.AppendUint32(frame, uint32(messageHeader+len(login)))
	frame = binary.BigEndian.AppendUint64(append(frame, 'o'), uint64(len(login)))
	if _, err := conn.Write(append(frame, login...)); err != nil {
		return "", "", err
	}

	var header [12]byte
	for header[1] != typeData || binary.BigEndian.Uint32(header[8:]) == 0 { // window updates, pings and the like
		if _, err := io.ReadFull(conn, header[:]); err != nil {
			return "", "", err
		}
	}
	// frps writes its answer at once, so yamux puts it into one frame.
	var message [messageHeader]byte
	if _, err := io.ReadFull(conn, message[:]); err != nil {
		return "", "", err
	}
	length := binary.BigEndian.Uint64(message[1:])
	if message[0] != '1' || length > 1<<16 {
		return "", "", errors.New("it does not speak frp")
	}
	var answer struct{ Version, Error string }
	err = json.NewDecoder(io.LimitReader(conn, int64(length))).Decode(&answer)
	return answer.Version, answer.Error, err
}

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
		"Sec-Websocket-Key": {"AAAAAAAAAAAAAAAAAAAAAA=="},
	}}, http.StatusSwitchingProtocols)
}

// Write sends a binary frame. Its mask, which a client must name, is zero. Source: RFC 6455, 5.2.
func (w *webSocket) Write(p []byte) (int, error) {
	if len(p) > 1<<16-1 {
		return 0, errors.New("too long for a frame")
	}
	frame := binary.BigEndian.AppendUint16([]byte{0x82, 0x80 | 126}, uint16(len(p)))
	frame = append(frame, 0, 0, 0, 0)
	n, err := w.Conn.Write(append(frame, p...))
	return max(0, n-len(frame)), err
}

// Read returns bytes of binary frames, and skips all other frames.
func (w *webSocket) Read(p []byte) (int, error) {
	for w.left == 0 {
		var header [2]byte
		_, err := io.ReadFull(w.reader, header[:])
		size := make([]byte, 8) // of the payload: 7 bits, or 2 or 8 bytes after them
		size[7] = header[1] & 0x7f
		if long := map[byte]int{126: 2, 127: 8}[size[7]]; err == nil && long > 0 {
			_, err = io.ReadFull(w.reader, size[8-long:])
		}
		w.left = binary.BigEndian.Uint64(size)
		if control := header[0]&0x08 != 0; err == nil && control {
			_, err = w.reader.Discard(int(w.left))
			w.left = 0
		}
		if err != nil {
			return 0, err
		}
	}
	n, err := w.reader.Read(p[:min(uint64(len(p)), w.left)])
	w.left -= uint64(n)
	return n, err
}
