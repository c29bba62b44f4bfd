package main

import "testing"

// TestRecent checks that a map has at most max entries, and the most recent half of them.
func TestRecent(t *testing.T) {
	t.Parallel()
	v := recent[int64, int64]{max: maxVersions}
	for id := range int64(3 * maxVersions) {
		v.put(id+1, 1)
		if n := len(v.newer) + len(v.older); n > maxVersions {
			t.Fatalf("%d entries after %d puts, want at most %d", n, id+1, maxVersions)
		}
	}
	for id := int64(3*maxVersions - maxVersions/2 + 1); id <= 3*maxVersions; id++ {
		if version, ok := v.get(id); !ok || version != 1 {
			t.Fatalf("get(%d): got %d, %t, want 1", id, version, ok)
		}
	}
}
