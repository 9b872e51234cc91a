package process

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Cgroup is a control group, which limits the memory of the processes in it.
type Cgroup struct {
	dir, limit, usage, swap, events string // the directory, and files in it
}

// Cgroup makes a control group without a limit, of the version that this machine has. Close removes it. It needs root.
func (g *Group) Cgroup(name string) (*Cgroup, error) {
	const root = "/sys/fs/cgroup"
	name = filepath.Base(g.dir) + "." + name
	c := &Cgroup{filepath.Join(root, "memory", name), "memory.limit_in_bytes", "memory.usage_in_bytes",
		"memory.swappiness", "memory.oom_control"}
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err == nil {
		c = &Cgroup{filepath.Join(root, name), "memory.max", "memory.current", "memory.swap.max", "memory.events"}
		_ = os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+memory"), 0) // systemd has done it
	}
	if err := os.Mkdir(c.dir, 0o755); err != nil {
		return nil, err
	}
	_ = os.WriteFile(filepath.Join(c.dir, c.swap), []byte("0"), 0) // as Kubernetes does; the kernel may have no swap
	_, err := c.Usage()                                            // fails without the memory controller
	return c, err
}

// Enter returns the beginning of a command that runs in the control group.
func (c *Cgroup) Enter() []string {
	return []string{"sh", "-c", `echo $$ >"$0" && exec "$@"`, filepath.Join(c.dir, "cgroup.procs")}
}

// Limit sets the limit. It may fail if that is less than what is in use.
func (c *Cgroup) Limit(bytes int) error {
	return os.WriteFile(filepath.Join(c.dir, c.limit), []byte(strconv.Itoa(bytes)), 0)
}

// Usage returns how many bytes are in use.
func (c *Cgroup) Usage() (int, error) {
	data, err := os.ReadFile(filepath.Join(c.dir, c.usage))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(string(bytes.TrimSpace(data)))
}

// Killed returns how often the kernel has killed a process because of the limit.
func (c *Cgroup) Killed() (int, error) {
	file, err := os.Open(filepath.Join(c.dir, c.events))
	if err != nil {
		return 0, err
	}
	defer func() { _ = file.Close() }()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if n, ok := strings.CutPrefix(lines.Text(), "oom_kill "); ok {
			return strconv.Atoi(n)
		}
	}
	return 0, fmt.Errorf("%s has no oom_kill", file.Name())
}
