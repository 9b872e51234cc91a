package integration

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
)

// recorder is an API server that records what it is asked below /api/v1/namespaces.
type recorder struct {
	mu   sync.Mutex
	seen map[string][]*http.Request
}

func (rec *recorder) ServeHTTP(_ http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body) // then the trailers are known
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.seen[r.URL.Path] = append(rec.seen[r.URL.Path], r)
}

// at returns the requests for a path.
func (rec *recorder) at(path string) []*http.Request {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return rec.seen[path]
}

const (
	agentsCredential  = "agents-credential"
	callersCredential = "callers-credential"
	socketProtocol    = "base64url.bearer.authorization.k8s.io."
)

// identityFault returns what is wrong with a request that the API server has received, or "": it must have one
// credential, the decided one, and names of others only where the identity has them.
func identityFault(identity string, r *http.Request) string {
	credentials, users, groups := r.Header.Values("Authorization"), 0, 0
	for protocol := range strings.SplitSeq(strings.Join(r.Header.Values("Sec-Websocket-Protocol"), ","), ",") {
		if encoded, ok := strings.CutPrefix(strings.TrimSpace(protocol), socketProtocol); ok {
			token, _ := base64.RawURLEncoding.DecodeString(encoded)
			credentials = append(credentials, "Bearer "+string(token))
		}
	}
	want := "Bearer " + agentsCredential
	if identity == "own" {
		want = "Bearer " + callersCredential
	}
	if len(credentials) != 1 || credentials[0] != want {
		return fmt.Sprintf("its credentials are %q", credentials)
	}
	for _, header := range []http.Header{r.Header, r.Trailer} {
		for name, values := range header {
			switch lower := strings.ToLower(name); {
			case len(values) == 0: // a trailer that was announced and did not come
			case lower == "cookie", lower == "pipeops-agent-authorization", strings.HasPrefix(lower, "x-remote-"):
				return "it has the header " + name
			case !strings.HasPrefix(lower, "impersonate-") || identity == "own":
			case identity == "agent" || lower != "impersonate-user" && lower != "impersonate-group":
				return fmt.Sprintf("it has the header %s: %.100q", name, values)
			case slices.ContainsFunc(values, func(v string) bool { return !strings.HasPrefix(v, "pipeops:") }):
				return fmt.Sprintf("it names somebody without the prefix: %s: %.100q", name, values)
			case lower == "impersonate-user":
				users += len(values)
			case slices.Contains(values, "pipeops:tunnel"):
				groups++
			}
		}
	}
	if identity == "named" && (users != 1 || groups != 1) {
		return fmt.Sprintf("it names %d users, and the group of the tunnel %d times", users, groups)
	}
	return ""
}

