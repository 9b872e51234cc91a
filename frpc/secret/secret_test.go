package secret

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestSecretIsNeverPrinted(t *testing.T) {
	const password = Secret("hunter2")
	holder := struct{ S Secret }{password}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("m", "secret", password)
	slog.New(slog.NewTextHandler(&log, nil)).Info("m", "secret", password, "holder", holder)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&log, verb+verb+"\n", password, holder)
	}
	if out := log.String(); strings.Contains(out, "hunter2") || strings.Contains(out, "68756e74657232") {
		t.Errorf("printed:\n%s", out)
	}
	if got := fmt.Sprint(password, Secret("")); got != "[redacted]" {
		t.Errorf("got %q", got)
	}
}
