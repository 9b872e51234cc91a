// Command recording runs `make run` and kubectl, and prints what both printed as an SVG, for the README:
//
//	cd tests && go run ./cmd/recording >session.svg
package main

import (
	"context"
	"errors"
	"fmt"
	"html"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

const (
	columns  = 104
	width    = 910 // of columns in a monospaced font of 14 px
	lineStep = 19
	margin   = 16
)

// commands are run in the second terminal.
var commands = []string{
	"kubectl get namespaces",
	"kubectl create configmap hello --from-literal=a=b",
	"kubectl create token default",
}

func main() {
	if err := record(context.Background(), os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "recording:", err)
		os.Exit(1)
	}
}

func record(ctx context.Context, out io.Writer) error {
	group, err := process.NewGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	binary, err := process.Binary("run")
	if err != nil {
		return err
	}
	run, err := group.Start("run", nil, binary)
	if err != nil {
		return err
	}
	if err := process.Poll(ctx, time.Minute, run.Done(), func() error {
		if !strings.Contains(run.Log(), "Ctrl-C") {
			return errors.New("make run is not ready")
		}
		return nil
	}); err != nil {
		return err
	}
	started, _, _ := strings.Cut(run.Log(), "\nThe agent's own API")
	export := regexp.MustCompile(`export KUBECONFIG=(\S+).*`).FindStringSubmatch(started)
	if export == nil {
		return errors.New("make run prints no kubeconfig")
	}
	bin := filepath.Dir(binary)
	text := "$ make run\n" + strings.TrimSpace(started) + "\n\n$ " + export[0] + "\n"
	for _, command := range commands {
		cmd := exec.CommandContext(ctx, "sh", "-c", command)
		cmd.Env = []string{"HOME=" + group.Dir(), "KUBECONFIG=" + export[1], "PATH=" + bin + ":" + os.Getenv("PATH")}
		printed, _ := cmd.CombinedOutput() // kubectl fails where the agent refuses
		text += "$ " + command + "\n" + string(printed)
	}
	short := strings.NewReplacer(bin, "~/vm-agent/.build/bin", "\t", "    ").Replace(strings.TrimSpace(text))
	draw(out, short)
	return nil
}

// draw writes lines as an SVG. A line that begins with a dollar is a command.
func draw(out io.Writer, text string) {
	var body strings.Builder
	y := margin
	for line := range strings.SplitSeq(text, "\n") {
		class := "o"
		if strings.HasPrefix(line, "$ ") {
			class = "c"
		}
		for first := true; first || line != ""; first = false {
			part := line[:min(len(line), columns)]
			line = line[len(part):]
			y += lineStep
			fmt.Fprintf(&body, `<text class=%q xml:space="preserve" x="%d" y="%d">%s</text>`+"\n",
				class, margin, y, html.EscapeString(part))
		}
	}
	height := y + margin
	_, _ = fmt.Fprintf(out, `<svg xmlns="http://www.w3.org/2000/svg" width="%[1]d" height="%[2]d"
  viewBox="0 0 %[1]d %[2]d">
<style>text { font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #d0d7de }
.c { fill: #7ee787 }</style>
<rect width="%[1]d" height="%[2]d" rx="8" fill="#161b22"/>
%[3]s</svg>
`, width, height, body.String())
}
