package server

import (
	"net/http"
	"strconv"

	"github.com/pipeops/vm-agent/proxy/kube"
)

// problem is an error in the form of RFC 9457.
type problem struct {
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"` // what happened and what to do
}

// writeProblem writes every error outside the Kubernetes API.
func writeProblem(w http.ResponseWriter, code int, detail string) {
	kube.WriteJSON(w, code, "application/problem+json", problem{Title: http.StatusText(code), Status: code, Detail: detail})
}

// fail answers an error in the form that the caller of r expects: kubectl prints a metav1.Status. retryAfter is in
// seconds, none if 0.
func fail(w http.ResponseWriter, r *http.Request, code int, why string, retryAfter int32) {
	if isKubernetes(r) {
		if why != shuttingDown {
			why = "the agent refuses the request: " + why
		}
		kube.WriteStatus(w, r, code, why, retryAfter)
		return
	}
	if retryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(retryAfter)))
	}
	writeProblem(w, code, why)
}

func writeJSON(w http.ResponseWriter, code int, body any) {
	kube.WriteJSON(w, code, "application/json", body)
}
