// Command mutate plants one fault after another in the shipped code, and checks that a unit test notices each. The
// faults are the table in mutants.go. It changes no file: go test builds with an overlay.
//
//	mutate [PATTERN]
//
// PATTERN is a regular expression: only mutants whose file or fault matches are planted. As many are planted at a time
// as GOMAXPROCS says.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

// fault is what a mutant changes in a file.
type fault struct {
	name string // what somebody would suffer from it
	find string // text of the file, which occurs once
	put  string // in its place
	// test fails with the fault. It is in the file's package, or named with another one: proxy/server.TestName. Empty: any
	// of the package, to find out which. It is "equivalent: " and a reason where nobody can tell the mutant from the
	// original.
	test string
}

// mutant is a fault in its file, which has its path from the root of the repository.
type mutant struct {
	file string
	fault
}

const equivalent = "equivalent: "

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	pattern, err := regexp.Compile(strings.Join(args, " "))
	if err != nil {
		return err
	}
	root, err := process.Root()
	if err != nil {
		return err
	}
	temp, err := os.MkdirTemp("", "mutate-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(temp) }()
	var chosen []mutant
	tests := map[string][]string{} // by package
	for _, m := range all() {
		if !pattern.MatchString(m.file + ": " + m.name) {
			continue
		}
		if err := m.check(root); err != nil {
			return err
		}
		if why, same := strings.CutPrefix(m.test, equivalent); same {
			fmt.Printf("equivalent  %s: %s: %s\n", m.file, m.name, why)
			continue
		}
		chosen = append(chosen, m)
		pkg, name := m.target()
		tests[pkg] = append(tests[pkg], name)
	}
	for pkg, names := range tests { // they must pass without a fault
		if out, err := goTest(ctx, root, pkg, strings.Join(names, "|")); err != nil {
			return fmt.Errorf("the tests of %s fail without a mutant: %w\n%s", pkg, err, out)
		}
	}
	begin := time.Now()
	var caught atomic.Int32
	work := make(chan mutant)
	var workers sync.WaitGroup
	for worker := range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for m := range work {
				switch noticed, err := m.plant(ctx, root, filepath.Join(temp, fmt.Sprint(worker))); {
				case err != nil:
					fmt.Printf("ERROR       %s: %s: %v\n", m.file, m.name, err)
				case noticed == "":
					fmt.Printf("SURVIVED    %s: %s\n", m.file, m.name)
				default:
					caught.Add(1)
					fmt.Printf("caught      %s: %s: by %s\n", m.file, m.name, noticed)
				}
			}
		})
	}
	for _, m := range chosen {
		work <- m
	}
	close(work)
	workers.Wait()
	fmt.Printf("%d of %d mutants are caught, in %s\n", caught.Load(), len(chosen), time.Since(begin).Round(time.Second))
	if int(caught.Load()) < len(chosen) {
		return errors.New("a mutant survived, or could not be planted: write the test that notices it")
	}
	return nil
}

// all returns the table's mutants.
func all() (list []mutant) {
	for _, in := range mutants {
		for _, f := range in.faults {
			list = append(list, mutant{in.file, f})
		}
	}
	return list
}

// check returns an error unless the text occurs once and the test exists, so that the table does not rot.
func (m mutant) check(root string) error {
	data, err := os.ReadFile(filepath.Join(root, m.file))
	if err != nil {
		return err
	}
	if n := strings.Count(string(data), m.find); n != 1 || m.find == m.put {
		return fmt.Errorf("%s: %s: its text occurs %d times: %q", m.file, m.name, n, m.find)
	}
	pkg, test := m.target()
	if test == "" || strings.HasPrefix(m.test, equivalent) {
		return nil
	}
	files, _ := filepath.Glob(filepath.Join(root, pkg, "*_test.go"))
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil || strings.Contains(string(data), "\nfunc "+test+"(t *testing.T) {") {
			return err
		}
	}
	return fmt.Errorf("%s: %s: there is no test %s in %s", m.file, m.name, test, pkg)
}

// target returns the package and the pattern of the tests.
func (m mutant) target() (pkg, test string) {
	if pkg, name, ok := strings.Cut(m.test, "."); ok {
		return pkg, name
	}
	return path.Dir(m.file), m.test
}

// plant runs the test with the fault. It returns the first test that fails, or "".
func (m mutant) plant(ctx context.Context, root, temp string) (noticed string, err error) {
	source := filepath.Join(root, m.file)
	data, err := os.ReadFile(source)
	if err != nil {
		return "", err
	}
	overlay, _ := json.Marshal(map[string]map[string]string{"Replace": {source: temp + ".go"}})
	for name, content := range map[string]string{
		temp + ".go": strings.Replace(string(data), m.find, m.put, 1), temp + ".json": string(overlay),
	} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			return "", err
		}
	}
	pkg, test := m.target()
	out, err := goTest(ctx, root, pkg, test, "-overlay="+temp+".json", "-timeout=2m")
	switch failing := failure.FindStringSubmatch(out); {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case err == nil:
		return "", nil
	case strings.Contains(out, "[build failed]") || strings.Contains(out, "[setup failed]"):
		return "", fmt.Errorf("it does not build: %s", out)
	case failing != nil:
		return failing[1], nil
	default: // it panics, or does not end
		return cmp.Or(test, "a panic"), nil
	}
}

var failure = regexp.MustCompile(`(?m)^ *--- FAIL: (\S+)`)

// goTest runs tests of a package, on one processor.
func goTest(ctx context.Context, root, pkg, test string, flags ...string) (out string, err error) {
	module, below, _ := strings.Cut(pkg, "/")
	args := append([]string{"test", "-count=1", "-failfast", "-p=1", "-vet=off", "-ldflags=-s -w"}, flags...)
	if test != "" {
		args = append(args, "-run=^("+test+")$")
	}
	cmd := exec.CommandContext(ctx, "go", append(args, "./"+below)...)
	cmd.Dir = filepath.Join(root, module)
	cmd.Env = append(os.Environ(), "GOWORK=off", "CGO_ENABLED=0", "GOMAXPROCS=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // the test too, not only go
	data, err := cmd.CombinedOutput()
	return string(data), err
}
