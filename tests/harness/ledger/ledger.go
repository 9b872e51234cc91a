// Package ledger writes to an API server through hops that are made to fail. It records each attempt and each
// acknowledgement, and compares them at the end with what the API server has stored.
package ledger

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness/agent"
)

// Ledger records the writes of one run.
type Ledger struct {
	client    kubernetes.Interface
	namespace string
	prefix    string
	padding   string
	done      atomic.Int64
	acked     atomic.Int64
	stopped   atomic.Bool

	mu      sync.Mutex
	records map[string]*record // by the name of what was to be written
}

// record is one write, which must be done at most once.
type record struct {
	answers []answer // of all attempts, including client-go's retries
	outcome error    // what the caller was told; nil: it was done
}

// answer is the status of an attempt, 0 if none came, and whether the answer asked for a retry.
type answer struct {
	code  int
	again bool
}

// told returns what the last answer tells the caller about the write.
func (r *record) told() string {
	last := answer{}
	if len(r.answers) > 0 {
		last = r.answers[len(r.answers)-1]
	}
	switch {
	case r.outcome == nil:
		return acknowledged
	case last.again || last.code/100 == 4: // client-go retries on Retry-After until it gives up
		return refused
	default:
		return unknown
	}
}

const acknowledged, refused, unknown = "acknowledged", "refused", "unknown"

