package main

import (
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// authenticator knows the token that callers must show.
type authenticator struct {
	hash  [sha256.Size]byte
	empty bool
}

func newAuthenticator(token frpc.Secret) *authenticator {
	return &authenticator{hash: sha256.Sum256([]byte(token.Reveal())), empty: token == ""}
}

// check says why the request's credential is not accepted, or "". Without a configured token nobody is let
// in. The hashes are compared, in constant time, so that neither the token nor its length can be measured.
func (a *authenticator) check(r *http.Request) string {
	values := r.Header.Values("Authorization")
	switch {
	case a.empty:
		return "the agent has no token configured, so it lets nobody in: set agent.token"
	case len(values) == 0:
		return "no credential: send \"Authorization: Bearer <agent token>\""
	case len(values) > 1:
		return "more than one Authorization header: send one"
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return "the credential is not a bearer token: send \"Authorization: Bearer <agent token>\""
	}
	hash := sha256.Sum256([]byte(strings.TrimLeft(token, " ")))
	if subtle.ConstantTimeCompare(hash[:], a.hash[:]) != 1 {
		return "the bearer token is not this agent's token: check the token in the kubeconfig or client"
	}
	return ""
}

// requireBearer lets next answer only those who show the agent's token.
func (s *server) requireBearer(next http.HandlerFunc, refuse func(http.ResponseWriter, *http.Request, string)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if why := s.auth.check(r); why != "" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="pipeops-agent"`)
			refuse(w, r, why)
			return
		}
		next(w, r)
	}
}

func problemUnauthorized(w http.ResponseWriter, _ *http.Request, why string) {
	writeProblem(w, http.StatusUnauthorized, why)
}

func statusUnauthorized(w http.ResponseWriter, r *http.Request, why string) {
	kube.WriteStatus(w, r, http.StatusUnauthorized, metav1.StatusReasonUnauthorized, "the agent refuses the request: "+why, 0)
}
