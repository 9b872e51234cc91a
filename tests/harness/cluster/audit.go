package cluster

import (
	"encoding/json"
	"os"
	"strings"
	"time"
)

// auditPolicy leaves out the administrator and the agent that most tests share: what they do says nothing about who
// the callers are, and would fill the log.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  users: [admin, "system:apiserver", "system:serviceaccount:pipeops-system:pipeops-agent"]
- level: Metadata
`

// AuditEvent is what the API server's audit log says about a request that has been answered, or about a watch that has
// begun (stage ResponseStarted).
type AuditEvent struct {
	AuditID, Stage, RequestURI, Verb string
	User                             AuditUser
	ImpersonatedUser                 AuditUser // empty if there was no impersonation
	ObjectRef                        struct{ Resource, Namespace, Name, Subresource string }
	ResponseStatus                   struct{ Code int }
	RequestReceivedTimestamp         time.Time
}

// AuditUser is a user in an audit event.
type AuditUser struct {
	Username string
	Groups   []string
}

// Audit returns the audit log for which keep is true. An event is in it before its caller has seen the whole answer.
func (c *Cluster) Audit(keep func(AuditEvent) bool) (events []AuditEvent, err error) {
	data, err := os.ReadFile(c.auditLog)
	for line := range strings.Lines(string(data)) {
		var event AuditEvent
		if err := json.Unmarshal([]byte(line), &event); err != nil {
			if strings.HasSuffix(line, "\n") {
				return nil, err
			}
			break // it is being written
		}
		if keep(event) {
			events = append(events, event)
		}
	}
	return events, err
}
