package integration

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/creack/pty"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/kubelet"
)

// runningPod registers a node, and a running pod on it.
func runningPod(t *testing.T, ns string) {
	t.Helper()
	runPod(t, &kubelet.Kubelet{}, ns)
}

// loggingPod is a runningPod that logs the lines, until the channel is closed.
func loggingPod(t *testing.T, lines <-chan string, ns string) {
	t.Helper()
	runPod(t, &kubelet.Kubelet{Follow: func(ctx context.Context, log io.Writer) {
		for {
			select {
			case line, open := <-lines:
				if !open {
					return
				}
				_, _ = io.WriteString(log, line+"\n")
			case <-ctx.Done():
				return
			}
		}
	}}, ns)
}

func runPod(t *testing.T, k *kubelet.Kubelet, ns string) {
	t.Helper()
	stop, err := k.RunPod(t.Context(), api.Client, ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
}

func TestLogsFollowLineByLine(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	lines := make(chan string)
	loggingPod(t, lines, ns)
	if got := w.mustKubectl("logs", "pod", "-n", ns); got != "first line\n" {
		t.Errorf("logs: got %q", got)
	}
	follow := w.startKubectl("follow", "logs", "-f", "pod", "-n", ns)
	// Each line must arrive before the next is written: no hop may buffer it.
	want := "first line\n"
	for i := range 3 {
		eventually(t, func() error {
			if got := follow.Log(); got != want {
				return fmt.Errorf("logs -f: got %q, want %q", got, want)
			}
			return nil
		})
		line := fmt.Sprintf("line %d", i)
		lines <- line
		want += line + "\n"
	}
	close(lines)
	if code := follow.ExitCode(); code != 0 || follow.Log() != want {
		t.Errorf("logs -f: exit code %d, got %q, want %q", code, follow.Log(), want)
	}
}

// protocols are the two that kubectl speaks. The variable selects one, and kubectl then logs upgrade.
var protocols = []struct{ name, websockets, upgrade string }{
	{"websocket", "true", "Sec-Websocket-Protocol"},
	{"SPDY", "false", "X-Stream-Protocol-Version"},
}

// eachProtocol runs test once with each protocol.
func eachProtocol(t *testing.T, w *world, test func(t *testing.T)) {
	t.Helper()
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			w.env = []string{"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=" + p.websockets,
				"KUBECTL_PORT_FORWARD_WEBSOCKETS=" + p.websockets}
			test(t)
		})
	}
}

func TestExecForwardsStreamsAndExitCode(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	runningPod(t, ns)
	eachProtocol(t, w, func(t *testing.T) {
		big := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB, both ways
		r := w.kubectl(w.caller, big, "exec", "-i", "pod", "-n", ns, "--", "sh", "-c", "cat; echo error >&2; exit 7")
		if r.Stdout != big || !strings.HasPrefix(r.Stderr, "error\n") || r.Code != 7 {
			t.Errorf("exec: %d bytes of %d came back, stderr %q, exit code %d", len(r.Stdout), len(big), r.Stderr, r.Code)
		}
	})
}

// TestTerminalIsInteractive runs a shell in a terminal, which follows the size of the caller's terminal, forwards
// Ctrl-C, and returns the shell's exit code.
func TestTerminalIsInteractive(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	runningPod(t, ns)
	eachProtocol(t, w, func(t *testing.T) {
		cmd := harness.Kubectl(t.Context(), t, w.group.Dir(), w.caller, append(w.env, "TERM=dumb"),
			"exec", "-it", "pod", "-n", ns, "--", "sh")
		terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 80})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = terminal.Close() }()
		screen := &screen{}
		shown := make(chan struct{})
		go func() {
			defer close(shown)
			_, _ = io.Copy(screen, terminal)
		}()
		// Type again until the text shows, because a new size and the shell take a moment to arrive. Change the size again
		// too, because kubectl shows the first size before it listens for the signal of the next.
		see := func(typed, want string, rows, cols uint16) {
			t.Helper()
			eventually(t, func() error {
				if strings.Contains(screen.String(), want) {
					return nil
				}
				for _, size := range []uint16{cols - 1, cols} {
					if err := pty.Setsize(terminal, &pty.Winsize{Rows: rows, Cols: size}); err != nil {
						return err
					}
				}
				_, err := io.WriteString(terminal, typed)
				return fmt.Errorf("%q does not show (%w); the terminal shows:\n%s", want, err, screen)
			})
		}
		see("stty size\n", "\n24 80\r\n", 24, 80)
		see("stty size\n", "\n50 132\r\n", 50, 132)
		if _, err := io.WriteString(terminal, "sleep 1000\n"); err != nil { // only once: a second would sleep again
			t.Fatal(err)
		}
		see("", "sleep 1000", 50, 132)
		see("\x03", "^C", 50, 132)
		see("echo $((6*7))\n", "\n42\r\n", 50, 132)
		if _, err := io.WriteString(terminal, "exit 7\n"); err != nil {
			t.Fatal(err)
		}
		err = cmd.Wait()
		<-shown
		if code := cmd.ProcessState.ExitCode(); code != 7 {
			t.Errorf("exit code %d, %v; the terminal showed:\n%s", code, err, screen)
		}
	})
}

