package process

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// crashVariable tells a program that it was started by Crashing.
const crashVariable = "PIPEOPS_TEST_CRASH"

// ToCrash says whether this process is there to be killed: it shall start what is to be left, say where in a line, and
// wait.
func ToCrash() bool { return os.Getenv(crashVariable) != "" }

// Crashing starts this program once more, as one that is there to be killed, and returns the line that it says.
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

// Alive says whether a process runs. One whose new parent does not wait for it stays as a zombie, which does not.
func Alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

// Memory returns a line of /proc/pid/status in MB: VmRSS is the memory that a process has, VmHWM the most it had.
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
