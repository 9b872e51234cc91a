package server

import "time"

// limits bound what callers can make the proxy hold. proxy/README.md has the table with the reasons.
type limits struct {
	connections    int   // open on the tunnel listener; on the operations listener opsConnections
	headerMemory   int64 // bytes for headers until their request is authenticated; the operations listener has a quarter
	requestMemory  int64 // bytes for headers and small bodies of authenticated requests
	requests       int   // authenticated requests for the API server or a runner, streams included
	stalledCalls   int   // of these, calls whose caller neither reads nor sends
	stalledReads   int   // of these, calls whose caller does not read
	stalledStreams int   // and watches, logs and upgrades

	// A connection of HTTP/2 that is older takes no more requests, so that callers with few of them use all replicas.
	connectionAge time.Duration
}

const (
	maxHeaderBytes = 128 << 10 // of a request on the tunnel listener; net/http adds 4 KiB
	opsHeaderBytes = 16 << 10
	opsConnections = 100
	maxStreams     = 15       // on a connection of HTTP/2; callers open another then
	baseMemory     = 24 << 20 // bytes that the proxy itself needs
	stalledMemory  = 96 << 10 // bytes for a stream whose caller does not read: its window, and what is in transit
)

// newLimits returns limits that fit memory, in bytes, with what the proxy itself needs.
func newLimits(memory int64) *limits {
	memory = max(memory-baseMemory, memory/4)
	return &limits{
		connections: int(memory / (100 << 10)), headerMemory: memory / 8, requestMemory: memory / 5,
		requests:       int(memory / (160 << 10)),
		stalledCalls:   16,
		stalledReads:   2, // an answer of 10 MB holds 100 of the 245 seats that the API server has for the agent
		stalledStreams: int(memory / 8 / stalledMemory),
		connectionAge:  30 * time.Second,
	}
}
