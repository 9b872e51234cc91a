package chaos

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	retrywatch "k8s.io/client-go/tools/watch"

	"github.com/pipeops/vm-agent/tests/harness/kubelet"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// caller records what one caller sees.
type caller struct {
	kind string

	mu     sync.Mutex
	last   time.Time     // of its successes: an answer, an event, a line
	gap    time.Duration // the longest between two of them, since reset
	failed map[string]int
	sample map[string]string // the last error of a kind
	wrong  []string          // what no fault excuses
}

func (c *caller) ok() {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if !c.last.IsZero() {
		c.gap = max(c.gap, now.Sub(c.last))
	}
	c.last = now
}

// fail records that a call failed, or that a stream broke.
func (c *caller) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	kind := kindOf(err)
	c.failed[kind]++
	c.sample[kind] = fmt.Sprintf("%.300v", err)
}

func (c *caller) report(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wrong = append(c.wrong, c.kind+": "+fmt.Sprintf(format, args...))
}

// kindOf names an error by its kind.
func kindOf(err error) string {
	var status apierrors.APIStatus
	var network net.Error
	switch {
	case errors.As(err, &status) && status.Status().Code != 0:
		return strconv.Itoa(int(status.Status().Code))
	case errors.As(err, &network) && network.Timeout(), errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	default:
		return "broken"
	}
}

// callers call through the gateway all the time.
type callers struct {
	all       []*caller
	informers []cache.SharedIndexInformer
	// add starts a caller, which runs until the test ends; addWatch one that watches.
	add      func(kind string, run func(context.Context, *caller))
	addWatch func()
}

// startCallers starts the callers and waits until each has had a success.
func startCallers(t *testing.T, w *world) *callers {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	cs := &callers{}
	t.Cleanup(func() { cancel(); running.Wait() })
	cs.add = func(kind string, run func(context.Context, *caller)) {
		c := &caller{kind: kind, failed: map[string]int{}, sample: map[string]string{}}
		cs.all = append(cs.all, c)
		running.Go(func() { run(ctx, c) })
	}
	client := func() *kubernetes.Clientset {
		config := w.caller()
		config.QPS = -1
		clients, err := kubernetes.NewForConfig(config)
		if err != nil {
			t.Error(err) // not from this goroutine: Fatal
		}
		return clients
	}
	for range 3 {
		cs.add("reads", func(ctx context.Context, c *caller) { read(ctx, c, client()) })
	}
	cs.addWatch = func() {
		cs.add("events", func(ctx context.Context, c *caller) {
			again(ctx, c, func() error { return watch(ctx, c, client()) })
		})
	}
	for range 2 {
		cs.addWatch()
		c := &caller{kind: informed, failed: map[string]int{}, sample: map[string]string{}}
		cs.all = append(cs.all, c)
		informer := inform(c, client())
		cs.informers = append(cs.informers, informer)
		running.Go(func() { informer.Run(ctx.Done()) })
	}
	cs.add("exec", func(ctx context.Context, c *caller) { again(ctx, c, func() error { return execute(ctx, c, w) }) })
	cs.add("logs", func(ctx context.Context, c *caller) {
		again(ctx, c, func() error { return follow(ctx, c, client()) })
	})
	echo := echoServer(t)
	cs.add("forward", func(ctx context.Context, c *caller) {
		again(ctx, c, func() error { return forward(ctx, c, w, echo) })
	})
	return cs
}

// pause waits for a moment, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

func read(ctx context.Context, c *caller, client kubernetes.Interface) {
	for ctx.Err() == nil {
		_, err := client.CoreV1().Pods(namespace).Get(ctx, kubelet.Pod, metav1.GetOptions{})
		switch {
		case err == nil:
			c.ok()
		case apierrors.IsNotFound(err), apierrors.IsUnauthorized(err):
			c.report("%v", err) // a caller would take it for the truth
		// 403 too, but an API server that starts says it by itself until it has read its RBAC rules.
		case ctx.Err() == nil:
			c.fail(err)
		}
		pause(ctx, 50*time.Millisecond)
	}
}

