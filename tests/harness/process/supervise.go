package process

import (
	"context"
	"sync"
	"syscall"
	"time"
)

// Probe is a liveness probe. The zero Probe never fails.
type Probe struct {
	Alive         func() bool
	Delay, Period time.Duration
	Threshold     int // failures in a row
}

// Supervised is a process that is restarted as the kubelet does, but half a second after each end, without its growing
// delay.
type Supervised struct {
	probe Probe

	mu       sync.Mutex
	process  *Process
	restarts int
}

// Supervised returns p for Run.
func (p *Process) Supervised(probe Probe) *Supervised { return &Supervised{probe: probe, process: p} }

// Here starts a process where its starter is.
func Here(start func() error) error { return start() }

// Run restarts the process until ctx ends, and kills it when its probe fails. where calls start, in a network namespace
// for example.
func (s *Supervised) Run(ctx context.Context, where func(start func() error) error) {
	for {
		s.await(ctx)
		select {
		case <-ctx.Done():
			return
		case <-time.After(500 * time.Millisecond):
		}
		_ = where(func() error { // if it fails, it is tried again
			next, err := s.running().Again()
			if err == nil {
				s.mu.Lock()
				s.process, s.restarts = next, s.restarts+1
				s.mu.Unlock()
			}
			return err
		})
	}
}

// await returns when the process has ended, killed by its probe or otherwise, or when ctx ends.
func (s *Supervised) await(ctx context.Context) {
	running, failures := s.running(), 0
	var due <-chan time.Time
	if s.probe.Alive != nil {
		due = time.After(s.probe.Delay)
	}
	for {
		select {
		case <-running.Done():
			return
		case <-ctx.Done():
			return
		case <-due:
			due = time.After(s.probe.Period)
		}
		if failures++; s.probe.Alive() {
			failures = 0
		} else if failures == s.probe.Threshold {
			running.Kill()
		}
	}
}

func (s *Supervised) running() *Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.process
}

// Restarts returns how often the process was restarted.
func (s *Supervised) Restarts() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.restarts
}

// Pid returns the id of the running process.
func (s *Supervised) Pid() int { return s.running().Pid() }

// Signal sends a signal to the process.
func (s *Supervised) Signal(signal syscall.Signal) error { return syscall.Kill(s.Pid(), signal) }

// Stop stops the process, as [Process.Stop] does. It is then restarted.
func (s *Supervised) Stop() { s.running().Stop() }
