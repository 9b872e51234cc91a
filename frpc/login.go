package frpc

import (
	"bytes"
	"context"
	"crypto/md5" //nolint:gosec // frp's login is defined with MD5
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"
)

// ErrCannotLogin is for a way to frps that Login cannot walk.
var ErrCannotLogin = errors.New("see frpc's log for the reason")

// Login walks the way that frpc takes to frps (TCP, TLS, login) and hangs up. It exists because frpc tells
// why it is not logged in to nobody but its log. The error names the hop, the cause and the next step; nil
// means that frps accepts the login. It speaks for protocol tcp without a proxy only: for the others it
// returns ErrCannotLogin. It does not know frpc's environment, where http_proxy would be
// such a proxy.
func Login(ctx context.Context, c Config) error {
	addr := net.JoinHostPort(c.ServerAddr, strconv.Itoa(c.ServerPort))
	if c.Protocol != "tcp" || c.ProxyURL != "" {
		return fmt.Errorf("frpc is not logged in to frps at %s: %w", addr, ErrCannotLogin)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()

	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("frps at %s cannot be reached: %w: check frp.server_addr and frp.server_port, and that the network lets TCP out to it", addr, err)
	}
	defer func() { _ = conn.Close() }()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}

	tlsConfig, err := c.TLS.clientConfig(c.ServerAddr)
	if err != nil {
		return err
	}
	tlsConn := tls.Client(conn, tlsConfig)
	if err := tlsConn.HandshakeContext(ctx); err != nil {
		if explained := ExplainTLS(err, "frp.tls.ca_file (PIPEOPS_FRP_TLS_CA_FILE)", "frp.tls.server_name (PIPEOPS_FRP_TLS_SERVER_NAME)"); explained != nil {
			return fmt.Errorf("frps at %s %w", addr, explained)
		}
		if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
			return fmt.Errorf("frps at %s takes the connection and does not answer: %w: check that it runs, and what stands between", addr, err)
		}
		return fmt.Errorf("frps at %s does not speak TLS as it should: %w: check that frp.server_port (PIPEOPS_FRP_SERVER_PORT) is frps's bindPort, and the client certificate if it asks for one", addr, err)
	}
	refusal, err := exchangeLogin(tlsConn, c)
	if alert := tls.AlertError(0); errors.As(err, &alert) { // with TLS 1.3 it comes after the handshake
		return fmt.Errorf("frps at %s does not accept the agent's client certificate (%w): check frp.tls.cert_file and frp.tls.key_file (PIPEOPS_FRP_TLS_CERT_FILE, _KEY_FILE)", addr, alert)
	}
	if err != nil {
		return fmt.Errorf("frps at %s does not answer a login: %w: check that frp.server_port is frps's bindPort", addr, err)
	}
	if refusal != "" {
		return fmt.Errorf("frps at %s refuses the login: %s: check frp.token, or restart the pod to get a new lease from the control plane", addr, refusal)
	}
	return nil
}

func (t TLS) clientConfig(serverAddr string) (*tls.Config, error) {
	config := &tls.Config{ServerName: t.ServerName, MinVersion: tls.VersionTLS12}
	if config.ServerName == "" {
		config.ServerName = serverAddr
	}
	if t.CAFile == "" {
		config.InsecureSkipVerify = true // as frpc does; bootstrap warns of it
	} else {
		var err error
		if config.RootCAs, err = CertPool(t.CAFile); err != nil {
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

// exchangeLogin sends frp's Login message on stream 1 of a yamux session and returns the refusal in the
// answer, empty if there is none. Sources: frp pkg/msg (message 'o' and '1', eight bytes of length, JSON),
// pkg/auth/token.go (the key), and the yamux specification (frames of twelve bytes and their data).
func exchangeLogin(conn io.ReadWriter, c Config) (refusal string, err error) {
	now := time.Now().Unix()
	key := c.Token.Reveal() // of oidc
	if c.AuthMethod != "oidc" {
		sum := md5.Sum([]byte(key + strconv.FormatInt(now, 10))) //nolint:gosec // see above
		key = hex.EncodeToString(sum[:])
	}
	login, err := json.Marshal(map[string]any{
		"version": "0.0.0", "hostname": "login-check", "user": c.User, "timestamp": now,
		"privilege_key": key, "metas": c.Metadatas,
	})
	if err != nil {
		return "", err
	}
	message := binary.BigEndian.AppendUint64([]byte{'o'}, uint64(len(login)))
	message = append(message, login...)

	const typeData, flagSYN, streamID = 0, 1, 1
	frame := []byte{0, typeData, 0, flagSYN}
	frame = binary.BigEndian.AppendUint32(frame, streamID)
	frame = binary.BigEndian.AppendUint32(frame, uint32(len(message)))
	if _, err := conn.Write(append(frame, message...)); err != nil {
		return "", err
	}

	const limit = 1 << 16 // bytes of answer
	var answer bytes.Buffer
	for {
		var header [12]byte
		if _, err := io.ReadFull(conn, header[:]); err != nil {
			return "", err
		}
		if header[1] != typeData {
			continue // window updates, pings and the like carry no data
		}
		length := int64(binary.BigEndian.Uint32(header[8:]))
		if length > int64(limit-answer.Len()) {
			return "", errors.New("its answer is too long")
		}
		if _, err := io.CopyN(&answer, conn, length); err != nil {
			return "", err
		}
		data := answer.Bytes()
		if len(data) < 9 {
			continue
		}
		if data[0] != '1' {
			return "", errors.New("it does not speak frp")
		}
		size := binary.BigEndian.Uint64(data[1:])
		if uint64(len(data)-9) < size {
			continue
		}
		var resp struct {
			Error string `json:"error"`
		}
		err := json.Unmarshal(data[9:9+size], &resp)
		return resp.Error, err
	}
}
