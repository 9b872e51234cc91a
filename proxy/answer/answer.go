// Package answer writes the answers that the agent itself gives outside the Kubernetes API.
package answer

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
)

// Problem is an error as in RFC 9457.
type Problem struct {
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"` // what happened and what to do
}

// WriteProblem answers with a Problem.
func WriteProblem(w http.ResponseWriter, code int, detail string) {
	write(w, code, "application/problem+json", Problem{Title: http.StatusText(code), Status: code, Detail: detail})
}

// InvalidError says which field of a request is invalid, and what is allowed.
type InvalidError string

func (e InvalidError) Error() string { return string(e) }

// BodyError returns the status for an err of reading a request's body, and why: late if it came too late.
func BodyError(err error, late string) (code int, why string) {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return http.StatusRequestTimeout, "the body of the request did not arrive in time: " + late
	}
	return http.StatusBadRequest, "the body of the request cannot be read: its length or chunks are wrong, or it broke off"
}

// WriteJSON answers with body as JSON.
func WriteJSON(w http.ResponseWriter, code int, body any) { write(w, code, "application/json", body) }

func write(w http.ResponseWriter, code int, contentType string, body any) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false) // people read it, browsers do not
	_ = encoder.Encode(body)
}
