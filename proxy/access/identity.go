// Package access decides as whom a caller acts at the Kubernetes API, and what the cluster's owner allows.
package access

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/pipeops/vm-agent/proxy/kube"
)

// Values of the setting access.identity.
const Agent, Named, Own = "agent", "named", "own"

// TunnelGroup is a group of every caller in identity named, so that the cluster can tell them from its own users.
const TunnelGroup = "pipeops:tunnel"

const impersonateUser, impersonateGroup = "Impersonate-User", "Impersonate-Group"

const maxName = 256 // bytes

// Caller is as whom a caller acts at the Kubernetes API.
type Caller struct {
	// Headers say it to the API server: Authorization in identity own, Impersonate-* in own and named. With none it is
	// the agent's ServiceAccount.
	Headers http.Header

	Share      string // with which callers it shares the limits; empty: with those of its address
	User, As   string // for the log; User is not verified before the API server has answered
	Groups     []string
	credential string // of identity own
}

// Identify returns as whom a request acts. Its error says what is missing, for the caller and the gateway's author, and
// code is the status for it.
func Identify(r *http.Request, identity, prefix string) (c Caller, code int, err error) {
	if identity == Agent {
		for name := range r.Header {
			if strings.HasPrefix(name, "Impersonate-") {
				return c, http.StatusForbidden,
					errors.New("it does not forward impersonation: remove --as, --as-group and --as-uid")
			}
		}
		return c, 0, nil
	}
	for _, option := range kube.ListOf(r, "Connection") {
		name := http.CanonicalHeaderKey(option)
		if name == "Authorization" || name == kube.GateHeader || strings.HasPrefix(name, "Impersonate-") {
			return c, http.StatusBadRequest, fmt.Errorf("the header Connection names %.64s, "+
				"which a proxy on the way would have removed: do not send it there", name)
		}
	}
	if identity == Named {
		c, err = identifyNamed(r.Header, prefix)
		return c, http.StatusBadRequest, err
	}
	c, err = identifyOwn(r)
	return c, http.StatusUnauthorized, err
}

// ID returns a hash that is the same for callers with the same Headers.
func (c *Caller) ID() [sha256.Size]byte {
	hash := sha256.New()
	_ = c.Headers.Write(hash) // sorted
	return [sha256.Size]byte(hash.Sum(nil))
}

func identifyNamed(header http.Header, prefix string) (c Caller, err error) {
	const send = ": the gateway must send exactly one Impersonate-User, any number of Impersonate-Group, " +
		"and no other Impersonate header"
	for name := range header {
		if strings.HasPrefix(name, "Impersonate-") && name != impersonateUser && name != impersonateGroup {
			return c, fmt.Errorf("the header %.64s cannot be used here%s", name, send)
		}
	}
	users, groups := header[impersonateUser], header[impersonateGroup]
	if len(users) != 1 {
		return c, fmt.Errorf("it names %d users%s", len(users), send)
	}
	names := slices.Concat(users, groups)
	for i, name := range names {
		if name == "" || len(name) > maxName || !utf8.ValidString(name) ||
			strings.ContainsFunc(name, func(c rune) bool { return !unicode.IsPrint(c) }) {
			return c, fmt.Errorf("the name of a user or group is not 1 to %d bytes of printable UTF-8%s", maxName, send)
		}
		names[i] = prefix + name
	}
	c.User, c.Groups = names[0], append(names[1:], TunnelGroup)
	c.Share = c.User
	c.Headers = http.Header{impersonateUser: {c.User}, impersonateGroup: c.Groups}
	return c, nil
}

// What the API server would take for no credential at all, such as two spaces, must not pass: the caller would be
// anonymous there. Source: k8s.io/apiserver/pkg/authentication/request/bearertoken.
var (
	bearer = regexp.MustCompile(`^(?i:Bearer) ([!-~]+)$`)
	token  = regexp.MustCompile(`^[!-~]+$`)
)

func identifyOwn(r *http.Request) (c Caller, err error) {
	var tokens []string
	for _, value := range r.Header["Authorization"] {
		found := bearer.FindStringSubmatch(value)
		if found == nil {
			return c, errors.New("the header Authorization is not \"Bearer <token>\": send a token of the cluster")
		}
		tokens = append(tokens, found[1])
	}
	if strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		// A browser's way. The token goes on in Authorization, as all others.
		for _, protocol := range kube.ListOf(r, "Sec-Websocket-Protocol") {
			if encoded, ok := strings.CutPrefix(protocol, kube.TokenProtocol); ok {
				decoded, err := base64.RawURLEncoding.DecodeString(encoded)
				if err != nil || !token.Match(decoded) {
					return c, errors.New("the token in Sec-WebSocket-Protocol is not valid: send it as base64url")
				}
				tokens = append(tokens, string(decoded))
			}
		}
	}
	if len(tokens) != 1 {
		return c, fmt.Errorf("it holds %d credentials for the cluster: send one, as Authorization: Bearer <token>; "+
			"a kubeconfig with nothing but a client certificate cannot be used through the agent", len(tokens))
	}
	c.credential = tokens[0]
	c.Headers = http.Header{"Authorization": {"Bearer " + c.credential}}
	for name, values := range r.Header {
		if strings.HasPrefix(name, "Impersonate-") {
			c.Headers[name] = values
		}
	}
	hash := sha256.Sum256([]byte(c.credential))
	c.Share = string(hash[:])
	c.User, c.As = c.claims().Subject, fmt.Sprintf("%.256s", r.Header.Get(impersonateUser))
	return c, nil
}

// Expired reports whether the caller's token is a JWT that is no longer valid by its own account.
func (c *Caller) Expired() bool {
	end := c.claims().Expires
	return end != 0 && time.Now().After(time.Unix(int64(end), 0))
}

type claims struct {
	Subject string  `json:"sub"`
	Expires float64 `json:"exp"` // seconds since 1970
}

// claims returns what the token says of itself, if it is a JWT. Nothing but the API server has verified it.
func (c *Caller) claims() (found claims) {
	if _, rest, ok := strings.Cut(c.credential, "."); ok {
		payload, _, _ := strings.Cut(rest, ".")
		decoded, _ := base64.RawURLEncoding.DecodeString(payload)
		_ = json.Unmarshal(decoded, &found)
	}
	return found
}
