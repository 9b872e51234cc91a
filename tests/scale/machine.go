package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

// usage is what frps has used: bytes now, and seconds of a core so far.
type usage struct{ rss, cpu float64 }

func (f *fleet) usage() (usage, error) {
	pid := f.cp.FrpsPid()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return usage{}, err
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(after)
	user, _ := strconv.ParseFloat(fields[11], 64) // proc(5): utime and stime, in hundredths of a second
	system, _ := strconv.ParseFloat(fields[12], 64)
	rss, err := process.Memory(pid, "VmRSS")
	return usage{rss * 1e6, (user + system) / 100}, err
}

// cost returns the seconds of a core since then.
func (f *fleet) cost(since usage) float64 {
	now, err := f.usage()
	if err != nil {
		return 0
	}
	return now.cpu - since.cpu
}
