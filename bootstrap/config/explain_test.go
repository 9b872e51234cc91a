package config

import (
	"errors"
	"strings"
	"testing"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/secret"
)

func TestAdviceForARefusedLoginFitsTheOwnerOfFrps(t *testing.T) {
	refused := &frpc.LoginError{Stage: frpc.StageAccept, Err: errors.New("frps refuses the login")}
	for token, want := range map[string]string{
		"":  "frps refuses the login: restart the pod to get a new lease from the control plane",
		"t": "frps refuses the login: check frp.token (PIPEOPS_FRP_TOKEN)",
	} {
		err := FRP{Token: secret.Secret(token)}.ExplainLogin(refused)
		if err.Error() != want || !errors.Is(err, error(refused)) {
			t.Errorf("with frp.token %q: %v, want %s", token, err, want)
		}
	}
}

func TestEveryStageOfALoginHasAdvice(t *testing.T) {
	for stage := frpc.StageFiles; stage <= frpc.StageAccept; stage++ {
		err := FRP{}.ExplainLogin(&frpc.LoginError{Stage: stage, Err: errors.New("cause")})
		if !strings.HasPrefix(err.Error(), "cause: ") || len(err.Error()) < len("cause: check") {
			t.Errorf("stage %d: %v", stage, err)
		}
	}
	if plain := errors.New("plain"); !errors.Is((FRP{}).ExplainLogin(plain), plain) || (FRP{}).ExplainLogin(nil) != nil {
		t.Error("other errors are changed")
	}
}