// TestNoHeaderChangesWhoCalls sends requests byte by byte that try to be somebody else. Whatever becomes of them, the
// API server gets the decided identity and no other.
func TestNoHeaderChangesWhoCalls(t *testing.T) {
	t.Parallel()
	const (
		token   = "Authorization: Bearer " + agentToken + "\r\n"
		alice   = "Impersonate-User: alice\r\n"
		gate    = "Pipeops-Agent-Authorization: Bearer " + agentToken + "\r\n"
		own     = "Authorization: Bearer " + callersCredential + "\r\n"
		upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n" +
			"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
		chunked = "Transfer-Encoding: chunked\r\n"
	)
	protocol := func(token string) string {
		return "Sec-WebSocket-Protocol: v5.channel.k8s.io, " + socketProtocol +
			base64.RawURLEncoding.EncodeToString([]byte(token)) + "\r\n"
	}
	user := func(name string) string { return token + "Impersonate-User: " + name + "\r\n" }
	group := func(name string) string { return token + alice + "Impersonate-Group: " + name + "\r\n" }
	long := strings.Repeat("x", 100<<10)
	base := map[string]string{"agent": token, "named": token + alice, "own": gate + own}
	const either = 0 // only the property counts
	type attack struct {
		what, lines string
		want        int // the status; the API server answers 200
	}
	// These lines follow those that a request of each identity has.
	added := []struct {
		what, lines string
		want        [3]int // agent, named, own
	}{
		{"nothing", "", [3]int{200, 200, 200}},
		{"a second user", "Impersonate-User: bob\r\n", [3]int{403, 400, 200}},
		{"a second user, upper case", "IMPERSONATE-USER: bob\r\n", [3]int{403, 400, 200}},
		{"a group", "iMPERSONATE-gROUP: system:masters\r\n", [3]int{403, 200, 200}},
		{"an empty group", "Impersonate-Group:\r\n", [3]int{403, 400, 200}},
		{"a UID", "impersonate-uid: 1\r\n", [3]int{403, 400, 200}},
		{"an extra", "Impersonate-Extra-Scopes: all\r\n", [3]int{403, 400, 200}},
		{"a header of tomorrow", "Impersonate-Anything: x\r\n", [3]int{403, 400, 200}},
		{"a user, hop by hop", "Connection: Impersonate-User\r\n", [3]int{either, 400, 400}},
		{"a credential, hop by hop", "connection: keep-alive, AUTHORIZATION\r\n", [3]int{either, 400, 400}},
		{"two Connection headers", "Connection: close\r\nConnection: x, impersonate-group\r\n", [3]int{either, 400, 400}},
		{"the gate, hop by hop", "Connection: Pipeops-Agent-Authorization\r\n", [3]int{either, either, 400}},
		{"a folded line", "X-A: b\r\n Impersonate-User: root\r\n", [3]int{either, either, either}},
		{"a space before the colon", "Impersonate-User : root\r\n", [3]int{400, 400, 400}},
		{"an underscore", "Impersonate_User: root\r\n", [3]int{either, either, either}},
		{"a trailer", chunked + "Trailer: Impersonate-User, Authorization\r\n\r\n0\r\n" +
			"Impersonate-User: root\r\nAuthorization: Bearer x\r\n", [3]int{either, either, either}},
		{"a trailer that is not announced", chunked + "\r\n0\r\nImpersonate-Group: system:masters\r\nCookie: a=b\r\n",
			[3]int{either, either, either}},
		{"a front proxy's user", "X-Remote-User: root\r\nx-remote-group: system:masters\r\nX-REMOTE-EXTRA-a: b\r\n" +
			"Cookie: a=b\r\nX-Remote-Uid: 1\r\n", [3]int{200, 200, 200}},
		{"a second credential", "authorization: Bearer other\r\n", [3]int{401, 401, 401}},
		{"a second gate", gate, [3]int{200, 200, 401}},
		{"a user of 100 KB", "Impersonate-User: " + long + "\r\n", [3]int{403, 400, 200}},
		{"a token in a protocol", upgrade + protocol("other"), [3]int{200, 200, 401}},
		{"a token in a protocol, no upgrade", protocol("other"), [3]int{either, either, either}},
	}
	attacks := map[string][]attack{
		"agent": {
			{"Basic", "Authorization: Basic YTpi\r\n", 401},
			{"no token", "Authorization: Bearer \r\n", 401},
			{"the gate of another identity", gate, 401},
			{"a token in a protocol alone", upgrade + protocol(agentToken), 401},
		},
		"named": {
			{"no user", token, 400},
			{"a group, no user", token + "Impersonate-Group: staff\r\n", 400},
			{"no token", alice, 401},
			{"the gate of another identity", gate + alice, 401},
			{"an empty user", user(""), 400},
			{"256 bytes", user(long[:256]), 200},
			{"257 bytes", user(long[:257]), 400},
			{"100 KB", user(long), 400},
			{"a name of the system", user("system:admin"), 200},
			{"the agent's own name", user("system:serviceaccount:pipeops-system:pipeops-agent"), 200},
			{"a full-width name of the system", user("ｓｙｓｔｅｍ:masters"), 200},
			{"a name within a name", user("alice, system:masters"), 200},
			{"a space", user("alice in chains"), 200},
			{"a zero-width space", user("ali\u200bce"), 400},
			{"a zero-width joiner", user("system\u200d:masters"), 400},
			{"right to left", user("\u202eecila"), 400},
			{"a no-break space", user("alice\u00a0"), 400},
			{"a byte order mark", user("\ufeffalice"), 400},
			{"a tab", user("ali\tce"), 400},
			{"DEL", user("ali\x7fce"), 400},
			{"NUL", user("ali\x00ce"), 400},
			{"no UTF-8", user("ali\xffce"), 400},
			{"an overlong colon", user("system\xc0\xbamasters"), 400},
			{"a group of the system", group("system:masters"), 200},
			{"the group of the tunnel", group("tunnel"), 200},
			{"a group of 257 bytes", group(long[:257]), 400},
			{"a zero-width group", group("staff\u200b"), 400},
			{"a folded user", token + "Impersonate-User: alice\r\n bob\r\n", either},
		},
		"own": {
			{"Basic", gate + "Authorization: Basic YTpi\r\n", 401},
			{"no token", gate + "Authorization: Bearer \r\n", 401},
			{"the scheme alone", gate + "Authorization: Bearer\r\n", 401},
			{"two spaces", gate + "Authorization: Bearer  " + callersCredential + "\r\n", 401},
			{"a space within", gate + "Authorization: Bearer callers credential\r\n", 401},
			{"a tab", gate + "Authorization: Bearer\t" + callersCredential + "\r\n", 401},
			{"a token outside ASCII", gate + "Authorization: Bearer töken\r\n", 401},
			{"an empty header", gate + "Authorization:\r\n", 401},
			{"no credential", gate, 401},
			{"no credential, but a user", gate + "Impersonate-User: root\r\n", 401},
			{"the agent's token", gate + token, 401},
			{"the agent's token in a protocol", gate + upgrade + protocol(agentToken), 401},
			{"no gate", own, 401},
			{"a wrong gate", "Pipeops-Agent-Authorization: Bearer wrong\r\n" + own, 401},
			{"the gate in Authorization", token, 401},
			{"a token in a protocol alone", gate + upgrade + protocol(callersCredential), 200},
			{"two tokens in protocols", gate + upgrade + protocol(callersCredential) + protocol("other"), 401},
			{"an empty token in a protocol", gate + upgrade + protocol(""), 401},
			{"a token in a protocol of an upgrade to SPDY", gate + strings.Replace(upgrade, "websocket", "SPDY/3.1", 1) +
				protocol(callersCredential), 401},
			{"a token in a protocol, no upgrade", gate + protocol(callersCredential), 401},
			{"a folded credential", gate + "Authorization: Bearer\r\n " + callersCredential + "\r\n", either},
		},
	}
	rec := &recorder{seen: map[string][]*http.Request{}}
	server := httptest.NewUnstartedServer(rec)
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	for i, identity := range []string{"agent", "named", "own"} {
		for _, a := range added {
			attacks[identity] = append(attacks[identity], attack{"added: " + a.what, base[identity] + a.lines, a.want[i]})
		}
		t.Run(identity, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, func(o *controlplane.Options) { o.Identity = identity })
			w.agent.Env = append(w.agent.Env, "PIPEOPS_ACCESS_IDENTITY="+identity,
				"KUBECONFIG="+w.kubeconfigOf(&rest.Config{Host: server.URL, BearerToken: agentsCredential,
					TLSClientConfig: rest.TLSClientConfig{Insecure: true}}))
			w.startAgent()
			for n, a := range attacks[identity] {
				path := fmt.Sprintf("/api/v1/namespaces/%s/configmaps/%d", identity, n)
				code, body := w.raw(t, "GET /api/k8s"+path+" HTTP/1.1\r\nHost: agent\r\n"+a.lines+"\r\n")
				seen := rec.at(path)
				if a.want != either && code != a.want || (code == http.StatusOK) != (len(seen) == 1) {
					t.Errorf("%s: answered %d, want %d; the API server got %d requests; %.300s", a.what, code, a.want,
						len(seen), body)
				}
				for _, r := range seen {
					if fault := identityFault(identity, r); fault != "" {
						t.Errorf("%s: the API server got a request, but %s", a.what, fault)
					}
				}
			}
			w.attackByHTTP2(t, rec, identity, base[identity], func(yield func(string, int) bool) {
				for _, a := range attacks[identity] {
					if !yield(a.lines, a.want) {
						return
					}
				}
			})
		})
	}
}

