package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

const maxBodyBytes = 64 << 10

// noObject is the 400 for a body that is no JSON object; %s says why.
func noObject(reason string) *problem {
	return newProblem(http.StatusBadRequest, "The body must be one JSON object: "+reason)
}

// readBody returns the body of r if it has one of the media types. Its errors are the
// problems 415, 413, 408 and 400, in that order, and errClientGone.
func readBody(w http.ResponseWriter, r *http.Request, mediaTypes ...string) ([]byte, error) {
	if !hasMediaType(r.Header["Content-Type"], mediaTypes) {
		return nil, newProblem(http.StatusUnsupportedMediaType,
			"Content-Type must be "+strings.Join(mediaTypes, " or ")+", in UTF-8")
	}
	tooLarge := newProblem(http.StatusRequestEntityTooLarge,
		fmt.Sprintf("The body is larger than %d bytes", maxBodyBytes))
	if r.ContentLength > maxBodyBytes {
		return nil, tooLarge
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBodyBytes))
	if err == nil {
		return body, nil
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, tooLarge
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, newProblem(http.StatusRequestTimeout, "The body did not arrive in time")
	}
	if _, ok := errors.AsType[net.Error](err); ok || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, errClientGone
	}
	return nil, newProblem(http.StatusBadRequest, "The body is not framed as HTTP asks for")
}

func hasMediaType(contentTypes, allowed []string) bool {
	if len(contentTypes) != 1 {
		return false
	}
	mediaType, parameters, err := mime.ParseMediaType(contentTypes[0])
	charset, ok := parameters["charset"]
	return err == nil && slices.Contains(allowed, mediaType) &&
		(!ok || strings.EqualFold(charset, "utf-8"))
}

// member is one name and value of a JSON object, as received.
type member struct {
	name  string
	value json.RawMessage
}

// parseObject splits a body that is exactly one JSON object into its members, in their
// order and with duplicates. Its error is a problem.
func parseObject(body []byte) ([]member, error) {
	decoder := json.NewDecoder(bytes.NewReader(body))
	start, err := decoder.Token()
	if errors.Is(err, io.EOF) {
		return nil, noObject("it is empty")
	}
	if err == nil && start != json.Delim('{') {
		return nil, noObject("it begins as another type")
	}
	var members []member
	for err == nil && decoder.More() {
		var name json.Token
		var value json.RawMessage
		if name, err = decoder.Token(); err == nil {
			err = decoder.Decode(&value)
			members = append(members, member{fmt.Sprint(name), value})
		}
	}
	if err == nil {
		_, err = decoder.Token() // the closing brace
	}
	if err != nil {
		return nil, noObject("its syntax is wrong")
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, noObject("something follows it")
	}
	return members, nil
}

// parseString returns a member's value, which must be a string that is Unicode without
// a NUL. What encoding/json would replace silently is refused.
func parseString(value json.RawMessage) (string, error) {
	var text string
	switch {
	case string(value) == "null":
		return "", errors.New("must be a string, not null")
	case value[0] != '"':
		return "", errors.New("must be a string")
	case !utf8.Valid(value):
		return "", errors.New("must be valid UTF-8")
	case hasLoneSurrogate(value):
		return "", errors.New("must not hold half a surrogate pair")
	case json.Unmarshal(value, &text) != nil:
		return "", errors.New("must be a string")
	case strings.ContainsRune(text, 0):
		return "", errors.New("must not hold a NUL")
	}
	return text, nil
}

var (
	wholeEscape   = regexp.MustCompile(`(?i)\\\\|\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}`)
	halfSurrogate = regexp.MustCompile(`(?i)\\ud[89a-f]`)
)

// hasLoneSurrogate looks at the escapes of a valid JSON string, but for those of
// backslashes and of surrogate pairs.
func hasLoneSurrogate(literal []byte) bool {
	return halfSurrogate.Match(wholeEscape.ReplaceAll(literal, nil))
}

// pointer is the RFC 6901 pointer of a member, as a URI fragment.
func pointer(name string) string {
	escaped := strings.NewReplacer("~", "~0", "/", "~1").Replace(name)
	return "#/" + (&url.URL{Fragment: escaped}).EscapedFragment()
}
