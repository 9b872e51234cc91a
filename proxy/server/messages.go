package server

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"os"
	"reflect"
	"strings"
	"time"
	"unicode/utf8"

	strictjson "sigs.k8s.io/json"
)

// maxMessage is the size of a message in bytes.
const maxMessage = 64 << 10

// messageTime is how long all of a message may take to come, as its headers may.
const messageTime = headerTime

// message is the envelope of what the control plane tells the agent.
type message struct {
	ID        string          `json:"id"` // the same id twice does the work once
	Type      string          `json:"type"`
	Timestamp *string         `json:"timestamp"`
	Data      json.RawMessage `json:"data"`
}

// invalidError is a message that says what cannot be done; the rest are failures of the agent or its cluster.
type invalidError struct{ why string }

func (e invalidError) Error() string { return e.why }

// message answers POST /api/control-plane/message.
func (s *Server) message(w http.ResponseWriter, r *http.Request) {
	if !s.gate.reserve(w.(*recorder), maxMessage, false) { // observe has put it there
		fail(w, r, http.StatusTooManyRequests, "too many requests are being answered: try again", 1)
		return
	}
	body, ok := readJSON(w, r, maxMessage)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), registryTime)
	defer cancel()
	m, duplicate, err := s.obey(ctx, body)
	var invalid invalidError
	switch {
	case errors.As(err, &invalid):
		writeProblem(w, http.StatusUnprocessableEntity, invalid.why)
	case err != nil:
		registryFailed(ctx, w, err)
	default:
		writeJSON(w, http.StatusOK, map[string]any{"status": "acknowledged", "id": m.ID, "type": m.Type, "duplicate": duplicate, "agent_id": s.agent.ID})
	}
}

// obey does what a message says, unless it was done before.
func (s *Server) obey(ctx context.Context, body []byte) (m message, duplicate bool, err error) {
	if err = decodeStrict("", body, &m); err == nil {
		err = checkTime("timestamp", m.Timestamp)
	}
	switch {
	case err != nil:
	case !printable(m.ID, 128):
		err = invalidError{"id: give 1 to 128 printable ASCII characters, no spaces"}
	case m.Type == "ping":
	case m.Type == "runner_assigned":
		duplicate, err = s.runnerAssigned(ctx, m)
	case m.Type == "runner_unassigned":
		duplicate, err = s.runnerUnassigned(ctx, m)
	default:
		err = invalidError{fmt.Sprintf("type: %.64q is not known: there are ping, runner_assigned and runner_unassigned", m.Type)}
	}
	return m, duplicate, err
}

// readJSON reads a body of JSON, or answers why it cannot.
func readJSON(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, bool) {
	if mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mediaType != "application/json" {
		writeProblem(w, http.StatusUnsupportedMediaType, "send the body as Content-Type: application/json")
		return nil, false
	}
	w.(*recorder).body.Within(messageTime) // observe has put it there
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		writeProblem(w, http.StatusRequestEntityTooLarge, fmt.Sprintf("the body is larger than %d bytes", limit))
	case err != nil:
		unreadable(w, err, messageTime)
	case len(body) == 0:
		writeProblem(w, http.StatusBadRequest, "the body is empty")
	case !utf8.Valid(body):
		writeProblem(w, http.StatusBadRequest, "the body is not UTF-8")
	default:
		if err = json.Unmarshal(body, new(json.RawMessage)); err == nil {
			return body, true
		}
		writeProblem(w, http.StatusBadRequest, "the body cannot be read as JSON: "+err.Error())
	}
	return nil, false
}

// unreadable answers a body that does not come to its end.
func unreadable(w http.ResponseWriter, err error, limit time.Duration) {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		writeProblem(w, http.StatusRequestTimeout, fmt.Sprintf("the body has not come to its end within %s", limit))
		return
	}
	writeProblem(w, http.StatusBadRequest, "the body cannot be read to its end: its length or its chunks are wrong")
}

// decodeStrict decodes what stands in a field, or a whole message if that is "", and refuses fields that are
// unknown or stand there twice. Its errors name the field and hold no values.
func decodeStrict(field string, data []byte, into any) error {
	strict, err := strictjson.UnmarshalStrict(data, into)
	var wrongType *json.UnmarshalTypeError
	switch name := cmp.Or(field, "the message"); {
	case errors.As(err, &wrongType) && wrongType.Type.Kind() == reflect.String:
		inner := wrongType.Field[strings.LastIndexByte(wrongType.Field, '.')+1:] // without names of Go's
		return invalidError{strings.Trim(field+"."+inner, ".") + ": give a string"}
	case err != nil: // it is JSON, so it is another type or not there at all
		return invalidError{name + ": give an object"}
	case len(strict) > 0:
		return invalidError{fmt.Sprintf("%s: %.200s", name, strict[0])}
	}
	return nil
}

// checkTime refuses what is not a time as RFC 3339 has it.
func checkTime(field string, value *string) error {
	if value != nil && new(time.Time).UnmarshalText([]byte(*value)) != nil {
		return invalidError{field + ": give a time as RFC 3339 has it, such as 2026-01-02T03:04:05Z"}
	}
	return nil
}
