package integration

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
)

// rightsEnd bounds how long a stream may go on after its right has been removed, on a busy machine.
const rightsEnd = 33 * time.Second

// TestWatchesEndWithTheirRights removes the right to watch of each identity, and an account of identity own. The
// watches that keep their right go on, and many of them ask the API server no more often than one.
func TestWatchesEndWithTheirRights(t *testing.T) {
	t.Parallel()
	for _, identity := range []string{"agent", "named", "own"} {
		t.Run(identity, func(t *testing.T) {
			t.Parallel()
			w := connectedAs(t, identity)
			w.bind(w.ns, watchedRole, w.subject("alice"))
			accounts := "/api/k8s/api/v1/namespaces/" + w.ns + "/serviceaccounts?watch=true"
			configMaps := "/api/k8s/api/v1/namespaces/" + w.ns + "/configmaps?watch=true"
			var stay, end []*running
			for range 10 { // of each user
				stay = append(stay, w.open(configMaps, w.header("alice")))
				end = append(end, w.open(accounts, w.header("alice")))
			}
			if identity == "own" {
				w.tokens["carol"] = w.account(w.ns, "carol").BearerToken
				w.bind("", callerRole, w.subject("carol"))
				end = append(end, w.open(configMaps, w.header("carol")))
			}
			err := api.Client.RbacV1().RoleBindings(w.ns).Delete(t.Context(), watchedRole, metav1.DeleteOptions{})
			if err == nil && identity == "own" {
				err = api.Client.CoreV1().ServiceAccounts(w.ns).Delete(t.Context(), "carol", metav1.DeleteOptions{})
			}
			if err != nil {
				t.Fatal(err)
			}
			harness.Eventually(t, rightsEnd, func() error {
				for i, stream := range end {
					if runs(stream.ended) {
						return fmt.Errorf("watch %d of %d without a right goes on", i, len(end))
					}
				}
				return nil
			})
			for _, stream := range end {
				if stream.err != nil {
					t.Errorf("a watch did not end cleanly: %v after %.300s", stream.err, stream.read)
				}
			}
			for i, stream := range stay {
				if !runs(stream.ended) {
					t.Errorf("watch %d has ended, with %v after %.300s", i, stream.err, stream.read)
				}
			}
			families := scrape(t, w.agent.Operations)
			ended := value(families, "streams_ended_total", map[string]string{"reason": "rights"}) +
				value(families, "streams_ended_total", map[string]string{"reason": "credential"})
			if int(ended) != len(end) {
				t.Errorf("the metrics count %v streams that ended, want %d", ended, len(end))
			}
		})
	}
}

// TestManyWatchesAreReviewedTogether opens 40 watches of four users: each user's right is reviewed once in a while.
func TestManyWatchesAreReviewedTogether(t *testing.T) {
	t.Parallel()
	w := connectedAs(t, "named")
	users := []string{"alice", "dave", "erin", "frank"}
	for _, user := range users[1:] {
		w.bind("", callerRole, w.subject(user))
	}
	path := "/api/k8s/api/v1/namespaces/" + w.ns + "/configmaps?watch=true"
	for range 10 {
		for _, user := range users {
			w.open(path, w.header(user))
		}
	}
	var times map[string][]time.Time
	harness.Eventually(t, rightsEnd, func() error {
		events, err := api.Audit(func(e cluster.AuditEvent) bool {
			return e.ObjectRef.Resource == "selfsubjectaccessreviews" && e.User.Username == w.username("agent")
		})
		times = map[string][]time.Time{}
		for _, e := range events {
			times[e.ImpersonatedUser.Username] = append(times[e.ImpersonatedUser.Username], e.RequestReceivedTimestamp)
		}
		if len(times) < len(users) && err == nil {
			err = fmt.Errorf("%d users have been reviewed: %v", len(times), times)
		}
		return err
	})
	for user, at := range times {
		slices.SortFunc(at, time.Time.Compare)
		for i := range at[1:] {
			if pause := at[i+1].Sub(at[i]); pause < 20*time.Second {
				t.Errorf("%s was reviewed again after %s", user, pause)
			}
		}
	}
}

// TestAGreedyUserLeavesRoomForOthers has one user of a gateway open watches until the agent refuses. Others, from the
// same address, are not refused.
func TestAGreedyUserLeavesRoomForOthers(t *testing.T) {
	t.Parallel()
	w := connectedAs(t, "named", "GOMEMLIMIT=48MiB") // 153 requests
	path := "/api/k8s/api/v1/namespaces/" + w.ns + "/configmaps"
	w.bind("", callerRole, w.subject("dave"))
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	client := &http.Client{Transport: http.DefaultTransport.(*http.Transport).Clone()}
	t.Cleanup(client.CloseIdleConnections)
	request := func(user, path string) int {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.agent.Tunnel+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header = w.header(user)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = resp.Body.Close() })
		return resp.StatusCode
	}
	open := 0
	for request("alice", path+"?watch=true") == http.StatusOK {
		open++
	}
	if code := request("alice", path); code != http.StatusTooManyRequests {
		t.Errorf("with %d watches, the greedy user's next request: %d", open, code)
	}
	limit := value(scrape(t, w.agent.Operations), "limit", map[string]string{"limit": "requests"})
	if share := float64(open) / limit; share < 0.7 || share > 0.8 {
		t.Errorf("one user had %d of %v requests", open, limit)
	}
	for range 10 {
		if code := request("dave", path+"?watch=true"); code != http.StatusOK {
			t.Errorf("another user: %d", code)
		}
	}
	if refused := value(scrape(t, w.agent.Operations), "access_requests_total",
		map[string]string{"identity": "named", "outcome": "limit"}); refused != 2 {
		t.Errorf("%v requests refused for a limit, want 2", refused)
	}
}
