package main

import (
	"context"
	"net"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/link"
)

// startDelay relays connections to target over a link with the round-trip time rtt and no limit of bandwidth. As over
// a real link, target sees a connection after one and a half round trips, together with its first bytes. It ends with
// ctx.
func startDelay(ctx context.Context, target string, rtt time.Duration) (net.Addr, error) {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				made := time.Now().Add(rtt)
				sent := late(conn, made, rtt/2)
				link.SleepUntil(made.Add(rtt / 2))
				server, err := (&net.Dialer{}).DialContext(ctx, "tcp", target)
				if err != nil {
					_ = conn.Close()
					return
				}
				go carry(conn, server, late(server, made, rtt/2))
				carry(server, conn, sent)
			}()
		}
	}()
	context.AfterFunc(ctx, func() { _ = listener.Close() })
	return listener.Addr(), nil
}

// part is a part of a stream that is on its way.
type part struct {
	due  time.Time
	data []byte
}

// late reads src to its end. What it reads is due d later, and at the earliest d after from.
func late(src net.Conn, from time.Time, d time.Duration) <-chan part {
	parts := make(chan part, 4096)
	go func() {
		defer close(parts)
		for {
			data := make([]byte, 32<<10)
			n, err := src.Read(data)
			if now := time.Now(); now.After(from) {
				from = now
			}
			parts <- part{from.Add(d), data[:n]}
			if err != nil {
				return
			}
		}
	}()
	return parts
}

// carry writes the parts of src, and then its end, to dst, each when it is due.
func carry(dst, src net.Conn, parts <-chan part) {
	for p := range parts {
		link.SleepUntil(p.due)
		if _, err := dst.Write(p.data); err != nil {
			_ = src.Close() // ends the reader
		}
	}
	_ = dst.Close()
}
