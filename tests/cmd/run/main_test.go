package main

import (
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
)

// TestUnreachableClusterIsReportedSoon: whether the cluster of KUBECONFIG refuses connections, accepts them and says
// nothing, or there is no such file. Nothing is started before.
func TestUnreachableClusterIsReportedSoon(t *testing.T) {
	silent, closed := harness.SilentAddr(t), harness.FreeAddr(t)
	for what, addr := range map[string]string{"silent": silent, "closed": closed, "no file": ""} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			file, want := filepath.Join(t.TempDir(), "kubeconfig"), "no such file"
			if addr != "" {
				want = addr
				if err := cluster.WriteKubeconfig(file, &rest.Config{Host: "https://" + want}); err != nil {
					t.Fatal(err)
				}
			}
			begin := time.Now()
			err := run(t.Context(), file, io.Discard)
			if took := time.Since(begin); err == nil || took > 6*time.Second {
				t.Fatalf("%v after %s", err, took)
			}
			for _, part := range []string{"KUBECONFIG", want} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("it does not name %s: %v", part, err)
				}
			}
		})
	}
}
