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

// ErrRefused means that frps has answered, and refuses the login. What to do depends on who gave the token.
var ErrRefused = errors.New("refuses the login")

// Settings, as messages name them, and what to do with them.
const (
	caFile     = "frp.tls.ca_file (PIPEOPS_FRP_TLS_CA_FILE)"
	certFiles  = "frp.tls.cert_file (PIPEOPS_FRP_TLS_CERT_FILE) and frp.tls.key_file (PIPEOPS_FRP_TLS_KEY_FILE)"
	proxyURL   = "frp.proxy_url (PIPEOPS_FRP_PROXY_URL)"
	serverAddr = "frp.server_addr (PIPEOPS_FRP_SERVER_ADDR)"
	serverName = "frp.tls.server_name (PIPEOPS_FRP_TLS_SERVER_NAME)"
	serverPort = "frp.server_port (PIPEOPS_FRP_SERVER_PORT)"
	unverified = "frp.tls.insecure_skip_verify (PIPEOPS_FRP_TLS_INSECURE_SKIP_VERIFY)"

	checkPort = "check that " + serverPort + " is frps's bindPort"
	checkTLS  = checkPort + " and that it runs; if frps asks for a client certificate, check " + certFiles
)

// Login connects and logs in to frps as frpc does (HTTP proxy, TCP, TLS, WebSocket, login), and disconnects. It
// returns the version of frps. It exists because frpc reports the reason for a failed login only in its log. nil means
// that frps accepts the login; the error says what to do, unless it is ErrRefused. For protocols quic and kcp, and for
// proxies other than HTTP, it is ErrUnsupported. Login does not know frpc's environment, where http_proxy would be a
// proxy.
func Login(ctx context.Context, c Config) (version string, err error) {
	addr := net.JoinHostPort(c.ServerAddr, strconv.Itoa(c.ServerPort))
	proxy, err := url.Parse(c.ProxyURL.Reveal())
	if err != nil || !slices.Contains([]string{"", "http"}, proxy.Scheme) || c.Protocol == "quic" || c.Protocol == "kcp" {
		return "", fmt.Errorf("frpc is not logged in to frps at %s: %w", addr, ErrUnsupported)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	const noWebSocket = "frps at %s does not open a WebSocket: %w: " + checkPort + ", and what stands between"
	next, hop := addr, "frps at "+addr
	advice := "check " + serverAddr + " and " + serverPort + ", and that the network allows TCP connections to it"
	if proxy.Host != "" {
		next, hop, advice = proxy.Host, "the proxy on the way to frps, "+proxy.Host+",", "check "+proxyURL
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", next)
	if err != nil {
		return "", fmt.Errorf("%s cannot be reached: %w: %s", hop, err, advice)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if proxy.Host != "" {
		if err := connect(conn, proxy, addr); err != nil {
			return "", fmt.Errorf("the proxy at %s does not connect to frps at %s: %w: check "+proxyURL+
				", and what the proxy allows", proxy.Host, addr, err)
		}
	}
	if c.Protocol == "websocket" {
		if conn, err = openWebSocket(conn, addr); err != nil {
			return "", fmt.Errorf(noWebSocket, addr, err)
		}
	}
	tlsConfig, err := c.TLS.clientConfig(c.ServerAddr)
	if err != nil {
		return "", fmt.Errorf("files for TLS with frps: %w: check "+caFile+", "+certFiles, err)
	}
	conn = tls.Client(conn, tlsConfig)
	err = conn.(*tls.Conn).HandshakeContext(ctx)
	switch rejected := tlsutil.Explain(err, caFile, serverName); {
	case err == nil:
	case rejected != nil && rejected.Nameless():
		return "", fmt.Errorf("frps at %s presents the certificate that frps makes for itself, which nobody can verify: "+
			"give it one (transport.tls.certFile and keyFile in frps.toml) and set "+caFile+" to its authority, "+
			"or accept any with "+unverified, addr)
	case rejected != nil:
		return "", fmt.Errorf("frps at %s %w", addr, rejected)
	default:
		return "", fmt.Errorf("frps at %s fails the TLS handshake: %w: "+checkTLS, addr, err)
	}
	if c.Protocol == "wss" {
		if conn, err = openWebSocket(conn, tlsConfig.ServerName); err != nil {
			return "", fmt.Errorf(noWebSocket, addr, err)
		}
	}
	version, refusal, err := exchangeLogin(conn, c)
	operation, isNet := errors.AsType[*net.OpError](err)
	switch {
	case isNet && operation.Op == "remote error": // a TLS alert: with TLS 1.3 it comes after the handshake
		err = fmt.Errorf("frps at %s does not accept the agent's client certificate (%w): "+checkTLS, addr, operation.Err)
	case err != nil:
		err = fmt.Errorf("frps at %s does not answer a login: %w: "+checkPort, addr, err)
	case refusal != "":
		err = fmt.Errorf("frps at %s %w: %s", addr, ErrRefused, refusal)
	}
	return version, err
}

// Outdated says why a version of frps should not be used. It is empty for other versions.
func Outdated(version string) string {
	var minor int
	if n, _ := fmt.Sscanf(version, "0.%d", &minor); n == 1 && minor < 71 {
		return "frps before 0.71 may never complete the login of an agent whose connection has broken (frp #5391): update it"
	}
	return ""
}

func (t TLS) clientConfig(serverAddr string) (config *tls.Config, err error) {
	config = &tls.Config{ServerName: cmp.Or(t.ServerName, serverAddr), MinVersion: tls.VersionTLS12}
	config.InsecureSkipVerify = t.InsecureSkipVerify // bootstrap warns of it
	if t.CAFile != "" {
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
