package attack

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// callTimeout bounds a call of an honest caller with all its retries.
const callTimeout = 30 * time.Second

// Calls records the calls of an honest caller.
type Calls struct {
	Failures []error

	took []time.Duration // of the calls that succeeded
}

// Percentile returns the duration that p percent of the calls stayed below.
func (c *Calls) Percentile(p int) time.Duration {
	if len(c.took) == 0 {
		return 0
	}
	slices.Sort(c.took)
	return c.took[min(len(c.took)*p/100, len(c.took)-1)]
}

func (c *Calls) String() string {
	text := fmt.Sprintf("%d calls, %d failed; p50 %s, p99 %s, max %s", len(c.took)+len(c.Failures), len(c.Failures),
		c.Percentile(50).Round(time.Millisecond/10), c.Percentile(99).Round(time.Millisecond),
		c.Percentile(100).Round(time.Millisecond))
	if len(c.Failures) > 0 {
		text += fmt.Sprintf("; such as: %v", errors.Join(c.Failures[:min(3, len(c.Failures))]...))
	}
	return text
}

// Call is an honest caller. Until ctx ends it lists and watches by client-go, with its retries, over kept and over
// fresh connections: four callers, each of which pauses between two calls. A watch is measured to its first event,
// and must end as the API server ends it.
func Call(ctx context.Context, t Target, pause time.Duration) (*Calls, error) {
	calls := &Calls{}
	var mu sync.Mutex
	var callers sync.WaitGroup
	for _, keepAlive := range []bool{true, false} {
		transport := t.Transport(keepAlive)
		defer transport.CloseIdleConnections()
		client, err := kubernetes.NewForConfig(&rest.Config{Host: t.URL(t.Prefix), BearerToken: t.Token,
			Transport: transport, QPS: -1})
		if err != nil {
			return nil, err
		}
		for _, call := range []func(context.Context, kubernetes.Interface) (time.Duration, error){list, watchOne} {
			callers.Go(func() {
				for {
					// A call that has begun may end after the attack.
					calling, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
					took, err := call(calling, client)
					cancel()
					mu.Lock()
					if err != nil {
						calls.Failures = append(calls.Failures, err)
					} else {
						calls.took = append(calls.took, took)
					}
					mu.Unlock()
					select {
					case <-time.After(pause):
					case <-ctx.Done():
						return
					}
				}
			})
		}
	}
	callers.Wait()
	return calls, nil
}

func list(ctx context.Context, client kubernetes.Interface) (time.Duration, error) {
	begin := time.Now()
	_, err := client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	return time.Since(begin), err
}

func watchOne(ctx context.Context, client kubernetes.Interface) (time.Duration, error) {
	begin, second := time.Now(), int64(1)
	w, err := client.CoreV1().Namespaces().Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=default",
		TimeoutSeconds: &second})
	if err != nil {
		return 0, fmt.Errorf("watch: %w", err)
	}
	defer w.Stop()
	var took time.Duration
	for event := range w.ResultChan() {
		if event.Type == watch.Error {
			return 0, fmt.Errorf("watch: %v", event.Object)
		}
		if took == 0 {
			took = time.Since(begin)
		}
	}
	if took == 0 {
		return 0, errors.New("watch: it ended without an event")
	}
	return took, nil
}
