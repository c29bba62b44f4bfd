package main

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	maxKeyLength = 255            // characters of an idempotency key
	keyLifetime  = 24 * time.Hour // how long it is kept
)

var (
	// A string of RFC 8941, section 3.3.3.
	quotedKey = regexp.MustCompile(`^"((?:[ !#-\[\]-~]|\\["\\])*)"$`)
	bareKey   = regexp.MustCompile(`^[!#-~]+$`)
	unescape  = strings.NewReplacer(`\"`, `"`, `\\`, `\`)
)

// idempotencyKey returns the key as it is stored, or "" where the header is missing. It belongs to
// the API key that sent it: that key's name and a tab, which no key has, stand before it. Its error
// is a 400.
func idempotencyKey(h http.Header, owner *apiKey) (string, error) {
	lines, given := h["Idempotency-Key"]
	if !given {
		return "", nil
	}
	var key string
	if quoted := quotedKey.FindStringSubmatch(lines[0]); quoted != nil {
		key = unescape.Replace(quoted[1])
	} else if bareKey.MatchString(lines[0]) {
		key = lines[0]
	}
	if len(lines) > 1 || key == "" || len(key) > maxKeyLength {
		return "", newProblem(http.StatusBadRequest, fmt.Sprintf(
			"Idempotency-Key must be one string of 1 to %d printable ASCII characters", maxKeyLength))
	}
	if owner != nil {
		key = owner.name + "\t" + key
	}
	return key, nil
}

// entityTag is the strong ETag of a version.
func entityTag(version int64) string {
	return `"` + strconv.FormatInt(version, 10) + `"`
}

// matchVersions returns the versions that If-Match lists, by strong comparison (RFC 9110,
// section 13.1.1): nil where any will do, none where the field cannot be read.
func matchVersions(h http.Header) []int64 {
	lines := h["If-Match"]
	if len(lines) == 0 {
		return nil
	}
	tags := parseEntityTags(lines)
	if slices.Contains(tags, "*") {
		return nil
	}
	versions := []int64{}
	for _, tag := range tags {
		version, err := strconv.ParseInt(strings.Trim(tag, `"`), 10, 64)
		if err == nil && entityTag(version) == tag {
			versions = append(versions, version)
		}
	}
	return versions
}

// noneMatchFails says whether If-None-Match names the version, by weak comparison
// (RFC 9110, section 13.1.2).
func noneMatchFails(h http.Header, version int64) bool {
	return slices.ContainsFunc(parseEntityTags(h["If-None-Match"]), func(tag string) bool {
		return tag == "*" || strings.TrimPrefix(tag, "W/") == entityTag(version)
	})
}

const entityTagPattern = `(?:W/)?"[^\x00-\x20"\x7f]*"`

var (
	entityTags    = regexp.MustCompile(entityTagPattern)
	entityTagList = regexp.MustCompile(
		`^` + entityTagPattern + `(?:[ \t]*,[ \t,]*` + entityTagPattern + `)*$`)
)

// parseEntityTags reads a list by RFC 9110, section 8.8.3, or a lone "*". It returns
// nothing where the lines are neither.
func parseEntityTags(lines []string) []string {
	list := strings.Trim(strings.Join(lines, ","), " \t,")
	if list == "*" {
		return []string{"*"}
	}
	if !entityTagList.MatchString(list) {
		return nil
	}
	return entityTags.FindAllString(list, -1)
}
