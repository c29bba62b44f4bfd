package main

import (
	"testing"
	"time"
)

// TestDeploymentLimits checks the bounds that the deployment files are made for. system/contract
// checks the files against the same numbers.
func TestDeploymentLimits(t *testing.T) {
	t.Parallel()
	if databaseWait > 60*time.Second {
		t.Errorf("a start may wait %v for the database", databaseWait)
	}
	sum := drainIdle + drainRequests + drainEvents + drainConsumer + closeWait
	if sum > 10*time.Second {
		t.Errorf("a stop may take %v", sum)
	}
	if memoryLimit > 64<<20 || argonMemory > 12<<10 {
		t.Errorf("%d MiB, and %d KiB for each core", memoryLimit>>20, argonMemory)
	}
}
