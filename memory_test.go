package main

import (
	"testing"
)

func TestMemoryListsManyUsers(t *testing.T) {
	t.Parallel()
	s := newMemory()
	for range 100_000 {
		mustCreate(t, s, "John")
	}
	users, total, err := s.listUsers(t.Context(), 99_990, 0, 100)
	if err != nil || total != 100_000 || len(users) != 10 || users[0].ID != 99_991 {
		t.Errorf("%d users of %d, %v", len(users), total, err)
	}
}
