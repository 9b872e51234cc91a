package process

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// crashVariable tells a program that Crashing has started it.
const crashVariable = "PIPEOPS_TEST_CRASH"

// ToCrash reports whether Crashing has started this process. If so, it must start the processes under test, print a
// line that says where they are, and wait to be killed.
func ToCrash() bool { return os.Getenv(crashVariable) != "" }

// Crashing starts this program again as one that will be killed, and returns the line that it prints.
func Crashing() (cmd *exec.Cmd, line string, err error) {
	cmd = exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashVariable+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, "", err
	}
	if err := cmd.Start(); err != nil {
		return nil, "", err
	}
	if line, err = bufio.NewReader(out).ReadString('\n'); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	return cmd, strings.TrimSuffix(line, "\n"), err
}

// Alive reports whether a process runs. A zombie, whose parent does not wait for it, does not.
func Alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

// Memory returns a line of /proc/pid/status in MB: VmRSS is the resident memory now, VmHWM its peak.
func Memory(pid int, line string) (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for text := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(text, line+":"); ok {
			kb, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 64)
			return kb * 1024 / 1e6, err
		}
	}
	return 0, fmt.Errorf("process %d has no %s", pid, line)
}
