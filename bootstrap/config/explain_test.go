package config

import (
	"errors"
	"fmt"
	"testing"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/secret"
)

func TestAdviceForARefusedLoginFitsTheOwnerOfFrps(t *testing.T) {
	refused := fmt.Errorf("frps %w: why", frpc.ErrRefused)
	for token, want := range map[string]string{
		"":  "frps refuses the login: why: restart the pod to get a new lease from the control plane",
		"t": "frps refuses the login: why: check frp.token (PIPEOPS_FRP_TOKEN)",
	} {
		err := FRP{Token: secret.Secret(token)}.ExplainLogin(refused)
		if err.Error() != want || !errors.Is(err, refused) {
			t.Errorf("with frp.token %q: %v, want %s", token, err, want)
		}
	}
	if plain := errors.New("plain"); !errors.Is((FRP{}).ExplainLogin(plain), plain) || (FRP{}).ExplainLogin(nil) != nil {
		t.Error("other errors are changed")
	}
}
