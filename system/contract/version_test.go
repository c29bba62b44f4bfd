package contract

import (
	"regexp"
	"testing"
)

// TestVersion compares the version of openapi.json with the newest release of CHANGELOG.md.
func TestVersion(t *testing.T) {
	t.Parallel()
	version := readDocument(t).Info.Version
	heading := regexp.MustCompile(`(?m)^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$`)
	match := heading.FindStringSubmatch(readFile(t, "CHANGELOG.md"))
	if match == nil || match[1] != version {
		t.Errorf("openapi.json has the version %s, CHANGELOG.md %q", version, match)
	}
}
