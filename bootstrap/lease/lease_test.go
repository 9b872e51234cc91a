package lease

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/controlplane"
)

// TestTimeoutKeepsTheCause: an attempt that --timeout cuts short does not hide what the one before found.
func TestTimeoutKeepsTheCause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		attempts := 0
		_, fail := retryUntilLease(func(ctx context.Context, _ []byte) (controlplane.Answer, *controlplane.Failure) {
			if attempts++; attempts == 1 {
				return controlplane.Answer{}, &controlplane.Failure{Err: errors.New("a wrong certificate")}
			}
			<-ctx.Done()
			return controlplane.Answer{}, &controlplane.Failure{Err: ctx.Err()}
		}, filepath.Join(t.TempDir(), waitingFile), slog.New(slog.DiscardHandler))(ctx, nil)
		if fail == nil || !strings.Contains(fail.Error(), "a wrong certificate (gave up after --timeout)") || attempts != 2 {
			t.Errorf("after %d attempts: %v", attempts, fail)
		}
	})
}
