package e2e

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/link"
)

// The tests of package link are here because it needs root.

func TestLinkDelaysEveryPacketByHalfOfTheRoundTrip(t *testing.T) {
	took := over(t, link.Options{RTT: 100 * time.Millisecond}, 100, 100)
	if len(took) != 100 {
		t.Errorf("%d of 100 packets arrived", len(took))
	}
	if least := slices.Min(took); least < 50*time.Millisecond || least > 90*time.Millisecond {
		t.Errorf("the fastest packet took %s, want little more than 50 ms", least)
	}
}

func TestLinkLosesItsShareOfThePackets(t *testing.T) {
	// The rate spares the receiver's buffer.
	took := over(t, link.Options{RTT: time.Second, Loss: 0.1, Rate: 1_000_000}, 2000, 100)
	if n := len(took); n < 1730 || n > 1870 { // 1800 and five standard deviations
		t.Errorf("%d of 2000 packets arrived, want about 1800", n)
	}
}

func TestLinkSendsNoFasterThanItsRate(t *testing.T) {
	const n, size, rate = 100, 1000, 1_000_000
	took := over(t, link.Options{RTT: time.Second, Rate: rate}, n, size)
	if len(took) != n {
		t.Errorf("%d of %d packets arrived", len(took), n)
	}
	if last := took[len(took)-1]; last < time.Second/2+n*size*time.Second/rate*9/10 {
		t.Errorf("the last packet came after %s", last)
	}
	// What would wait for longer than the queue holds is lost.
	if n := len(over(t, link.Options{Rate: rate}, 1000, size)); n > 500 {
		t.Errorf("%d of 1000 packets passed a full queue", n)
	}
}

func TestLinkLosesPacketsThatAreTooLarge(t *testing.T) {
	const headers = 28 // of IP and UDP
	for size, want := range map[int]int{1400 - headers: 5, 1401 - headers: 0} {
		if n := len(over(t, link.Options{MaxPacket: 1400}, 5, size)); n != want {
			t.Errorf("%d of 5 packets with %d bytes arrived, want %d", n, size+headers, want)
		}
	}
}

// over sends packets over a link, and returns how long those that arrived were on their way, in their order.
func over(t *testing.T, options link.Options, n, size int) (took []time.Duration) {
	t.Helper()
	l := open(t, options)
	defer l.Close()
	var receiver net.PacketConn
	var sender net.Conn
	err := l.B.Do(func() (err error) {
		receiver, err = net.ListenPacket("udp", l.B.IP+":0")
		return err
	})
	if err == nil {
		err = l.A.Do(func() (err error) {
			sender, err = net.Dial("udp", receiver.LocalAddr().String())
			return err
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = receiver.Close(), sender.Close() }()
	begin := time.Now()
	go func() {
		packet := make([]byte, size)
		for range n {
			binary.BigEndian.PutUint64(packet, uint64(time.Since(begin)))
			_, _ = sender.Write(packet)
		}
	}()
	buffer := make([]byte, size)
	for {
		_ = receiver.SetReadDeadline(time.Now().Add(options.RTT + 500*time.Millisecond)) // then no more will come
		if _, _, err := receiver.ReadFrom(buffer); err != nil {
			return took
		}
		took = append(took, time.Since(begin)-time.Duration(binary.BigEndian.Uint64(buffer)))
	}
}

func open(t *testing.T, options link.Options) *link.Link {
	t.Helper()
	l, err := link.New(options)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestClosedLinkLeavesNothing looks for what could keep a namespace, and the device in it: threads, files and mounts.
func TestClosedLinkLeavesNothing(t *testing.T) {
	l := open(t, link.Options{})
	var namespaces []string
	for _, end := range []*link.End{l.A, l.B} {
		err := end.Do(func() error {
			name, err := os.Readlink("/proc/thread-self/ns/net")
			namespaces = append(namespaces, name)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	kept := func() error {
		for _, pattern := range []string{"/proc/[0-9]*/fd/*", "/proc/[0-9]*/task/*/ns/net"} {
			links, err := filepath.Glob(pattern)
			if err != nil {
				return err
			}
			for _, path := range links {
				if name, _ := os.Readlink(path); slices.Contains(namespaces, name) {
					return fmt.Errorf("%s is %s", path, name)
				}
			}
		}
		return nil
	}
	if kept() == nil {
		t.Error("the namespaces of a running link are not found")
	}
	l.Close()
	eventually(t, kept) // a thread may need a moment to end
}
