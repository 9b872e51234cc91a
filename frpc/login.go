package frpc

import (
	"bytes"
	"cmp"
	"context"
	"crypto/md5" //nolint:gosec // frp's login is defined with MD5
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/pipeops/vm-agent/frpc/tlsutil"
)

// ErrCannotLogin is for a way to frps that Login cannot go.
var ErrCannotLogin = errors.New("see frpc's log for the reason")

// Login goes the way that frpc takes to frps (HTTP proxy, TCP, TLS, WebSocket, login), hangs up, and returns the
// version of frps. It exists because frpc reports the reason for a failed login only in its log. The error names the
// hop, the cause and the next step; nil means that frps accepts the login. For protocols quic and kcp, and for proxies
// other than HTTP, it is ErrCannotLogin. Login does not know frpc's environment, where http_proxy would be a proxy.
func Login(ctx context.Context, c Config) (version string, err error) {
	addr := net.JoinHostPort(c.ServerAddr, strconv.Itoa(c.ServerPort))
	proxy, err := url.Parse(c.ProxyURL.Reveal())
	if err != nil || !slices.Contains([]string{"", "http"}, proxy.Scheme) || c.Protocol == "quic" || c.Protocol == "kcp" {
		return "", fmt.Errorf("frpc is not logged in to frps at %s: %w", addr, ErrCannotLogin)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()

	next, check := addr, "frps at "+addr+" cannot be reached: %w: check frp.server_addr and frp.server_port, and that the network lets TCP out to it"
	if proxy.Host != "" {
		next, check = proxy.Host, "the proxy on the way to frps, "+proxy.Host+", cannot be reached: %w: check frp.proxy_url (PIPEOPS_FRP_PROXY_URL)"
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", next)
	if err != nil {
		return "", fmt.Errorf(check, err)
	}
	defer func() { _ = conn.Close() }()
	deadline, _ := ctx.Deadline() // in five seconds at most
	_ = conn.SetDeadline(deadline)
	if proxy.Host != "" {
		if err := connect(conn, proxy, addr); err != nil {
			return "", fmt.Errorf("the proxy at %s does not connect to frps at %s: %w: check frp.proxy_url (PIPEOPS_FRP_PROXY_URL), and what the proxy allows", proxy.Host, addr, err)
		}
	}
	noWebSocket := "frps at " + addr + " does not open a WebSocket: %w: check that frp.server_port is frps's bindPort, and what stands between"
	if c.Protocol == "websocket" {
		if conn, err = openWebSocket(conn, addr); err != nil {
			return "", fmt.Errorf(noWebSocket, err)
		}
	}
	tlsConfig, err := c.TLS.clientConfig(c.ServerAddr)
	if err != nil {
		return "", err
	}
	conn = tls.Client(conn, tlsConfig)
	if err := conn.(*tls.Conn).HandshakeContext(ctx); err != nil {
		return "", fmt.Errorf("frps at %s %w", addr, explainHandshake(err))
	}
	if c.Protocol == "wss" {
		if conn, err = openWebSocket(conn, tlsConfig.ServerName); err != nil {
			return "", fmt.Errorf(noWebSocket, err)
		}
	}
	version, refusal, err := exchangeLogin(conn, c)
	if alert := tls.AlertError(0); errors.As(err, &alert) { // with TLS 1.3 it comes after the handshake
		return "", fmt.Errorf("frps at %s does not accept the agent's client certificate (%w): check frp.tls.cert_file and frp.tls.key_file (PIPEOPS_FRP_TLS_CERT_FILE, _KEY_FILE)", addr, alert)
	}
	if err != nil {
		return "", fmt.Errorf("frps at %s does not answer a login: %w: check that frp.server_port is frps's bindPort", addr, err)
	}
	if refusal != "" {
		return version, fmt.Errorf("frps at %s refuses the login: %s: check frp.token, or restart the pod to get a new lease from the control plane", addr, refusal)
	}
	return version, nil
}

// Outdated says why a version of frps should not be used; empty if it may.
func Outdated(version string) string {
	var major, minor int
	if n, _ := fmt.Sscanf(version, "%d.%d", &major, &minor); n == 2 && major == 0 && minor < 71 {
		return "frps before 0.71 may never complete the login of an agent whose connection has broken (frp #5391): update it"
	}
	return ""
}

// explainHandshake returns what went wrong with TLS and what to do.
func explainHandshake(err error) error {
	var failed *tls.CertificateVerificationError
	if errors.As(err, &failed) {
		if c := failed.UnverifiedCertificates[0]; c.Subject.String() == "" && len(c.DNSNames)+len(c.IPAddresses) == 0 {
			return errors.New("presents the certificate that frps makes for itself, which nobody can verify: give it one (transport.tls.certFile and keyFile in frps.toml) and set frp.tls.ca_file (PIPEOPS_FRP_TLS_CA_FILE) to its authority, or accept any with frp.tls.insecure_skip_verify (PIPEOPS_FRP_TLS_INSECURE_SKIP_VERIFY)")
		}
		return tlsutil.Explain(err, "frp.tls.ca_file (PIPEOPS_FRP_TLS_CA_FILE)", "frp.tls.server_name (PIPEOPS_FRP_TLS_SERVER_NAME)")
	}
	if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
		return fmt.Errorf("takes the connection and does not answer: %w: check that it runs, and what stands between", err)
	}
	return fmt.Errorf("does not speak TLS as it should: %w: check that frp.server_port (PIPEOPS_FRP_SERVER_PORT) is frps's bindPort, and the client certificate if it asks for one", err)
}

func (t TLS) clientConfig(serverAddr string) (*tls.Config, error) {
	config := &tls.Config{ServerName: cmp.Or(t.ServerName, serverAddr), MinVersion: tls.VersionTLS12}
	config.InsecureSkipVerify = t.InsecureSkipVerify // bootstrap warns of it
	if t.CAFile != "" {
		var err error
		config.RootCAs, err = tlsutil.CertPool(t.CAFile)
		notYet := errors.Is(err, fs.ErrNotExist) && filepath.Base(t.CAFile) == RootsFile // it will hold what Go trusts by itself
		if err != nil && !notYet {
			return nil, fmt.Errorf("frp.tls.ca_file (PIPEOPS_FRP_TLS_CA_FILE): %w", err)
		}
	}
	if t.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(t.CertFile, t.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("frp.tls.cert_file and key_file: %w", err)
		}
		config.Certificates = []tls.Certificate{cert}
	}
	return config, nil
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
	login, err := json.Marshal(map[string]any{
		"version": "0.0.0", "hostname": "login-check", "user": c.User, "timestamp": now,
		"privilege_key": key, "metas": c.Metadatas,
	})
	if err != nil {
		return "", "", err
	}
	message := binary.BigEndian.AppendUint64([]byte{'o'}, uint64(len(login)))
	message = append(message, login...)

	const typeData, flagSYN, streamID = 0, 1, 1
	frame := []byte{0, typeData, 0, flagSYN}
	frame = binary.BigEndian.AppendUint32(frame, streamID)
	frame = binary.BigEndian.AppendUint32(frame, uint32(len(message)))
	if _, err := conn.Write(append(frame, message...)); err != nil {
		return "", "", err
	}

	const limit = 1 << 16 // bytes of answer
	var answer bytes.Buffer
	for {
		var header [12]byte
		if _, err := io.ReadFull(conn, header[:]); err != nil {
			return "", "", err
		}
		if header[1] != typeData {
			continue // window updates, pings and the like carry no data
		}
		length := int64(binary.BigEndian.Uint32(header[8:]))
		if length > int64(limit-answer.Len()) {
			return "", "", errors.New("its answer is too long")
		}
		if _, err := io.CopyN(&answer, conn, length); err != nil {
			return "", "", err
		}
		data := answer.Bytes()
		if len(data) < 9 {
			continue
		}
		if data[0] != '1' {
			return "", "", errors.New("it does not speak frp")
		}
		size := binary.BigEndian.Uint64(data[1:])
		if uint64(len(data)-9) < size {
			continue
		}
		var resp struct{ Version, Error string }
		err := json.Unmarshal(data[9:9+size], &resp)
		return resp.Version, resp.Error, err
	}
}
