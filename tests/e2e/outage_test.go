package e2e

import (
	"fmt"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/elazarl/goproxy"
	corev1 "k8s.io/api/core/v1"

	"github.com/pipeops/vm-agent/tests/harness/process"
	"github.com/pipeops/vm-agent/tests/harness/relay"
)

// TestHangingFrpcIsRestarted has the HTTP proxy before frps never answer frpc's first login. frpc then waits forever
// and cannot be stopped. bootstrap reports it, the kubelet restarts that container alone, and the pod gets ready.
func TestHangingFrpcIsRestarted(t *testing.T) {
	t.Parallel() // it waits most of the time
	i := prepareBeside(t)
	proxy := httptest.NewServer(goproxy.NewProxyHttpServer())
	t.Cleanup(proxy.Close)
	silent, err := relay.Start(t.Context(), node.HostIP, proxy.Listener.Addr().String(), 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(silent.Close)
	i.setting("PIPEOPS_FRP_PROXY_URL=http://" + silent.Addr)
	i.components()
	i.mustKubectl(i.admin, "apply", "-k", "manifests/overlays/test")
	eventually(t, func() error {
		if silent.Held() == 0 {
			return fmt.Errorf("frpc has not asked the proxy")
		}
		return nil
	})
	silent.Silent.Store(false)
	var restarts [3]int32
	if err := process.Poll(t.Context(), 5*time.Minute, nil, func() error {
		status := i.pod().Status
		for _, condition := range status.Conditions {
			if condition.Type == corev1.PodReady && condition.Status == corev1.ConditionTrue {
				restarts = [3]int32{status.InitContainerStatuses[0].RestartCount,
					status.InitContainerStatuses[1].RestartCount, status.ContainerStatuses[0].RestartCount}
				return nil
			}
		}
		return fmt.Errorf("the pod is not ready: %+v", status.Conditions)
	}); err != nil {
		t.Fatal(err)
	}
	if restarts != [3]int32{0, 1, 0} {
		t.Errorf("restarts of bootstrap, frpc and proxy: %v", restarts)
	}
}