// watch follows the ConfigMaps, as kubectl get -w does with a watch that resumes.
func watch(ctx context.Context, c *caller, client kubernetes.Interface) error {
	maps := client.CoreV1().ConfigMaps(namespace)
	list, err := maps.List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	watcher, err := retrywatch.NewRetryWatcherWithContext(ctx, list.ResourceVersion, &cache.ListWatch{
		WatchFuncWithContext: maps.Watch})
	if err != nil {
		return err
	}
	defer watcher.Stop()
	last := int64(0)
	for event := range watcher.ResultChan() {
		object, ok := event.Object.(*corev1.ConfigMap)
		if !ok {
			return apierrors.FromObject(event.Object)
		}
		if now := version(object); now <= last {
			c.report("an event of version %d after one of %d", now, last)
		} else {
			last = now
		}
		c.ok()
	}
	return ctx.Err()
}

// version returns an object's version, which grows with each change in etcd.
func version(object any) int64 {
	n, _ := strconv.ParseInt(object.(*corev1.ConfigMap).ResourceVersion, 10, 64)
	return n
}

// informed is the kind of informers. They are compared with the API server, but not timed: after several failures they
// wait for up to half a minute by themselves.
const informed = "informer"

// inform returns an informer of the ConfigMaps, which reports an object whose version goes back.
func inform(c *caller, client kubernetes.Interface) cache.SharedIndexInformer {
	factory := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(namespace))
	informer := factory.Core().V1().ConfigMaps().Informer()
	_ = informer.SetWatchErrorHandler(func(*cache.Reflector, error) {}) // it would log them
	_, _ = informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		UpdateFunc: func(before, after any) {
			if version(after) < version(before) {
				c.report("an object went back from version %d to %d", version(before), version(after))
			}
		},
	})
	return informer
}

// again runs a stream again whenever it ends.
func again(ctx context.Context, c *caller, stream func() error) {
	for ctx.Err() == nil {
		err := stream()
		if ctx.Err() == nil {
			if err == nil {
				err = io.EOF
			}
			c.fail(err)
		}
		pause(ctx, 200*time.Millisecond)
	}
}

// lines reads "line 0", "line 1", … and reports every other byte. It returns when the stream ends, which may be in the
// middle of a line.
func (c *caller) lines(r io.Reader) {
	reader := bufio.NewReader(r)
	for i := 0; ; i++ {
		line, err := reader.ReadString('\n')
		want := fmt.Sprintf("line %d\n", i)
		if err != nil && strings.HasPrefix(want, line) {
			return
		}
		if line != want {
			c.report("%q in place of %q", line, want)
			return
		}
		c.ok()
	}
}

func (w *world) pod(resource string) *url.URL {
	u, _ := url.Parse(w.caller().Host)
	return u.JoinPath("api/v1/namespaces", namespace, "pods", kubelet.Pod, resource)
}

// execute runs cat in the pod, and compares what comes back with what was sent.
func execute(ctx context.Context, c *caller, w *world) error {
	u := w.pod("exec")
	options := corev1.PodExecOptions{Container: "c", Command: []string{"cat"}, Stdin: true, Stdout: true}
	values, err := scheme.ParameterCodec.EncodeParameters(&options, corev1.SchemeGroupVersion)
	if err != nil {
		return err
	}
	u.RawQuery = values.Encode()
	executor, err := remotecommand.NewWebSocketExecutor(w.caller(), http.MethodGet, u.String())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	in, input := io.Pipe()
	output, out := io.Pipe()
	var both sync.WaitGroup
	both.Go(func() { count(ctx, input) })
	both.Go(func() { c.lines(output) })
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: in, Stdout: out})
	cancel()
	_, _ = in.Close(), out.Close()
	both.Wait()
	return err
}

func follow(ctx context.Context, c *caller, client kubernetes.Interface) error {
	log, err := client.CoreV1().Pods(namespace).GetLogs(kubelet.Pod, &corev1.PodLogOptions{Follow: true}).Stream(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	reader := bufio.NewReader(log)
	if line, err := reader.ReadString('\n'); err != nil || line != "first line\n" {
		if !strings.HasPrefix("first line\n", line) {
			c.report("%q in place of the first line", line)
		}
		return io.ErrUnexpectedEOF
	}
	c.lines(reader)
	return nil
}

// echoServer returns the port of a server that sends back what it gets.
func echoServer(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(conn, conn)
				_ = conn.Close()
			}()
		}
	}()
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	return port
}

