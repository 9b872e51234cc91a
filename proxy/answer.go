package main

import (
	"encoding/json"
	"net/http"
)

// problem is an error in the form of RFC 9457.
type problem struct {
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"` // what happened and what to do
}

// writeProblem writes every error outside the Kubernetes API.
func writeProblem(w http.ResponseWriter, code int, detail string) {
	write(w, code, "application/problem+json", problem{Title: http.StatusText(code), Status: code, Detail: detail})
}

func writeJSON(w http.ResponseWriter, code int, body any) {
	write(w, code, "application/json", body)
}

func write(w http.ResponseWriter, code int, contentType string, body any) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false) // people read it, browsers do not
	_ = encoder.Encode(body)
}
