package main

import (
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"strings"

	"github.com/pipeops/vm-agent/frpc"
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

// challenge says what kind of credential is asked for. Source: RFC 6750.
const challenge = `Bearer realm="pipeops-agent"`

// requireBearer lets next answer only those who show the agent's token.
func (s *server) requireBearer(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if why := s.auth.check(r); why != "" {
			w.Header().Set("WWW-Authenticate", challenge)
			writeProblem(w, http.StatusUnauthorized, why)
			return
		}
		next(w, r)
	}
}
