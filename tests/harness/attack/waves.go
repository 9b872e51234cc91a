package attack

import (
	"context"
	"crypto/tls"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Names of the runners that the waves send commands to: HostileRunner and LoopRunner.
const (
	Hostile = "hostile"
	Loop    = "loop"
)

// Create makes the objects that the waves read: a namespace's list of 10 MB, of which the watches see 1 MB.
func Create(ctx context.Context, client kubernetes.Interface, namespace string) error {
	for i := range 40 {
		object := &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("large-%d", i),
				Labels: map[string]string{"watched": fmt.Sprint(i < 4)}},
			Data: map[string]string{"x": strings.Repeat("x", 250_000)},
		}
		if _, err := client.CoreV1().ConfigMaps(namespace).Create(ctx, object, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	return nil
}

// Ways holds the ways by which attackers reach the proxy.
type Ways struct {
	Operations Target // the operations listener
	Tunnel     Target // the tunnel listener over TLS, with a token
	Frps       Target // the same through frps, as real callers do
	Namespace  string // the namespace of Create
}

// Size is the number of attackers of each kind.
type Size struct {
	Floods   int // on each listener, and a quarter of that through frps
	Watches  int
	Lists    int
	Uploads  int
	Idle     int
	Commands int // for each of the two runners

	Ramp time.Duration // until all have begun, and between two attempts of one attacker
}

// Waves returns all attacks. Each kind has an address of its own, so that the proxy can tell them apart from one
// another and from honest callers. ATTACKS, a regular expression such as "stalled lists|loop", selects attacks by
// name.
func Waves(w Ways, s Size) ([]Wave, error) {
	var waves []Wave
	add := func(name string, n int, attack Attack) {
		waves = append(waves, Wave{name, n, max(float64(n)/s.Ramp.Seconds(), 1), attack})
	}
	path := "/api/v1/namespaces/" + w.Namespace + "/configmaps"
	const uploads = "/api/v1/namespaces/default/configmaps" // the agent's own namespace may be closed
	watch := path + "?watch=true&labelSelector=watched%3Dtrue"
	plain := w.Tunnel
	plain.TLS = nil
	w.Tunnel.TLS, w.Frps.TLS = cheap(w.Tunnel.TLS), cheap(w.Frps.TLS)
	const flooder, reader, uploader, idler, commander = "127.0.0.3", "127.0.0.4", "127.0.0.5", "127.0.0.6", "127.0.0.7"

	add("header floods, operations listener", s.Floods/2, HeaderFlood(w.Operations, false))
	add("header floods, operations listener, whole", s.Floods/2, HeaderFlood(w.Operations, true))
	add("header floods, tunnel listener, TLS", s.Floods/2, HeaderFlood(w.Tunnel.from(flooder), false))
	add("header floods, tunnel listener, plain, whole", s.Floods/2, HeaderFlood(plain.from(flooder), true))
	add("header floods, frps", s.Floods/4, HeaderFlood(w.Frps.from(flooder), false))
	// Through frps, frps and the sockets on the way buffer most of an answer. Directly at the listener, nothing does.
	for name, way := range map[string]Target{"frps": w.Frps, "tunnel listener": w.Tunnel} {
		add("stalled watches, "+name, s.Watches/2, StalledRead(way.from(reader), watch))
		add("stalled lists, "+name, s.Lists/2, StalledRead(way.from(reader), path))
	}
	add("stalled uploads of 256 KiB", s.Uploads*3/4, StalledUpload(w.Frps.from(uploader), uploads, 256<<10))
	add("stalled uploads of 1 MiB", s.Uploads/4, StalledUpload(w.Frps.from(uploader), uploads, 1<<20))
	add("idle connections, operations listener", s.Idle/5, IdleConnection(w.Operations))
	add("idle connections, tunnel listener", s.Idle*2/5, IdleConnection(w.Tunnel.from(idler)))
	add("idle connections, frps", s.Idle*2/5, IdleConnection(w.Frps.from(idler)))
	h2, anonymous := w.Tunnel, w.Tunnel
	h2.TLS = h2.TLS.Clone()
	h2.TLS.NextProtos = []string{"h2"}
	anonymous.TLS, anonymous.Token = h2.TLS, ""
	for kind, block := range blocks() {
		add("HTTP/2: unfinished headers, "+kind, s.Floods/2, UnfinishedHeaders(anonymous.from(flooder), "", block))
		add("HTTP/2: unfinished headers beside a watch, "+kind, s.Floods/10, UnfinishedHeaders(h2.from(reader), watch, block))
	}
	for _, kind := range []string{"long", "short", "one byte"} {
		block := blocks()[kind]
		add("HTTP/2: unread answers, 401, "+kind, s.Floods/25, UnreadAnswers(anonymous.from(flooder), block))
		add("HTTP/2: unread answers, 400, "+kind, s.Floods/25,
			UnreadAnswers(anonymous.from(flooder), append(block[:len(block):len(block)], literal("connection", "x")...)))
		add("HTTP/2: unread answers, 431, "+kind, s.Floods/25, UnreadAnswers(anonymous.from(flooder),
			append(block[:len(block):len(block)], literal("a", strings.Repeat("a", frameSize-100))...)))
	}
	for name, attack := range map[string]func(Target, string) Attack{"streams": StalledStreams,
		"connections": StalledConnection} {
		add("HTTP/2: stalled "+name+", lists", 1, attack(h2.from(reader), path))
		add("HTTP/2: stalled "+name+", watches", s.Watches/25, attack(h2.from(reader), watch))
	}
	connections := s.Uploads / 4 / http2Streams
	add("HTTP/2: stalled uploads of 256 KiB", connections, StalledUploads(h2.from(uploader), uploads, 256<<10))
	add("HTTP/2: stalled uploads of 1 MiB", connections, StalledUploads(h2.from(uploader), uploads, 1<<20))
	add("HTTP/2: idle connections", s.Idle/5, IdleHTTP2(h2.from(idler)))
	add("HTTP/2: rapid reset", s.Floods/25, RapidReset(h2.from(flooder), path))
	add("HTTP/2: rapid reset, anonymous", s.Floods/25, RapidReset(anonymous.from(flooder), path))
	add("HTTP/2: control frames", s.Floods/5, ControlFrames(anonymous.from(flooder)))
	add("hostile runner", s.Commands, Command(w.Frps.from(commander), Hostile))
	add("loop of runners", s.Commands, Command(w.Frps.from(commander), Loop))

	only, err := regexp.Compile(os.Getenv("ATTACKS"))
	if err != nil {
		return nil, fmt.Errorf("ATTACKS: %w", err)
	}
	waves = slices.DeleteFunc(waves, func(w Wave) bool { return !only.MatchString(w.Name) })
	if len(waves) == 0 {
		return nil, fmt.Errorf("ATTACKS=%s matches no attack", only)
	}
	return waves, nil
}

// cheap halves the cost of TLS handshakes, so that the attack is on memory and not on the CPU.
func cheap(config *tls.Config) *tls.Config {
	config = config.Clone()
	config.InsecureSkipVerify, config.VerifyConnection = true, nil
	config.CurvePreferences = []tls.CurveID{tls.X25519}
	return config
}

func (t Target) from(ip string) Target {
	t.From = ip
	return t
}
