package main

import (
	"testing"
)

// TestMemoryListsManyUsers checks the last page of 100,000 users in memory.
func TestMemoryListsManyUsers(t *testing.T) {
	t.Parallel()
	s := newMemory()
	for range 100_000 {
		mustCreate(t, s, "John")
	}
	users, total, err := s.listUsers(t.Context(), 99_990, 0, 100)
	if err != nil || total != 100_000 || len(users) != 10 || users[0].ID != 99_991 {
		t.Errorf("total %d, %d users, %v, want 100000, 10 users from 99991 on",
			total, len(users), err)
	}
}
