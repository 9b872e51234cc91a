package integration

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// TestCredentialsRotate: the agent's credential may change at any time, and no restart is needed.
func TestCredentialsRotate(t *testing.T) {
	t.Parallel() // client-go looks at a token file once a minute
	for name, user := range map[string]func(token string) *clientcmdapi.AuthInfo{
		"token file": func(token string) *clientcmdapi.AuthInfo { return &clientcmdapi.AuthInfo{TokenFile: token} },
		"exec plugin": func(token string) *clientcmdapi.AuthInfo {
			return &clientcmdapi.AuthInfo{Exec: &clientcmdapi.ExecConfig{
				APIVersion: "client.authentication.k8s.io/v1", InteractiveMode: clientcmdapi.NeverExecInteractiveMode,
				Command: "sh", Args: []string{"-c", `printf '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"%s"}}' "$(cat ` + token + `)"`},
			}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			token, kubeconfig := filepath.Join(w.group.Dir(), "token"), filepath.Join(w.group.Dir(), "rotating.kubeconfig")
			config, err := clientcmd.LoadFromFile(api.kubeconfig)
			if err != nil {
				t.Fatal(err)
			}
			config.AuthInfos["user"] = user(token)
			if err := clientcmd.WriteToFile(*config, kubeconfig); err != nil {
				t.Fatal(err)
			}
			w.agent.Env = append(w.agent.Env, "KUBECONFIG="+kubeconfig)
			if err := os.WriteFile(token, []byte("not-yet-valid"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := w.agent.Start(); err != nil {
				t.Fatal(err)
			}
			answers := func(want int) {
				t.Helper()
				eventuallyWithin(t, rotation, func() error {
					req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.agent.Tunnel+"/api/k8s/api/v1/namespaces", nil)
					if err != nil {
						return err
					}
					req.Header.Set("Authorization", "Bearer "+agentToken)
					resp, err := http.DefaultClient.Do(req)
					if err != nil {
						return err
					}
					_ = resp.Body.Close()
					if resp.StatusCode != want {
						return fmt.Errorf("answered %s, want %d", resp.Status, want)
					}
					return nil
				})
			}
			answers(http.StatusBadGateway)
			if err := os.WriteFile(token, []byte(api.agent.BearerToken), 0o600); err != nil {
				t.Fatal(err)
			}
			answers(http.StatusOK)
		})
	}
}