// attackByHTTP2 sends requests of HTTP/2 for the Kubernetes API: with each of the lines of HTTP/1.1, and with fields
// that only HTTP/2 has, beside those of base.
func (w *world) attackByHTTP2(t *testing.T, rec *recorder, identity, base string, lines iter.Seq2[string, int]) {
	t.Helper()
	n := 0
	type fields = []hpack.HeaderField
	send := func(what string, want int, trailers fields, change func(fields) fields) {
		t.Helper()
		n++
		path := fmt.Sprintf("/api/v1/namespaces/%s/http2/%d", identity, n)
		code := w.rawHTTP2(t, change(fields{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "https"},
			{Name: ":authority", Value: "agent"}, {Name: ":path", Value: "/api/k8s" + path}}), trailers)
		seen := rec.at(path)
		if want >= 0 && code != want || len(seen) > 1 || code == http.StatusOK && len(seen) != 1 {
			t.Errorf("HTTP/2, %s: answered %d, want %d; the API server got %d requests", what, code, want, len(seen))
		}
		for _, r := range seen {
			if fault := identityFault(identity, r); fault != "" {
				t.Errorf("HTTP/2, %s: the API server got a request, but %s", what, fault)
			}
		}
	}
	for text, want := range lines {
		what := fmt.Sprintf("%.300q", text)
		if want == 0 || strings.Contains(text, "onnection: ") ||
			strings.Contains(text, "\x00") || strings.Contains(text, "\x7f") || strings.Contains(text, " :") {
			want = -1 // HTTP/2 has no such fields
		}
		send(what, want, nil, func(f fields) fields { return append(f, fieldsOf(text)...) })
	}
	const reset = 0 // the stream
	for _, a := range []struct {
		name, value string
		want        int
	}{
		{"Impersonate-User", "root", reset}, {"IMPERSONATE-GROUP", "system:masters", reset}, {"", "x", reset},
		{"impersonate-user ", "root", reset}, {"x-a", "b\r\nimpersonate-user: root", reset}, {"x-a", "b\x00c", reset},
		{":path", "/api/k8s/api/v1/namespaces/other/pods", reset}, {":authorization", "Bearer x", reset},
		{"connection", "impersonate-user", 400}, {"connection", "upgrade", 400}, {"upgrade", "websocket", 400},
		{"keep-alive", "x", 400}, {"proxy-connection", "authorization", 400}, {"transfer-encoding", "chunked", 400},
		{"te", "gzip", 400}, {"te", "trailers", 200}, {"host", "other", 200}, {"trailer", "authorization", 200},
		{"cookie", "a=b", 200}, {"x-remote-user", "root", 200},
	} {
		send(a.name+": "+a.value, a.want, nil, func(f fields) fields {
			return append(append(f, fieldsOf(base)...), hpack.HeaderField{Name: a.name, Value: a.value})
		})
	}
	for i, values := range map[int][]string{
		0: {"CONNECT", "PRI", "TRACE", "get", "G T"}, 1: {"http", "ftp", ""}, 2: {"", "other", "root@agent", "a/b"},
		3: {"*", "", "agent:443", "//agent/api/k8s/api", "https://other/api/k8s/api/v1/namespaces/other/pods",
			"/api/k8s/api/v1/../../healthz", "/api/k8s/%2e%2e/x", "/api/k8s/api\\v1", "/api/k8s/a%00b", "/x/../api/k8s/api"},
	} {
		for _, value := range values {
			send("pseudo-header "+value, -1, nil, func(f fields) fields {
				f[i].Value = value
				return append(f, fieldsOf(base)...)
			})
		}
	}
	send("extended CONNECT", -1, nil, func(f fields) fields {
		f[0].Value = "CONNECT"
		return append(append(f, hpack.HeaderField{Name: ":protocol", Value: "websocket"}), fieldsOf(base)...)
	})
	send("trailers", 200, fields{{Name: "impersonate-user", Value: "root"}, {Name: "cookie", Value: "a=b"}},
		func(f fields) fields {
			return append(append(f, fieldsOf(base)...), hpack.HeaderField{Name: "trailer", Value: "impersonate-user, cookie"})
		})
}

