package server

import (
	"cmp"
	"context"
	"crypto/sha256"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/pipeops/vm-agent/proxy/access"
	"github.com/pipeops/vm-agent/proxy/kube"
)

const (
	// A running stream is authorised again after reviewAfter and up to reviewJitter: within 30 s, with what follows.
	reviewAfter, reviewJitter = 25 * time.Second, 3 * time.Second
	reviewInterval            = time.Second // between two looks at what is due
	maxReviews                = 20          // in one look
)

// right is what streams that ask the same have in common: one review is for all of them.
type right struct {
	caller [sha256.Size]byte
	kube.Description
}

// review is when a right was last found to hold, and when it is due to be asked for again.
type review struct{ at, due time.Time }

// reviewStreams asks the API server again whether the callers of running streams may do what they do, where that is
// due.
func (s *Server) reviewStreams(ctx context.Context) {
	running := s.gate.streams()
	maps.DeleteFunc(s.reviews, func(key right, _ *review) bool { return running[key] == nil })
	var due []right
	oldest, now := time.Duration(0), time.Now()
	for key, sc := range running {
		last, known := s.reviews[key]
		if !known {
			last = &review{sc.start, sc.start.Add(untilReview())}
			s.reviews[key] = last
		}
		if last.due.Before(now) {
			due = append(due, key)
		}
		oldest = max(oldest, now.Sub(last.at))
	}
	s.metrics.reviewAge.Set(oldest.Seconds())
	slices.SortFunc(due, func(a, b right) int { return s.reviews[a].due.Compare(s.reviews[b].due) })
	due = due[:min(len(due), maxReviews)]
	var reviewing sync.WaitGroup
	for _, key := range due {
		reviewing.Go(func() {
			last := s.reviews[key]
			if s.review(ctx, key, running[key]) {
				last.at = time.Now()
			}
			last.due = time.Now().Add(untilReview())
		})
	}
	reviewing.Wait()
}

func untilReview() time.Duration { return reviewAfter + rand.N(reviewJitter) } //nolint:gosec // no secret

// review asks for one right, as sc has it, and ends all streams that need it if it has ended. While the API server
// cannot answer, they go on: then it returns false.
func (s *Server) review(ctx context.Context, key right, sc *scope) (answered bool) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	allowed, err := s.kube.Client.Review(ctx, sc.Identity, &key.Description)
	unauthorized := apierrors.IsUnauthorized(err) && s.config.Access.Identity == access.Own
	same := func(other *scope) bool { return other.right != nil && *other.right == key }
	what := key.Verb + " " + cmp.Or(key.Resource, "this")
	switch {
	case err == nil && !allowed, apierrors.IsForbidden(err):
		why := &kube.Ended{Why: "the caller may no longer " + what, Code: http.StatusForbidden}
		s.end("rights", same, why)
	case unauthorized && (!access.Connects(&key.Description) || !sc.who.Expired()):
		// Without an event: the caller comes again, with a fresh credential if it has one.
		s.end("credential", same, &kube.Ended{Why: "the API server no longer accepts the caller's credential"})
	case err != nil && !unauthorized:
		s.log.Debug("a running stream cannot be authorised again", "request_id", sc.requestID, "error", err)
	}
	return err == nil
}

// end ends the running requests that match, for a reason that is a label of metrics.
func (s *Server) end(reason string, match func(*scope) bool, why *kube.Ended) {
	s.metrics.streamsEnded.WithLabelValues(reason).Add(float64(s.gate.revoke(match, why)))
}

// endForbidden ends what runs and the cluster's owner no longer allows.
func (s *Server) endForbidden() {
	if now := s.owner.State(); now.Allow < access.All {
		why := &kube.Ended{Why: s.owner.Refuse(now.Allow + 1), Code: http.StatusForbidden}
		s.end("switch", func(sc *scope) bool { return sc.needs > now.Allow }, why)
	}
}
