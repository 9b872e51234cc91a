package chaos

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/ledger"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

const (
	writers  = 4
	recovery = 3 * time.Minute // bounds it
)

// run is the whole path with callers.
type run struct {
	*world

	callers *callers
	strikes int
	pause   time.Duration // of a writer before each write, so that a long run does not fill etcd
}

func newRun(t *testing.T) *run {
	t.Helper()
	w := newWorld(t)
	r := &run{world: w, callers: startCallers(t, w), pause: 200 * time.Millisecond}
	if err := process.Poll(t.Context(), time.Minute, nil, func() error {
		for _, c := range r.callers.all {
			c.mu.Lock()
			last := c.last
			c.mu.Unlock()
			if last.IsZero() && c.kind != "events" && c.kind != informed { // nothing is written yet
				return fmt.Errorf("%s: no success yet; failed: %v", c.kind, c.failed)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return r
}

const header = `| fault | reads: longest gap; errors | events, exec, logs, port-forward: longest gap; broken | ` +
	`writes acknowledged, refused, unknown | lost, repeated, altered | recovered after |
| --- | --- | --- | --- | --- | --- |
`

// strike does what breaks does while callers call, waits until all have recovered, and compares what they know with
// what is stored. It returns a line of the table.
func (r *run) strike(t *testing.T, name string, breaks func() error) string {
	t.Helper()
	ctx := t.Context()
	r.strikes++
	config := r.caller()
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return slowly{next, r.pause} })
	l, err := ledger.New(config, namespace, fmt.Sprintf("strike-%d", r.strikes))
	if err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() { written <- l.Write(ctx, r.cluster.Client, 1<<30, writers) }()
	acknowledged := func(n int) error {
		if got := l.Acknowledged(); got < n {
			return fmt.Errorf("%d of %d writes are acknowledged", got, n)
		}
		return nil
	}
	harness.Eventually(t, time.Minute, func() error { return acknowledged(2 * writers) })
	harness.Eventually(t, time.Minute, func() error { return r.callers.since(time.Now().Add(-10 * time.Second)) })
	r.callers.reset()
	if err := breaks(); err != nil {
		t.Fatal(err)
	}
	over, before := time.Now(), l.Acknowledged()
	recovered := process.Poll(ctx, recovery, nil, func() error {
		return errors.Join(r.callers.since(over), acknowledged(before+writers))
	})
	took := time.Since(over)
	l.Stop()
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	wrong := r.callers.wrong()
	if samples := r.callers.samples(); len(samples) > 0 {
		t.Logf("%s: errors such as\n%s", name, strings.Join(samples, "\n"))
	}
	balance, err := l.Compare(ctx, r.cluster.Client)
	if err != nil {
		t.Fatal(err)
	}
	wrong = append(wrong, balance.Wrong...)
	if recovered != nil {
		t.Errorf("%s: not recovered: %v", name, recovered)
	}
	for _, what := range wrong {
		t.Errorf("%s: %s", name, what)
	}
	row := fmt.Sprintf("| %s | %s | %s | %d, %d, %d | %d | %.1f s |\n", name, r.callers.seen("reads"),
		r.callers.seen("events", "exec", "logs", "forward"), balance.Acknowledged, balance.Refused, balance.Unknown,
		len(wrong), took.Seconds())
	// The next strike's informers need not hold these. After a long run it takes several calls.
	harness.Eventually(t, 10*time.Minute, func() error {
		return r.cluster.Client.CoreV1().ConfigMaps(namespace).DeleteCollection(ctx, metav1.DeleteOptions{},
			metav1.ListOptions{})
	})
	return row
}

// slowly sends each request after a pause.
type slowly struct {
	next  http.RoundTripper
	pause time.Duration
}

func (s slowly) RoundTrip(r *http.Request) (*http.Response, error) {
	pause(r.Context(), s.pause)
	return s.next.RoundTrip(r)
}

// alone has one fault strike, for as long as it lasts.
func (r *run) alone(ctx context.Context, f fault) error {
	if err := f.begin(r.world); err != nil {
		return fmt.Errorf("%s: %w", f.name, err)
	}
	if f.end == nil {
		return nil
	}
	pause(ctx, f.lasts)
	return f.end(r.world)
}

// TestChaos has faults strike alone, in pairs, and at random. Without settings it is short enough for every run of the
// tests:
//
//   - CHAOS_FAULTS, a regular expression, selects the faults that strike alone by name.
//   - CHAOS_PAIRS is the number of pairs, and CHAOS_DURATION how long faults strike at random. By default no fault of
//     these lasts for more than 5 seconds.
//   - CHAOS_SEED repeats the pairs and the sequence of a run.
func TestChaos(t *testing.T) {
	r := newRun(t)
	var table strings.Builder
	t.Cleanup(func() { t.Logf("\n%s%s", header, table.String()) })
	strike := func(t *testing.T, name string, breaks func() error) {
		t.Helper()
		row := r.strike(t, name, breaks)
		table.WriteString(row)
		t.Log(strings.TrimSpace(row))
	}
	n, err := strconv.ParseUint(cmp.Or(os.Getenv("CHAOS_SEED"), strconv.FormatInt(time.Now().UnixNano(), 10)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("CHAOS_SEED=%d", n)
	random := rand.New(rand.NewPCG(n, n))
	settled := func(t *testing.T) { // not after each fault: after some failures, informers wait for half a minute
		t.Helper()
		if err := r.callers.settled(t.Context(), r.cluster.Client); err != nil {
			t.Error(err)
		}
	}
	t.Run("alone", func(t *testing.T) {
		name, err := regexp.Compile(cmp.Or(os.Getenv("CHAOS_FAULTS"),
			`killed$|^API server restarted|away for 5s|cut for 1s`))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range like(name) {
			strike(t, f.name, func() error { return r.alone(t.Context(), f) })
		}
		settled(t)
	})
	t.Run("pairs", func(t *testing.T) {
		longest := 5 * time.Second
		if os.Getenv("CHAOS_PAIRS") != "" {
			longest = time.Hour
		}
		for range number(t, "CHAOS_PAIRS", 1) {
			first := pick(random, longest, nil)
			second := pick(random, longest, map[string]bool{first.part: true})
			after := time.Duration(random.Int64N(int64(max(first.lasts, 5*time.Second))))
			name := fmt.Sprintf("%s; %.1f s later: %s", first.name, after.Seconds(), second.name)
			strike(t, name, func() error {
				var both errgroup.Group
				both.Go(func() error { return r.alone(t.Context(), first) })
				pause(t.Context(), after)
				both.Go(func() error { return r.alone(t.Context(), second) })
				return both.Wait()
			})
		}
		settled(t)
	})
	t.Run("sequence", func(t *testing.T) {
		lasts, err := time.ParseDuration(cmp.Or(os.Getenv("CHAOS_DURATION"), "10s"))
		if err != nil {
			t.Fatal(err)
		}
		strike(t, fmt.Sprintf("at random for %s", lasts), func() error { return r.sequence(t, random, lasts) })
		settled(t)
	})
}

func number(t *testing.T, name string, otherwise int) int {
	t.Helper()
	n, err := strconv.Atoi(cmp.Or(os.Getenv(name), strconv.Itoa(otherwise)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// pick returns a fault of a part that is not busy, and that lasts no longer.
func pick(random *rand.Rand, longest time.Duration, busy map[string]bool) fault {
	all := faults()
	for {
		if f := all[random.IntN(len(all))]; !busy[f.part] && f.lasts <= longest {
			return f
		}
	}
}

// sequence has faults strike at random, so that some overlap, but no two of one part.
func (r *run) sequence(t *testing.T, random *rand.Rand, lasts time.Duration) error {
	var running errgroup.Group
	var mu sync.Mutex
	busy := map[string]bool{}
	for end := time.Now().Add(lasts); time.Now().Before(end) && t.Context().Err() == nil; {
		mu.Lock()
		f := pick(random, lasts/2, busy)
		busy[f.part] = true
		mu.Unlock()
		t.Logf("%s %s", time.Now().Format(time.TimeOnly), f.name)
		running.Go(func() error {
			err := r.alone(t.Context(), f)
			mu.Lock()
			defer mu.Unlock()
			busy[f.part] = false
			return err
		})
		pause(t.Context(), 2*time.Second+time.Duration(random.Int64N(int64(15*time.Second))))
	}
	return running.Wait()
}
