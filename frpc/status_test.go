package frpc

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync/atomic"
	"testing"
)

// TestStateOf: frpc counts as not running only if nobody listens on its port.
func TestStateOf(t *testing.T) {
	var answer atomic.Value
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch text := answer.Load().(string); text {
		case "401":
			w.WriteHeader(http.StatusUnauthorized)
		case "cut":
			panic(http.ErrAbortHandler)
		default:
			_, _ = io.WriteString(w, text)
		}
	}))
	defer server.Close()
	_, port, _ := net.SplitHostPort(server.Listener.Addr().String())
	number, _ := strconv.Atoi(port)
	admin := Admin{Port: number}
	for text, want := range map[string]State{
		"401": Unknown, "cut": Unknown, "<html>": Unknown, "{}": LoggedOut, `{"https":[{"status":"running"}]}`: Running,
		`{"https":[{"status":"new"}]}`: Starting, `{"https":[{"status":"check failed"}]}`: Withdrawn,
		`{"https":[{"status":"check failed","err":"from before"}]}`: Withdrawn,
		`{"https":[{"status":"wait start","err":"taken"}]}`:         Rejected, `{"https":[{"status":"start error"}]}`: Rejected,
	} {
		answer.Store(text)
		if got := StateOf(admin.Status(t.Context())); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
	server.Close()
	if state := StateOf(admin.Status(t.Context())); state != Down {
		t.Errorf("nobody listens: %v", state)
	}
}
