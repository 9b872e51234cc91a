// Package process runs the real programs that the tests need. It leaves nothing behind, neither when a test fails nor
// when the process that started them is killed.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// stopTimeout bounds how long Stop waits after SIGTERM before it kills.
const stopTimeout = 10 * time.Second

// reaper waits for the end of its standard input. That comes when Close is called, or when the process that holds the
// other end dies in whatever way. Then it kills the processes that are left and removes the directory, what is
// mounted there, and the control groups.
const reaper = `trap '' INT TERM HUP
cat >/dev/null
for f in "$1"/pids/*; do [ -f "$f" ] && kill -9 "${f##*/}" 2>/dev/null; done
awk -v dir="$1/" 'index($2, dir) == 1 {print $2}' /proc/self/mounts | xargs -r umount -l
remove() { rm -rf "$1" && find /sys/fs/cgroup -maxdepth 2 -name "${1##*/}.*" -delete; } 2>/dev/null
# Until a killed process is gone, it may still write, and is in its control group.
remove "$1" || { sleep 1; remove "$1"; }`

// Group is a set of processes and the directory that they work in. Close ends both.
type Group struct {
	dir    string
	reaper *exec.Cmd
	alive  io.Closer

	mu        sync.Mutex
	processes []*Process
}

// NewGroup makes a group with a fresh directory.
func NewGroup() (*Group, error) {
	dir, err := os.MkdirTemp("", "pipeops-")
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(filepath.Join(dir, "pids"), 0o700); err != nil {
		return nil, err
	}
	g := &Group{dir: dir, reaper: exec.Command("sh", "-c", reaper, "reaper", dir)}
	g.reaper.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // so that Ctrl-C does not reach it
	if g.alive, err = g.reaper.StdinPipe(); err != nil {
		return nil, err
	}
	if err := g.reaper.Start(); err != nil {
		_ = os.RemoveAll(dir)
		return nil, fmt.Errorf("start the reaper: %w", err)
	}
	return g, nil
}

// Dir returns the group's directory, mode 0700.
func (g *Group) Dir() string { return g.dir }

// Mkdir makes a directory in the group's and returns its path.
func (g *Group) Mkdir(name string) (string, error) {
	path := filepath.Join(g.dir, name)
	return path, os.MkdirAll(path, 0o700)
}

// Close stops all processes, the last started first, and removes the directory.
func (g *Group) Close() {
	g.mu.Lock()
	processes := g.processes
	g.processes = nil
	g.mu.Unlock()
	for _, p := range slices.Backward(processes) {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(200 * time.Millisecond):
			p.Stop() // a second signal, which ends a drain
		}
	}
	_ = g.alive.Close()
	_ = g.reaper.Wait()
}

// Process is a running program.
type Process struct {
	group *Group
	name  string
	cmd   *exec.Cmd
	env   []string
	log   string
	done  chan struct{}
}

// Start runs binary. Its environment is PATH, HOME and env only, so that the caller's environment does not decide how
// a test goes. Its output goes to a file.
func (g *Group) Start(name string, env []string, binary string, args ...string) (*Process, error) {
	p := &Process{group: g, name: name, log: filepath.Join(g.dir, name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	p.cmd, p.env = exec.Command(binary, args...), env
	p.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + g.dir}, env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	// Ctrl-C must reach only us, so that we stop the processes in order.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	pidFile := filepath.Join(g.dir, "pids", strconv.Itoa(p.Pid()))
	err = os.WriteFile(pidFile, nil, 0o600)
	go func() {
		_ = p.cmd.Wait()       // the result is in ProcessState
		_ = os.Remove(pidFile) // the pid may be reused from now on
		close(p.done)
	}()
	if err != nil {
		p.Kill()
		return nil, err
	}
	g.mu.Lock()
	g.processes = append(g.processes, p)
	g.mu.Unlock()
	return p, nil
}

// Again starts the same program again, with the same log.
func (p *Process) Again() (*Process, error) {
	return p.group.Start(p.name, p.env, p.cmd.Path, p.cmd.Args[1:]...)
}

// Pid returns the process's id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done returns a channel that is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// ExitCode waits for the end and returns the exit code, -1 after a signal.
func (p *Process) ExitCode() int {
	<-p.done
	return p.cmd.ProcessState.ExitCode()
}

// Stop sends SIGTERM, kills the process after stopTimeout, and waits for its end.
func (p *Process) Stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(stopTimeout):
		p.Kill()
	}
}

// Kill kills the process and waits for its end.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Log returns everything that the process has printed.
func (p *Process) Log() string {
	data, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// Failed returns an error for a process that ended too early, with the end of its log.
func (p *Process) Failed() error {
	log := []byte(p.Log())
	if lines := bytes.Split(bytes.TrimSpace(log), []byte("\n")); len(lines) > 20 {
		log = bytes.Join(lines[len(lines)-20:], []byte("\n"))
	}
	return fmt.Errorf("%s ended early (%s); the end of its log:\n%s", p.name, p.cmd.ProcessState, log)
}

// ReplaceFile writes a file in one step, as the kubelet does with a Secret's.
func ReplaceFile(path, text string) error {
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// Listening returns nil if an address accepts connections.
func Listening(address string) error {
	conn, err := net.DialTimeout("tcp", address, time.Second)
	if err != nil {
		return err
	}
	return conn.Close()
}

// lastPort is the last port of FreePort. It starts at random, so that two programs that test at the same time rarely
// collide.
var lastPort atomic.Uint32

func init() { lastPort.Store(rand.Uint32()) }

// FreePort returns a port of 127.0.0.1 that nobody listens on, a different one each time, because a caller that needs
// several does not listen on them yet (frps with the same port twice starts without an error and accepts no agents).
// The port lies below the kernel's range for outgoing connections, so that none of those takes it before its user
// listens.
func FreePort() (int, error) {
	for range 1000 {
		port := 10000 + int(lastPort.Add(1)%20000)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			return port, l.Close()
		}
	}
	return 0, errors.New("no free port on 127.0.0.1")
}

// FreeAddr returns 127.0.0.1 with a port of FreePort.
func FreeAddr() (string, error) {
	port, err := FreePort()
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), err
}

// Root returns the top of the repository, searched upwards from the working directory.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.work")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("not inside the repository: no go.work above the working directory")
		}
	}
}

// PartsDir names the environment variable for a directory whose programs replace those of .build/bin: `make matrix`
// sets it.
const PartsDir = "PARTS_DIR"

// Binary returns the path of a program that make has built, in PartsDir or in .build/bin.
func Binary(name string) (string, error) {
	if dir := os.Getenv(PartsDir); dir != "" {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	root, err := Root()
	if err != nil {
		return "", err
	}
	path := filepath.Join(root, ".build", "bin", name)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w: run `make build tools`", err)
	}
	return path, nil
}

// Poll calls ready until it returns nil. It gives up when ctx ends, when stop is closed (nil never is), or after
// timeout, and then returns ready's last error.
func Poll(ctx context.Context, timeout time.Duration, stop <-chan struct{}, ready func() error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-stop:
			return err
		case <-ctx.Done():
			return fmt.Errorf("%w; the last try: %w", ctx.Err(), err)
		case <-tick.C:
		}
	}
}