func forward(ctx context.Context, c *caller, w *world, port string) error {
	dialer, err := portforward.NewSPDYOverWebsocketDialer(w.pod("portforward"), w.caller())
	if err != nil {
		return err
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.New(dialer, []string{"0:" + port}, stop, ready, io.Discard, io.Discard)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- forwarder.ForwardPorts() }()
	defer close(stop)
	select {
	case <-ready:
	case err := <-ended:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
	ports, err := forwarder.GetPorts()
	if err != nil {
		return err
	}
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", ports[0].Local))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var both sync.WaitGroup
	both.Go(func() { count(ctx, conn) })
	both.Go(func() { c.lines(conn); cancel() })
	select {
	case err = <-ended:
	case <-ctx.Done():
	}
	cancel()
	_ = conn.Close()
	both.Wait()
	return err
}

// reset forgets gaps and errors.
func (cs *callers) reset() {
	for _, c := range cs.all {
		c.mu.Lock()
		c.gap, c.failed, c.sample = 0, map[string]int{}, map[string]string{}
		c.mu.Unlock()
	}
}

// since returns nil if every caller has had a success since then.
func (cs *callers) since(then time.Time) error {
	for _, c := range cs.all {
		c.mu.Lock()
		last := c.last
		c.mu.Unlock()
		if c.kind != informed && !last.After(then) {
			return fmt.Errorf("%s had the last success %s before", c.kind, then.Sub(last).Round(time.Second/10))
		}
	}
	return nil
}

// seen is what callers of one kind have seen since reset.
type seen struct {
	gap    time.Duration
	failed map[string]int
}

func (s seen) String() string {
	text := fmt.Sprintf("%.1f s", s.gap.Seconds())
	for i, kind := range slices.Sorted(maps.Keys(s.failed)) {
		separator := ", "
		if i == 0 {
			separator = "; "
		}
		text += fmt.Sprintf("%s%d %s", separator, s.failed[kind], kind)
	}
	return text
}

func (cs *callers) seen(kinds ...string) seen {
	s := seen{failed: map[string]int{}}
	for _, c := range cs.all {
		if !slices.Contains(kinds, c.kind) {
			continue
		}
		c.mu.Lock()
		s.gap = max(s.gap, c.gap)
		for kind, n := range c.failed {
			s.failed[kind] += n
		}
		c.mu.Unlock()
	}
	return s
}

// samples returns an error of each kind, and forgets them.
func (cs *callers) samples() (samples []string) {
	for _, c := range cs.all {
		c.mu.Lock()
		for kind, sample := range c.sample {
			samples = append(samples, fmt.Sprintf("%s: %s: %s", c.kind, kind, sample))
		}
		clear(c.sample)
		c.mu.Unlock()
	}
	slices.Sort(samples)
	return slices.Compact(samples)
}

// wrong returns what no fault excuses, and forgets it.
func (cs *callers) wrong() (wrong []string) {
	for _, c := range cs.all {
		c.mu.Lock()
		wrong = append(wrong, c.wrong...)
		c.wrong = nil
		c.mu.Unlock()
	}
	return wrong
}

// settled waits until the informers hold what the API server holds.
func (cs *callers) settled(ctx context.Context, direct kubernetes.Interface) error {
	return process.Poll(ctx, time.Minute, nil, func() error {
		list, err := direct.CoreV1().ConfigMaps(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, informer := range cs.informers {
			if n := len(informer.GetStore().List()); n != len(list.Items) {
				return fmt.Errorf("an informer holds %d of %d objects", n, len(list.Items))
			}
			for _, want := range list.Items {
				got, ok, _ := informer.GetStore().GetByKey(namespace + "/" + want.Name)
				if !ok || got.(*corev1.ConfigMap).ResourceVersion != want.ResourceVersion {
					return fmt.Errorf("an informer does not hold %s as it is stored", want.Name)
				}
			}
		}
		return nil
	})
}
