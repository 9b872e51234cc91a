package process

import "testing"

// TestFreePort: ports that nobody listens on yet are not given again.
func TestFreePort(t *testing.T) {
	given := map[int]bool{}
	for range 1000 { // of 20,000: by chance alone, two would be the same
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
