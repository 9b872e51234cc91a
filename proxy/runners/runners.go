// Package runners keeps the registry of the runners that are assigned to the agent, and relays commands to them.
package runners

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc/secret"
	"github.com/pipeops/vm-agent/proxy/answer"
	"github.com/pipeops/vm-agent/proxy/kube"
)

const (
	// RegistryTimeout is how long reading or changing the registry may take.
	RegistryTimeout = 10 * time.Second

	// The registry is a Secret with a key for each runner, and processedKey. A runner's id begins with a letter or
	// digit, so it is never that key.
	registryName = agentapi.RunnersRegistry
	processedKey = "_processed" // ids of the last messages that changed the registry
	maxProcessed = 256
	maxToken     = 8 << 10 // bytes

	validID      = "1 to 128 letters, digits, dots, hyphens and underscores, a letter or digit first"
	errInvalidID = answer.InvalidError("data.runner_id: give " + validID)
)

var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// Runners relays commands to the runners in the registry. The registry is a Secret, so that it survives restarts and
// is shared by all replicas. Safe for concurrent use.
type Runners struct {
	Transport *http.Transport // sends commands; tests replace its dialer

	config  *config.Config
	client  *kube.Client
	refused func()
	log     *slog.Logger
	running chan struct{} // holds one for each command that is being relayed
}

// New returns the runners of a registry, which it does not read yet. It calls refused for each command beyond
// MaxCommands.
func New(client *kube.Client, cfg *config.Config, refused func(), log *slog.Logger) *Runners {
	r := &Runners{config: cfg, client: client, refused: refused, log: log, running: make(chan struct{}, MaxCommands)}
	r.Transport = &http.Transport{ // without the environment's proxy
		DialContext:            (&net.Dialer{Timeout: 10 * time.Second, ControlContext: r.checkAddress}).DialContext,
		TLSHandshakeTimeout:    10 * time.Second,
		ResponseHeaderTimeout:  HeaderTimeout,
		MaxResponseHeaderBytes: maxAnswerHeaders,
		IdleConnTimeout:        time.Minute,
		DisableCompression:     true,
	}
	return r
}

// Running returns how many commands are being relayed now.
func (r *Runners) Running() int { return len(r.running) }

// runner is where a runner's commands go, as the registry stores it.
type runner struct {
	Endpoint   string        `json:"runner_endpoint"`
	Token      secret.Secret `json:"runner_token"`
	AssignedAt *string       `json:"assigned_at,omitempty"`
}

// Assignment is the data of a runner_assigned message.
type Assignment struct {
	ID string `json:"runner_id"`
	runner
}

// Assign puts a runner into the registry, or replaces its endpoint and token. It does nothing and returns true if
// messageID has changed the registry before. An invalid assignment is an [answer.InvalidError] without the token.
func (r *Runners) Assign(ctx context.Context, messageID string, a Assignment) (duplicate bool, err error) {
	if !idPattern.MatchString(a.ID) {
		return false, errInvalidID
	}
	if _, err := r.checkEndpoint(a.Endpoint); err != nil {
		return false, answer.InvalidError("data.runner_endpoint " + err.Error())
	}
	if !IsPrintable(a.Token.Reveal(), maxToken) {
		return false, answer.InvalidError(
			fmt.Sprintf("data.runner_token: give 1 to %d printable ASCII characters, no spaces", maxToken))
	}
	return r.change(ctx, messageID, func(registry map[string][]byte) (err error) {
		registry[a.ID], err = json.Marshal(a.runner)
		return err
	})
}

// Unassign removes a runner from the registry, as Assign adds it.
func (r *Runners) Unassign(ctx context.Context, messageID, id string) (duplicate bool, err error) {
	if !idPattern.MatchString(id) {
		return false, errInvalidID
	}
	return r.change(ctx, messageID, func(registry map[string][]byte) error {
		delete(registry, id)
		return nil
	})
}

var errDuplicate = errors.New("duplicate message")

// change applies a message to the registry, once.
func (r *Runners) change(ctx context.Context, messageID string, apply kube.Change) (duplicate bool, err error) {
	err = r.client.ChangeSecret(ctx, r.config.Kubernetes.Namespace, registryName, func(data map[string][]byte) error {
		var processed []string
		if stored := data[processedKey]; stored != nil && json.Unmarshal(stored, &processed) != nil {
			return fmt.Errorf("the key %s of Secret %s is not a list: delete it", processedKey, r.name())
		}
		if slices.Contains(processed, messageID) {
			return errDuplicate
		}
		processed = append(processed, messageID)
		data[processedKey], _ = json.Marshal(processed[max(0, len(processed)-maxProcessed):]) // strings always encode
		return apply(data)
	})
	if errors.Is(err, errDuplicate) {
		return true, nil
	}
	return false, err
}

func (r *Runners) name() string { return r.config.Kubernetes.Namespace + "/" + registryName }

// find reads a runner from the registry; nil if it is not there. It keeps no copy, because another replica may change
// the Secret.
func (r *Runners) find(ctx context.Context, id string) (*runner, error) {
	registry, err := r.client.ReadSecret(ctx, r.config.Kubernetes.Namespace, registryName)
	if err != nil || registry.Data[id] == nil {
		return nil, err
	}
	found := &runner{}
	if json.Unmarshal(registry.Data[id], found) != nil {
		return nil, fmt.Errorf("the key %s of Secret %s is not a runner: assign it again", id, r.name())
	}
	return found, nil
}

// WriteError answers for an err of reading or changing the registry, which had the time of ctx.
func WriteError(ctx context.Context, w http.ResponseWriter, err error) {
	code, detail := http.StatusBadGateway, err.Error()
	switch {
	case ctx.Err() != nil:
		code = http.StatusGatewayTimeout
	case apierrors.IsInvalid(err) || apierrors.IsRequestEntityTooLargeError(err):
		code = http.StatusInsufficientStorage
		detail = "the registry of runners is full: unassign those that are gone: " + detail
	}
	answer.WriteProblem(w, code, detail)
}

// IsPrintable reports whether s is 1 to limit printable ASCII characters without spaces.
func IsPrintable(s string, limit int) bool {
	return s != "" && len(s) <= limit && !strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c > '~' })
}
