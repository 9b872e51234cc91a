package main

import (
	"net/http"

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

func writeJSON(w http.ResponseWriter, code int, body any) {
	kube.WriteJSON(w, code, "application/json", body)
}
