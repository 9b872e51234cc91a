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
	"reflect"
	"strings"
	"time"
	"unicode/utf8"

	strictjson "sigs.k8s.io/json"

	"github.com/pipeops/vm-agent/proxy/access"
	"github.com/pipeops/vm-agent/proxy/answer"
	"github.com/pipeops/vm-agent/proxy/runners"
)

// maxMessage limits a message in bytes, messageTime how long all of it may take to arrive.
const maxMessage, messageTime = 64 << 10, headerTime

// message is what the control plane tells the agent to do.
type message struct {
	ID        string          `json:"id"` // the same id twice does the work once
	Type      string          `json:"type"`
	Timestamp *string         `json:"timestamp"`
	Data      json.RawMessage `json:"data"`
}

func (s *Server) postMessage(w http.ResponseWriter, r *http.Request) {
	if !s.gate.reserve(scopeOf(r), maxMessage, false) {
		fail(w, r, http.StatusTooManyRequests, "too many requests are being answered: try again", 1)
		return
	}
	body := readMessage(w, r)
	if body == nil {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), runners.RegistryTimeout)
	defer cancel()
	m, err := s.apply(ctx, body)
	duplicate := errors.Is(err, runners.ErrDuplicate)
	switch invalid, ok := errors.AsType[answer.InvalidError](err); {
	case ok:
		answer.WriteProblem(w, http.StatusUnprocessableEntity, invalid.Error())
	case errors.As(err, new(closedError)):
		answer.WriteProblem(w, http.StatusForbidden, err.Error())
	case err != nil && !duplicate:
		runners.WriteError(ctx, w, err)
	default:
		answer.WriteJSON(w, http.StatusOK, map[string]any{
			"status": "acknowledged", "id": m.ID, "type": m.Type, "duplicate": duplicate, "agent_id": s.agent.ID,
		})
	}
}

// closedError is why the cluster's owner does not allow a message.
type closedError string

func (e closedError) Error() string { return string(e) }

// apply does what a message says. It does nothing and returns runners.ErrDuplicate if the same id was applied before.
func (s *Server) apply(ctx context.Context, body []byte) (m message, err error) {
	if err = decodeStrict("", body, &m); err == nil {
		err = checkTime("timestamp", m.Timestamp)
	}
	closed := s.owner.Refuse(access.Write)
	switch {
	case err != nil:
	case !runners.IsPrintable(m.ID, 128):
		err = answer.InvalidError("id: give 1 to 128 printable ASCII characters, no spaces")
	case m.Type == "ping":
	case closed != "" && strings.HasPrefix(m.Type, "runner_"):
		err = closedError(closed)
	case m.Type == "runner_assigned":
		var data runners.Assignment
		if err = decodeStrict("data", m.Data, &data); err == nil {
			err = checkTime("data.assigned_at", data.AssignedAt)
		}
		if err == nil {
			err = s.runners.Assign(ctx, m.ID, data)
		}
	case m.Type == "runner_unassigned":
		var data struct {
			RunnerID string `json:"runner_id"`
		}
		if err = decodeStrict("data", m.Data, &data); err == nil {
			err = s.runners.Unassign(ctx, m.ID, data.RunnerID)
		}
	default:
		err = answer.InvalidError(
			fmt.Sprintf("type: %.64q is unknown: give ping, runner_assigned or runner_unassigned", m.Type))
	}
	return m, err
}

// readMessage reads a body in JSON. It returns nil after it has answered with an error.
func readMessage(w http.ResponseWriter, r *http.Request) []byte {
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || mediaType != "application/json" {
		answer.WriteProblem(w, http.StatusUnsupportedMediaType, "send the body as Content-Type: application/json")
		return nil
	}
	scopeOf(r).Body.Within(messageTime)
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxMessage))
	switch _, tooLarge := errors.AsType[*http.MaxBytesError](err); {
	case tooLarge:
		answer.WriteProblem(w, http.StatusRequestEntityTooLarge, fmt.Sprintf("the body is larger than %d bytes", maxMessage))
	case err != nil:
		code, why := answer.BodyError(err, "it took longer than "+messageTime.String())
		answer.WriteProblem(w, code, why)
	case len(body) == 0:
		answer.WriteProblem(w, http.StatusBadRequest, "the body is empty")
	case !utf8.Valid(body):
		answer.WriteProblem(w, http.StatusBadRequest, "the body is not UTF-8")
	default:
		if err = json.Unmarshal(body, new(json.RawMessage)); err == nil {
			return body
		}
		answer.WriteProblem(w, http.StatusBadRequest, "the body is not valid JSON: "+err.Error())
	}
	return nil
}

// decodeStrict decodes a field, or a message if that is "", without unknown or duplicate fields. Errors hold no values.
func decodeStrict(field string, data []byte, into any) error {
	strict, err := strictjson.UnmarshalStrict(data, into)
	name := cmp.Or(field, "the message")
	switch wrongType, ok := errors.AsType[*json.UnmarshalTypeError](err); {
	case ok && wrongType.Type.Kind() == reflect.String:
		inner := wrongType.Field[strings.LastIndexByte(wrongType.Field, '.')+1:] // without the names of Go's fields
		return answer.InvalidError(strings.Trim(field+"."+inner, ".") + ": give a string")
	case err != nil: // it is valid JSON, so it is missing or of another type
		return answer.InvalidError(name + ": give an object")
	case len(strict) > 0:
		return answer.InvalidError(fmt.Sprintf("%s: %.200s", name, strict[0]))
	}
	return nil
}

// checkTime returns an error unless value is nil or a time in RFC 3339's form.
func checkTime(field string, value *string) error {
	if value != nil && new(time.Time).UnmarshalText([]byte(*value)) != nil {
		return answer.InvalidError(field + ": give a time in the form of RFC 3339, such as 2026-01-02T03:04:05Z")
	}
	return nil
}
