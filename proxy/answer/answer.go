// Package answer writes the answers that the agent itself gives outside the Kubernetes API.
package answer

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"
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

// WriteBodyError answers for an err of reading a request's body, which was allowed to take limit.
func WriteBodyError(w http.ResponseWriter, err error, limit time.Duration) {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		WriteProblem(w, http.StatusRequestTimeout, fmt.Sprintf("the body did not arrive in full within %s", limit))
		return
	}
	WriteProblem(w, http.StatusBadRequest, "the body cannot be read: its length or chunks are wrong, or it ended early")
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