// New prepares writes to a namespace of the API server of config. The names of all objects begin with prefix.
// client-go retries every write that is answered with Retry-After.
func New(config *rest.Config, namespace, prefix string) (*Ledger, error) {
	l := &Ledger{namespace: namespace, prefix: prefix, padding: strings.Repeat("0123456789abcdef", 512),
		records: map[string]*record{}}
	config = rest.CopyConfig(config)
	config.QPS = -1 // no limit
	agent.Observe(config, func(r *http.Request, resp *http.Response, _ error) {
		record, ok := r.Context().Value(recordKey{}).(*record)
		if !ok {
			return
		}
		var a answer
		if resp != nil {
			a = answer{resp.StatusCode, resp.Header.Get("Retry-After") != ""}
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		record.answers = append(record.answers, a)
	})
	var err error
	l.client, err = kubernetes.NewForConfig(config)
	return l, err
}

type recordKey struct{}

// Done returns how many writes have an outcome, whatever it is.
func (l *Ledger) Done() int { return int(l.done.Load()) }

// Acknowledged returns how many writes were acknowledged.
func (l *Ledger) Acknowledged() int { return int(l.acked.Load()) }

// Stop makes Write return when the writes under way have an outcome.
func (l *Ledger) Stop() { l.stopped.Store(true) }

// account returns the name of the ServiceAccount that a writer patches. Its imagePullSecrets may hold a name twice,
// so that a patch that is done twice shows.
func (l *Ledger) account(writer int) string { return fmt.Sprintf("%s-writer-%d", l.prefix, writer) }

// Write makes the given number of writes, half of them creates and half patches. It returns when all have an outcome,
// after Stop, or when ctx ends. direct reaches the API server without the hops that fail.
func (l *Ledger) Write(ctx context.Context, direct kubernetes.Interface, writes, writers int) error {
	for writer := range writers {
		account := &corev1.ServiceAccount{
			ObjectMeta:       metav1.ObjectMeta{Name: l.account(writer)},
			ImagePullSecrets: []corev1.LocalObjectReference{{Name: "first"}},
		}
		if _, err := direct.CoreV1().ServiceAccounts(l.namespace).Create(ctx, account, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	var group sync.WaitGroup
	for writer := range writers {
		group.Go(func() {
			failures := 0 // in a row
			for i := writer; i < writes && ctx.Err() == nil && !l.stopped.Load(); i += writers {
				name := fmt.Sprintf("%s-%d", l.prefix, i)
				if i/writers%2 == 0 {
					l.record(ctx, name, func(ctx context.Context) error {
						object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name},
							Data: map[string]string{"padding": l.padding}}
						_, err := l.client.CoreV1().ConfigMaps(l.namespace).Create(ctx, object, metav1.CreateOptions{})
						return err
					})
				} else {
					l.record(ctx, name, func(ctx context.Context) error {
						patch := fmt.Sprintf(`[{"op":"add","path":"/imagePullSecrets/-","value":{"name":%q}},`+
							`{"op":"add","path":"/metadata/annotations","value":{"padding":%q}}]`, name, l.padding)
						_, err := l.client.CoreV1().ServiceAccounts(l.namespace).Patch(ctx, l.account(writer), types.JSONPatchType,
							[]byte(patch), metav1.PatchOptions{})
						return err
					})
				}
				l.done.Add(1)
				if !l.failed(name) {
					l.acked.Add(1)
					failures = 0
				} else if failures++; failures > 1 { // the first write after a failure may meet the same outage
					l.look(ctx, writer)
				}
			}
		})
	}
	group.Wait()
	return ctx.Err()
}

func (l *Ledger) record(ctx context.Context, name string, write func(context.Context) error) {
	r := &record{}
	l.mu.Lock()
	l.records[name] = r
	l.mu.Unlock()
	err := write(context.WithValue(ctx, recordKey{}, r))
	l.mu.Lock()
	defer l.mu.Unlock()
	r.outcome = err
}

func (l *Ledger) failed(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.records[name].outcome != nil
}

// look reads until there is an answer, as a caller does to learn whether a write was done. Otherwise a writer would
// use up all its writes during one outage.
func (l *Ledger) look(ctx context.Context, writer int) {
	for ctx.Err() == nil && !l.stopped.Load() {
		if _, err := l.client.CoreV1().ServiceAccounts(l.namespace).Get(ctx, l.account(writer),
			metav1.GetOptions{}); err == nil {
			return
		}
		select { // client-go has already waited, unless the connection broke
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// Balance is the result of a comparison.
type Balance struct {
	Acknowledged, Refused, Unknown int // what the callers were told
	UnknownDone                    int // of the unknown, how many were done
	Repeated                       int // writes that client-go has sent more than once
	Wrong                          []string
}

func (b Balance) String() string {
	return fmt.Sprintf("%d acknowledged, %d refused, %d with an unknown outcome (%d of them done), "+
		"%d retried by client-go, %d wrong",
		b.Acknowledged, b.Refused, b.Unknown, b.UnknownDone, b.Repeated, len(b.Wrong))
}

// Compare compares the ledger with what is stored. An acknowledged write must be there once, a refused one must not
// be there, and nothing may be there that the ledger does not know. direct reaches the API server without the hops
// that fail. All writers must have ended.
func (l *Ledger) Compare(ctx context.Context, direct kubernetes.Interface) (Balance, error) {
	stored := map[string]int{}
	configMaps, err := direct.CoreV1().ConfigMaps(l.namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return Balance{}, err
	}
	for _, o := range configMaps.Items {
		if strings.HasPrefix(o.Name, l.prefix+"-") {
			stored[o.Name]++
		}
	}
	accounts, err := direct.CoreV1().ServiceAccounts(l.namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return Balance{}, err
	}
	for _, o := range accounts.Items {
		for _, s := range o.ImagePullSecrets {
			if strings.HasPrefix(s.Name, l.prefix+"-") {
				stored[s.Name]++
			}
		}
	}
	var b Balance
	wrong := func(name, what string) {
		b.Wrong = append(b.Wrong, fmt.Sprintf("%s %s: answered %v; the caller was told: %v", name, what,
			l.records[name].answers, l.records[name].outcome))
	}
	for name, r := range l.records {
		n := stored[name]
		delete(stored, name)
		if len(r.answers) > 1 {
			b.Repeated++
		}
		told := r.told()
		switch {
		case n > 1:
			wrong(name, fmt.Sprintf("was done %d times", n))
		case apierrors.IsAlreadyExists(r.outcome):
			wrong(name, "was done, and retried")
		case told == acknowledged && n == 0:
			wrong(name, "was acknowledged, but is lost")
		case told == refused && n > 0:
			wrong(name, "was refused, but is done")
		}
		switch told {
		case acknowledged:
			b.Acknowledged++
		case refused:
			b.Refused++
		default:
			b.Unknown++
			b.UnknownDone += n
		}
	}
	for name := range stored {
		b.Wrong = append(b.Wrong, fmt.Sprintf("%s is stored, but the ledger does not know it", name))
	}
	return b, nil
}
