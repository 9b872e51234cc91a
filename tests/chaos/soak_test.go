package chaos

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// TestSoak has nothing fail, while leases of 5 minutes, their tokens and their certificates are renewed: no stream
// breaks and no call fails, for as long as SOAK_DURATION. It shows what the processes hold, and whether that grows; see
// tests/SOAK.md.
func TestSoak(t *testing.T) {
	lasts, err := time.ParseDuration(cmp.Or(os.Getenv("SOAK_DURATION"), "15s"))
	if err != nil {
		t.Fatal(err)
	}
	r := newRun(t)
	r.cp.SetTerms(controlplane.Terms{Life: 5 * time.Minute})
	for range number(t, "SOAK_WATCHES", 20) {
		r.callers.addWatch()
	}
	r.pause = time.Second
	var samples []sample
	defer func() { // also if what follows the hours fails
		if len(samples) > 0 {
			show(t, samples, lasts)
		}
	}()
	row := r.strike(t, fmt.Sprintf("none, for %s", lasts), func() error {
		every := min(15*time.Second, lasts/10)
		tick := time.NewTicker(every)
		defer tick.Stop()
		for begin := time.Now(); time.Since(begin) < lasts && t.Context().Err() == nil; <-tick.C {
			values, err := r.sample(t.Context())
			if err != nil {
				return err
			}
			samples = append(samples, sample{time.Since(begin), values})
		}
		return nil
	})
	t.Logf("\n%s%s", header, row)
	for _, c := range r.callers.all {
		c.mu.Lock()
		if len(c.failed) > 0 {
			t.Errorf("%s: %v", c.kind, c.failed)
		}
		c.mu.Unlock()
	}
}

// show prints the growth of each figure, and draws them all.
func show(t *testing.T, samples []sample, lasts time.Duration) {
	t.Helper()
	t.Logf("\n%s", growth(samples, lasts))
	root, err := process.Root()
	if err == nil {
		err = os.WriteFile(filepath.Join(root, ".build", "soak.svg"), []byte(draw(samples)), 0o644)
	}
	if err != nil {
		t.Error(err)
	}
}

// sample is what the processes held at a time.
type sample struct {
	at     time.Duration
	values []figure
}

type figure struct {
	name  string
	value float64
}

// sample measures the processes of the first replica, and frps.
func (r *run) sample(ctx context.Context) (values []figure, err error) {
	for _, p := range []struct {
		name string
		pid  int
	}{
		{"proxy", r.proxy[0].Pid()}, {"bootstrap", r.bootstrap[0].Pid()}, {"frpc", r.frpc[0].Pid()}, {"frps", r.cp.FrpsPid()},
	} {
		rss, err := process.Memory(p.pid, "VmRSS")
		if err != nil {
			return nil, err
		}
		dir := fmt.Sprintf("/proc/%d/fd", p.pid)
		files, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		sockets := 0
		for _, file := range files {
			if to, err := os.Readlink(filepath.Join(dir, file.Name())); err == nil && strings.HasPrefix(to, "socket:") {
				sockets++
			}
		}
		values = append(values, figure{p.name + " MB", rss}, figure{p.name + " files", float64(len(files))},
			figure{p.name + " connections", float64(sockets)})
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.agents[0].Operations+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: r.inside}}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		for metric, name := range map[string]string{"go_goroutines ": "proxy goroutines",
			"go_memstats_heap_inuse_bytes ": "proxy heap MiB"} {
			if text, ok := strings.CutPrefix(lines.Text(), metric); ok {
				value, err := strconv.ParseFloat(text, 64)
				if err != nil {
					return nil, err
				}
				if strings.HasSuffix(name, "MiB") {
					value /= 1 << 20
				}
				values = append(values, figure{name, value})
			}
		}
	}
	slices.SortFunc(values, func(a, b figure) int { return cmp.Compare(a.name, b.name) })
	return values, lines.Err()
}

// growth returns a table of the mean and the slope of each figure after an eighth of the run, by least squares.
func growth(samples []sample, lasts time.Duration) string {
	first := slices.IndexFunc(samples, func(s sample) bool { return s.at >= lasts/8 })
	if first < 0 {
		return ""
	}
	samples = samples[first:]
	text := "| | mean | growth an hour | standard error |\n| --- | --- | --- | --- |\n"
	for i, f := range samples[0].values {
		n, x, y := float64(len(samples)), 0.0, 0.0
		for _, s := range samples {
			x += s.at.Hours() / n
			y += s.values[i].value / n
		}
		var xx, xy, rest float64
		for _, s := range samples {
			xx += (s.at.Hours() - x) * (s.at.Hours() - x)
			xy += (s.at.Hours() - x) * (s.values[i].value - y)
		}
		slope := xy / xx
		for _, s := range samples {
			e := s.values[i].value - y - slope*(s.at.Hours()-x)
			rest += e * e
		}
		text += fmt.Sprintf("| %s | %.1f | %+.2f | %.2f |\n", f.name, y, slope, math.Sqrt(rest/max(n-2, 1)/xx))
	}
	return text
}

// draw returns an SVG with a line for each figure.
func draw(samples []sample) string {
	const across, width, height = 2, 440, 130
	var svg strings.Builder
	figures := samples[0].values
	fmt.Fprintf(&svg, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" `+
		`font-size="11"><rect width="100%%" height="100%%" fill="white"/>`+"\n",
		across*width, (len(figures)+across-1)/across*height)
	end := samples[len(samples)-1].at
	for i, f := range figures {
		x, y := i%across*width, i/across*height
		most := 0.0
		for _, s := range samples {
			most = max(most, s.values[i].value)
		}
		fmt.Fprintf(&svg, `<text x="%d" y="%d">%s, up to %.1f, in %s</text><polyline fill="none" stroke="#1f6feb" points="`,
			x+10, y+20, f.name, most, end.Round(time.Minute))
		for _, s := range samples {
			fmt.Fprintf(&svg, "%.1f,%.1f ", float64(x+10)+float64(s.at)/float64(max(end, 1))*(width-20),
				float64(y+height-5)-s.values[i].value/max(most, 1)*(height-35))
		}
		svg.WriteString(`"/>` + "\n")
	}
	svg.WriteString("</svg>\n")
	return svg.String()
}
