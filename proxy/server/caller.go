package server

import (
	"net"
	"net/http"
	"net/netip"
	"strings"

	"github.com/pipeops/vm-agent/proxy/inbound"
)

// caller returns the address of the request's sender: that of frpc's PROXY header, which tunnels of type https and tcp
// have, or the last of X-Forwarded-For, which can be trusted because frps appends it.
func caller(r *http.Request) string {
	if !inbound.From(r.Context()).Proxied() {
		if from := forwardedFor(r); from != "" {
			return from
		}
	}
	host, _, _ := net.SplitHostPort(r.RemoteAddr)
	return host
}

// forwardedFor returns the last address of X-Forwarded-For, empty if there is none.
func forwardedFor(r *http.Request) string {
	list := strings.Join(r.Header.Values("X-Forwarded-For"), ",")
	addr, err := netip.ParseAddr(strings.TrimSpace(list[strings.LastIndexByte(list, ',')+1:]))
	if err != nil {
		return ""
	}
	return addr.WithZone("").String()
}
