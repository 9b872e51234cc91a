package integration

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/pipeops/vm-agent/tests/harness"
)

// TestKubernetesCredentialRotatesWithoutARestart changes the credential that the agent shows to the API server.
func TestKubernetesCredentialRotatesWithoutARestart(t *testing.T) {
	t.Parallel() // client-go reads a token file once a minute
	for name, user := range map[string]func(token string) *clientcmdapi.AuthInfo{
		"token file": func(token string) *clientcmdapi.AuthInfo { return &clientcmdapi.AuthInfo{TokenFile: token} },
		"exec plugin": func(token string) *clientcmdapi.AuthInfo {
			return &clientcmdapi.AuthInfo{Exec: &clientcmdapi.ExecConfig{
				APIVersion: "client.authentication.k8s.io/v1", InteractiveMode: clientcmdapi.NeverExecInteractiveMode,
				Command: "sh", Args: []string{"-c", `printf '{"apiVersion":"client.authentication.k8s.io/v1",` +
					`"kind":"ExecCredential","status":{"token":"%s"}}' "$(cat ` + token + `)"`},
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
				harness.Eventually(t, rotation, func() error {
					req, err := http.NewRequestWithContext(t.Context(), http.MethodGet,
						w.agent.Tunnel+"/api/k8s/api/v1/namespaces", nil)
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

// TestCallersMayUseTheOldAndTheNewToken checks that callers may show the new token soon after its file has changed,
// and the old token for a while.
func TestCallersMayUseTheOldAndTheNewToken(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	file := filepath.Join(w.group.Dir(), "agent-token")
	w.agent.Env = append(slices.DeleteFunc(w.agent.Env,
		func(v string) bool { return strings.HasPrefix(v, "PIPEOPS_AGENT_TOKEN=") }),
		"PIPEOPS_AGENT_TOKEN_FILE="+file)
	if err := os.WriteFile(file, []byte(agentToken+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.startAgent()
	code := func(token string) int {
		resp, _ := get(t, http.DefaultClient, w.agent.Tunnel+"/api/k8s/version",
			http.Header{"Authorization": {"Bearer " + token}})
		return resp.StatusCode
	}
	if old, next := code(agentToken), code("the-next-token"); old != http.StatusOK || next != http.StatusUnauthorized {
		t.Fatalf("before: %d with the token, %d with the next", old, next)
	}
	if err := os.WriteFile(file, []byte("the-next-token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if got := code("the-next-token"); got != http.StatusOK {
			return fmt.Errorf("the new token: %d", got)
		}
		return nil
	})
	if got := code(agentToken); got != http.StatusOK {
		t.Errorf("the token before: %d", got)
	}
}
