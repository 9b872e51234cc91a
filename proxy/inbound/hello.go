package inbound

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
)

// handshakeRecord is the first byte of every TLS connection (RFC 8446, 5.1), and of no HTTP request.
const handshakeRecord = 0x16

// signature begins a PROXY header. Source: the PROXY protocol, version 2, section 2.2.
const signature = "\r\n\r\n\x00\r\nQUIT\n"

// maxProxyHeader limits in bytes what may follow the first 16: addresses, ports, and further fields.
const maxProxyHeader = 512

// hello reads the PROXY header, if there is one, and does the TLS handshake if the next byte begins one. Else the
// caller speaks plain HTTP: frpc's health check always does, and a lease may change the tunnel's type.
func (c *Conn) hello(config *tls.Config) (net.Conn, error) {
	first, err := c.peek()
	if err == nil && first == signature[0] {
		if err = c.readProxyHeader(); err == nil {
			first, err = c.peek()
		}
	}
	if err != nil {
		return nil, err
	}
	if first != handshakeRecord {
		return c, nil
	}
	conn := tls.Server(c, config)
	return conn, conn.HandshakeContext(context.Background()) // the connection has a deadline
}

// peek returns the next byte, which stays unread.
func (c *Conn) peek() (byte, error) {
	var first [1]byte
	if _, err := io.ReadFull(c, first[:]); err != nil {
		return 0, err
	}
	c.unread = first[:]
	return first[0], nil
}

// readProxyHeader sets the caller's address from the PROXY header that frpc sends for tunnels of type https and tcp.
// Source: the PROXY protocol, version 2, section 2.2.
func (c *Conn) readProxyHeader() error {
	var head [16]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return fmt.Errorf("the PROXY header is incomplete: %w", err)
	}
	length := binary.BigEndian.Uint16(head[14:])
	if !bytes.HasPrefix(head[:], []byte(signature)) || head[12]>>4 != 2 || length > maxProxyHeader {
		return errors.New("not a PROXY header of version 2")
	}
	rest := make([]byte, length)
	if _, err := io.ReadFull(c, rest); err != nil {
		return fmt.Errorf("the PROXY header is incomplete: %w", err)
	}
	if command := head[12] & 0xf; command == 0 { // LOCAL: the connection is the proxy's own
		return nil
	}
	size := map[byte]int{0x11: 4, 0x21: 16}[head[13]] // TCP over IPv4 and IPv6
	if size == 0 || len(rest) < 2*size+4 {
		return errors.New("the PROXY header holds no TCP address")
	}
	addr, _ := netip.AddrFromSlice(rest[:size])
	c.remote = net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(rest[2*size:])))
	c.proxied = true
	return nil
}