// screen records what a terminal shows.
type screen struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// TestKubectlUsesTheChosenProtocol checks that kubectl speaks the protocol that eachProtocol has set: otherwise these
// tests would cover one of them only.
func TestKubectlUsesTheChosenProtocol(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	runningPod(t, ns)
	eachProtocol(t, w, func(t *testing.T) {
		r := w.kubectl(w.caller, "", "exec", "-v=8", "pod", "-n", ns, "--", "true")
		for _, p := range protocols {
			want := strings.HasSuffix(t.Name(), "/"+p.name)
			if !api.Supports("WebSocket") {
				want = p.name == "SPDY"
			}
			if used := strings.Contains(r.Stderr, p.upgrade); used != want {
				t.Errorf("%s used: %v; exit code %d:\n%s", p.name, used, r.Code, r.Stderr)
			}
		}
	})
}

func TestAttachForwardsStreams(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	runningPod(t, ns)
	eachProtocol(t, w, func(t *testing.T) {
		r := w.kubectl(w.caller, "line 1\nline 2\n", "attach", "-i", "pod", "-n", ns, "--quiet")
		if r.Stdout != "line 1\nline 2\n" || r.Code != 0 {
			t.Errorf("attach: %+v", r)
		}
	})
}

func TestCopyLosesNothing(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	runningPod(t, ns)
	eachProtocol(t, w, func(t *testing.T) {
		dir := t.TempDir()
		data := make([]byte, 4<<20)
		_, _ = rand.Read(data)
		local, inPod, back := filepath.Join(dir, "local"), filepath.Join(dir, "pod", "file"), filepath.Join(dir, "back")
		if err := os.WriteFile(local, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Dir(inPod), 0o700); err != nil {
			t.Fatal(err)
		}
		w.mustKubectl("cp", local, ns+"/pod:"+inPod)
		w.mustKubectl("cp", ns+"/pod:"+inPod, back)
		for _, path := range []string{inPod, back} {
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%s holds %d bytes, %v, want %d", filepath.Base(path), len(got), err, len(data))
			}
		}
	})
}

func TestPortForwardServesConnections(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	runningPod(t, ns)
	page := strings.Repeat("x", 1<<20)
	pod := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(rw, page)
	}))
	t.Cleanup(pod.Close)
	_, port, err := net.SplitHostPort(pod.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	eachProtocol(t, w, func(t *testing.T) {
		forward := w.startKubectl("forward-"+filepath.Base(t.Name()), "port-forward", "pod/pod", "-n", ns, ":"+port)
		var local []string
		eventually(t, func() error {
			local = regexp.MustCompile(`Forwarding from (127\.0\.0\.1:\d+) ->`).FindStringSubmatch(forward.Log())
			if local == nil {
				return errors.New("not forwarding: " + forward.Log())
			}
			return nil
		})
		for range 3 { // one connection after the other, over one forward
			if resp, body := get(t, &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, "http://"+local[1],
				nil); resp.StatusCode != http.StatusOK || body != page {
				t.Errorf("%s, %d bytes of %d; %s", resp.Status, len(body), len(page), forward.Log())
			}
		}
		forward.Stop()
	})
}
