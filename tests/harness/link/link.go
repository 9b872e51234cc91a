// Package link joins two network namespaces by an IP link with a delay, a loss and a rate, as netem does in kernels
// that have it. TCP and QUIC control congestion on it as on a real path. It needs root.
package link

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Options are the properties of a link, the same in both directions. The zero value is a link without any.
type Options struct {
	RTT       time.Duration // a packet is on its way for half of it
	Loss      float64       // probability that a packet vanishes; the sequence is the same each time
	MaxPacket int           // bytes; larger packets vanish and nobody is told. 0: none does
	Rate      int           // bytes a second; packets that would queue for longer than RTT (and 10 ms) vanish. 0: no limit
}

// Device is the name of the link's device in both namespaces.
const Device = "link0"

const (
	mtu      = 1500
	queueing = 10 * time.Millisecond // the queue of a link with a rate and no delay
)

// Link is a running link. It ends with this process, in whatever way: nothing else holds its devices and namespaces.
type Link struct {
	A, B    *End
	options atomic.Pointer[Options]
	running sync.WaitGroup
}

// End is a network namespace with loopback and one end of a link, and no other way out.
type End struct {
	IP string

	namespace, tun *os.File
}

// New makes a link.
func New(options Options) (_ *Link, err error) { return newLink(options, false) }

// Here makes a link whose end B is in this process's network namespace, which must be the process's own.
func Here(options Options) (_ *Link, err error) { return newLink(options, true) }

func newLink(options Options, here bool) (_ *Link, err error) {
	l := &Link{A: &End{IP: "198.18.0.1"}, B: &End{IP: "198.18.0.2"}} // no conflict: nothing leads out of the namespaces
	l.Set(options)
	defer func() {
		if err != nil {
			l.Close()
		}
	}()
	if err := l.A.open(l.B.IP, unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	flags := unix.CLONE_NEWNET
	if here {
		flags = 0
	}
	if err := l.B.open(l.A.IP, flags); err != nil {
		return nil, err
	}
	l.carry(l.B.tun, l.A.tun, 1)
	l.carry(l.A.tun, l.B.tun, 2)
	return l, nil
}

// Set changes the properties of a running link.
func (l *Link) Set(options Options) { l.options.Store(&options) }

// Close removes the devices at once, and the namespaces as soon as no process and no socket is in them.
func (l *Link) Close() {
	for _, e := range []*End{l.A, l.B} {
		_ = e.tun.Close()
		_ = e.namespace.Close()
	}
	l.running.Wait()
}

// Do runs f in the namespace. Processes that f starts and sockets that it opens stay there; goroutines do not.
func (e *End) Do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(e.namespace.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter the namespace of %s: %w", e.IP, err)
		}
		return f()
	})
}

// onThread runs f on a thread that ends afterwards, because f leaves it in another namespace.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: so the thread ends with the goroutine
		done <- f()
	}()
	return <-done
}

// open makes the namespace, or with flags 0 uses this process's, and makes the device, whose packets for peer can then
// be read from tun.
func (e *End) open(peer string, flags int) error {
	err := onThread(func() (err error) {
		if err = unix.Unshare(flags); err == nil {
			e.namespace, err = os.Open("/proc/thread-self/ns/net")
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("make a network namespace: %w: run as root", err)
	}
	return e.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open /dev/net/tun: %w", err)
		}
		request, err := unix.NewIfreq(Device)
		if err == nil {
			request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
		}
		e.tun = os.NewFile(uintptr(fd), Device) // only now: the runtime polls no TUN device that has no interface yet
		if err != nil {
			return fmt.Errorf("make a TUN device: %w", err)
		}
		// The device's queue holds what a sender has in flight: a packet is lost on the link only.
		out, err := exec.Command("sh", "-ec", `ip link set lo up
			ip address add "$1" peer "$2" dev "$3"
			ip link set "$3" mtu "$4" txqueuelen 20000 up`, "sh", e.IP, peer, Device, fmt.Sprint(mtu)).CombinedOutput()
		if err != nil {
			return fmt.Errorf("configure the device of %s: %w: %s", e.IP, err, out)
		}
		return nil
	})
}

// packet is a packet on its way.
type packet struct {
	due  time.Time
	data []byte
}

// carry carries packets from src to dst until src is closed.
func (l *Link) carry(dst io.Writer, src io.Reader, seed uint64) {
	underway := make(chan packet, 1<<15)
	l.running.Go(func() {
		defer close(underway)
		random := rand.New(rand.NewPCG(seed, seed))
		var free time.Time // when the link has sent what came before
		for buffer := make([]byte, mtu); ; {
			n, err := src.Read(buffer)
			if err != nil {
				return
			}
			now, options := time.Now(), l.options.Load()
			if options.MaxPacket > 0 && n > options.MaxPacket || random.Float64() < options.Loss ||
				free.Sub(now) > options.RTT+queueing {
				continue
			}
			if now.After(free) {
				free = now
			}
			if options.Rate > 0 {
				free = free.Add(time.Duration(n) * time.Second / time.Duration(options.Rate))
			}
			underway <- packet{free.Add(options.RTT / 2), bytes.Clone(buffer[:n])}
		}
	})
	l.running.Go(func() {
		for p := range underway {
			SleepUntil(p.due)
			_, _ = dst.Write(p.data) // it is lost if the other end is closed
		}
	})
}

// SleepUntil sleeps with a precision of a tenth of a millisecond, because Go's timers are late by up to a whole one.
func SleepUntil(due time.Time) {
	for left := time.Until(due); left > 0; left = time.Until(due) {
		ts := unix.NsecToTimespec(int64(left))
		_ = unix.Nanosleep(&ts, nil) // a signal may end it early
	}
}