// fieldsOf returns the lines of a header of HTTP/1.1 as fields of HTTP/2.
func fieldsOf(lines string) (fields []hpack.HeaderField) {
	for line := range strings.SplitSeq(lines, "\r\n") {
		if name, value, ok := strings.Cut(line, ":"); ok {
			fields = append(fields, hpack.HeaderField{Name: strings.ToLower(name), Value: strings.TrimPrefix(value, " ")})
		}
	}
	return fields
}

// rawHTTP2 is raw for a request of HTTP/2 as it is. It returns 0 if there is no answer.
func (w *world) rawHTTP2(t *testing.T, fields, trailers []hpack.HeaderField) int {
	t.Helper()
	addr, config := w.cp.Direct(agentID)
	config.NextProtos = []string{http2.NextProtoTLS}
	conn, err := tls.Dial("tcp", addr, config)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = io.WriteString(conn, http2.ClientPreface) // reading returns the error
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_ = framer.WriteSettings()
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, part := range [][]hpack.HeaderField{fields, trailers} {
		block.Reset()
		for _, field := range part {
			_ = encoder.WriteField(field)
		}
		first := block.Next(16 << 10)
		if len(first) == 0 {
			break
		}
		_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: first, EndHeaders: block.Len() == 0,
			EndStream: len(trailers) == 0 || &part[0] == &trailers[0]})
		for block.Len() > 0 {
			next := block.Next(16 << 10)
			_ = framer.WriteContinuation(1, block.Len() == 0, next)
		}
	}
	for {
		switch frame, err := framer.ReadFrame(); frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			code, _ := strconv.Atoi(frame.PseudoValue("status"))
			return code
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			return 0
		default:
			if err != nil {
				return 0
			}
		}
	}
}

// kubeconfigOf writes a configuration for the agent, and returns the file's path.
func (w *world) kubeconfigOf(config *rest.Config) string {
	w.t.Helper()
	path := filepath.Join(w.group.Dir(), "agent.kubeconfig")
	if err := cluster.WriteKubeconfig(path, config); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// raw sends a request as it is, over TLS as far as the agent, and returns the status of the answer and its body.
func (w *world) raw(t *testing.T, request string) (int, string) {
	t.Helper()
	addr, config := w.cp.Direct(agentID)
	conn, err := tls.Dial("tcp", addr, config)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("%.200q: %v", request, err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body)
}
