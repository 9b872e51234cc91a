package process

import "testing"

// TestFreePortIsGivenOnce checks that a port is not returned twice, although nobody listens on it yet.
func TestFreePortIsGivenOnce(t *testing.T) {
	given := map[int]bool{}
	for range 1000 { // of 20,000: random ports would collide
		port, err := FreePort()
		if err != nil {
			t.Fatal(err)
		}
		if given[port] {
			t.Fatalf("%d is given twice", port)
		}
		given[port] = true
	}
}
