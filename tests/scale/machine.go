package main

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

// usage is what frps has used: bytes now, and seconds of a core so far.
type usage struct{ rss, cpu float64 }

func (f *fleet) usage() (usage, error) {
	pid := f.cp.FrpsPid()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return usage{}, err
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(after)
	user, _ := strconv.ParseFloat(fields[11], 64) // proc(5): utime and stime, in hundredths of a second
	system, _ := strconv.ParseFloat(fields[12], 64)
	rss, err := process.Memory(pid, "VmRSS")
	return usage{rss * 1e6, (user + system) / 100}, err
}

// cost returns the seconds of a core since then.
func (f *fleet) cost(since usage) float64 {
	now, err := f.usage()
	if err != nil {
		return 0
	}
	return now.cpu - since.cpu
}

// either accepts TLS behind a PROXY header, and plain HTTP.
type either struct {
	net.Listener
	tls *tls.Config
}

func (e *either) Accept() (net.Conn, error) {
	conn, err := e.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &sorted{Conn: conn, tls: e.tls}, nil
}

// sorted becomes a TLS connection if a PROXY header comes first.
type sorted struct {
	net.Conn
	tls    *tls.Config
	sorted bool
}

type buffered struct {
	net.Conn
	r *bufio.Reader
}

func (b buffered) Read(p []byte) (int, error) { return b.r.Read(p) }

func (s *sorted) Read(p []byte) (int, error) {
	if !s.sorted {
		s.sorted = true
		r := bufio.NewReaderSize(s.Conn, 512)
		s.Conn = buffered{s.Conn, r}
		const signature = "\r\n\r\n\x00\r\nQUIT\n"
		if start, err := r.Peek(16); err == nil && strings.HasPrefix(string(start), signature) {
			length := 16 + int(start[14])<<8 + int(start[15])
			if _, err := io.CopyN(io.Discard, r, int64(length)); err != nil {
				return 0, err
			}
			s.Conn = tls.Server(s.Conn, s.tls)
		}
	}
	return s.Conn.Read(p)
}
