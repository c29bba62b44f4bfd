package main

// This file owns JSON: how values are written, the errors that handlers return as problem documents
// (RFC 9457), and how an object is read.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// statusClientGone is the status in the log of a request whose client left before the answer.
const statusClientGone = 499

// retryAfter is the Retry-After of every 503, in seconds.
const retryAfter = "1"

// problem is an error that the client may see. newProblem sets the members that depend on the error
// alone; writeProblem sets the others.
type problem struct {
	Type     string       `json:"type"`
	Title    string       `json:"title"`
	Status   int          `json:"status"`
	Detail   string       `json:"detail"`
	Instance string       `json:"instance"`
	TraceID  string       `json:"trace_id"`
	Errors   []fieldError `json:"errors,omitempty"`
}

// fieldError says what is wrong with one member of the body (Pointer, an RFC 6901 pointer as a URI
// fragment) or with one query parameter.
type fieldError struct {
	Pointer   string `json:"pointer,omitempty"`
	Parameter string `json:"parameter,omitempty"`
	Detail    string `json:"detail"`
}

// Error implements error. The text appears in the log of a 503.
func (p *problem) Error() string { return p.Detail }

// newProblem returns a problem with a detail that says what is wrong, in words for a user of the
// API.
func newProblem(status int, detail string) *problem {
	return &problem{Status: status, Detail: detail}
}

// maxErrors is how many wrong fields or parameters an answer lists.
const maxErrors = 20

// invalid returns a 400 that lists every wrong field, or parameter, as kind says. If there are more
// than maxErrors, it lists the first of them.
func invalid(kind string, errs []fieldError) *problem {
	detail := "1 " + kind + " is not valid"
	if len(errs) > maxErrors {
		errs = errs[:maxErrors]
		detail = fmt.Sprintf("More than %d %ss are not valid; these are the first", maxErrors, kind)
	} else if len(errs) > 1 {
		detail = fmt.Sprintf("%d %ss are not valid", len(errs), kind)
	}
	return &problem{Status: http.StatusBadRequest, Detail: detail, Errors: errs}
}

const (
	maxLogged = 1024 // bytes of a path or method that a log line or an answer repeats, as JSON
	maxEchoed = 100  // of a name
)

// cut returns the longest prefix of text that takes at most n bytes as a JSON string.
func cut(text string, n int) string {
	const escaped = 6 // bytes of an escape such as \u0001
	if len(text) <= n/escaped {
		return text
	}
	for i, c := range text {
		size := utf8.RuneLen(c)
		if c < ' ' || c == utf8.RuneError || strings.ContainsRune("\"\\<>&\u2028\u2029", c) {
			size = escaped
		}
		if n -= size; n < 0 {
			return text[:i]
		}
	}
	return text
}

var (
	errNoRoute    = newProblem(http.StatusNotFound, "No resource has this path")
	errOverloaded = newProblem(http.StatusServiceUnavailable, "Too many requests are in progress")
	errNotReady   = errors.New("the service is not ready")
	errClientGone = errors.New("the client closed the connection")
)

// problemOf returns the problem that describes err to the client. An unknown error becomes a 500
// without details.
func problemOf(err error, r *http.Request) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	user := "User with id " + r.PathValue("id")
	switch {
	case errors.Is(err, errNotFound):
		return newProblem(http.StatusNotFound, user+" not found")
	case errors.Is(err, errVersionMismatch):
		return newProblem(http.StatusPreconditionFailed,
			"If-Match does not list the current version of the user")
	case errors.Is(err, errInvalidValue):
		return newProblem(http.StatusBadRequest, "The database cannot store a value of the request")
	case errors.Is(err, errReferenced):
		return newProblem(http.StatusConflict, user+" is referenced by other data")
	case errors.Is(err, errRefused):
		return newProblem(http.StatusConflict, "A rule of the database does not allow this change")
	case errors.Is(err, errUnavailable), errors.Is(err, errBusy):
		return newProblem(http.StatusServiceUnavailable,
			"The service cannot handle the request now; nothing was changed")
	case errors.Is(err, errOutcomeUnknown):
		return newProblem(http.StatusServiceUnavailable,
			"The database did not answer; the change may or may not have been made")
	}
	return newProblem(http.StatusInternalServerError, "Internal error")
}

// writeProblem answers with p. It fails only if p cannot be encoded.
func writeProblem(w *response, r *http.Request, p *problem) error {
	answer := *p
	answer.Type = "about:blank"
	answer.Title = http.StatusText(p.Status)
	answer.Instance = r.URL.EscapedPath()
	if len(answer.Instance) > maxLogged {
		answer.Instance = (&url.URL{Path: cut(r.URL.Path, maxLogged)}).EscapedPath()
	}
	answer.TraceID = traceID(r.Context())
	switch p.Status {
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", retryAfter)
	case http.StatusRequestTimeout, http.StatusRequestEntityTooLarge:
		w.Header().Set("Connection", "close") // the rest of the body is not read
	}
	w.Header().Set("Content-Type", "application/problem+json")
	return writeJSON(w, p.Status, answer)
}

// jsonAppender is implemented by types with an encoder of their own. It appends the bytes that
// encoding/json would produce.
type jsonAppender interface {
	appendJSON(b []byte) []byte
}

// contentJSON is the Content-Type that all answers share. Nobody changes it.
var contentJSON = []string{"application/json"}

// writeJSON answers with v and a line feed. The Content-Type is application/json unless one is set.
// It fails, without having written anything, only if v cannot be encoded.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	var body []byte
	var err error
	if a, ok := v.(jsonAppender); ok {
		body = a.appendJSON(make([]byte, 0, 256))
	} else if body, err = json.Marshal(v); err != nil {
		return err
	}
	body = append(body, '\n')
	h := w.Header()
	if h["Content-Type"] == nil {
		h["Content-Type"] = contentJSON
	}
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	_, _ = w.Write(body) // #nosec G705 -- never HTML; response records a failure
	return nil
}

// member is a name and value of a JSON object, as received.
type member struct {
	name  string
	value json.RawMessage
}

// maxMembers is how many members of a body are read. One of more members has more errors than an
// answer lists.
const maxMembers = maxErrors + 10

// parseObject returns the first members of a body that is one JSON object, in their order and with
// duplicates, which encoding/json alone would hide. It fails with a 400.
func parseObject(body []byte, most int) ([]member, error) {
	notObject := func(reason string) error {
		return newProblem(http.StatusBadRequest, "The body must be a JSON object, but "+reason)
	}
	decoder := json.NewDecoder(bytes.NewReader(body))
	start, err := decoder.Token()
	if errors.Is(err, io.EOF) {
		return nil, notObject("is empty")
	}
	if err == nil && start != json.Delim('{') {
		return nil, notObject("is " + jsonType(start))
	}
	var members []member
	for err == nil && decoder.More() && len(members) < most {
		var name json.Token
		var value json.RawMessage
		if name, err = decoder.Token(); err == nil {
			err = decoder.Decode(&value)
			members = append(members, member{fmt.Sprint(name), value})
		}
	}
	if err == nil && decoder.More() { // to read all members takes too long
		if !json.Valid(body) {
			return nil, notObject("is not valid JSON")
		}
		return members, nil
	}
	if err == nil {
		_, err = decoder.Token() // the closing brace
	}
	if err != nil {
		return nil, notObject("is not valid JSON")
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, notObject("more follows the object")
	}
	return members, nil
}

// jsonType returns the type of the value that begins with a token, with its article.
func jsonType(token json.Token) string {
	switch token.(type) {
	case json.Delim:
		return "an array"
	case string:
		return "a string"
	case bool:
		return "a boolean"
	case nil:
		return "null"
	}
	return "a number"
}

// parseString returns a member's value, which must be a string of Unicode text without NUL. It
// refuses what encoding/json would replace silently.
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
		return "", errors.New("must not contain half of a surrogate pair")
	case json.Unmarshal(value, &text) != nil:
		return "", errors.New("must be a string")
	case strings.ContainsRune(text, 0):
		return "", errors.New("must not contain a NUL character")
	}
	return text, nil
}

// hasLoneSurrogate reports whether the escapes of a valid JSON string contain half of a surrogate
// pair.
func hasLoneSurrogate(literal []byte) bool {
	for {
		i := bytes.IndexByte(literal, '\\')
		if i < 0 {
			return false
		}
		literal = literal[i:]
		unit := escapedUnit(literal)
		if !utf16.IsSurrogate(unit) {
			literal = literal[2:]
			continue
		}
		if utf16.DecodeRune(unit, escapedUnit(literal[6:])) == utf8.RuneError {
			return true
		}
		literal = literal[12:]
	}
}

// escapedUnit returns the UTF-16 code unit of the escape at the start of a part of a JSON string,
// or 0.
func escapedUnit(literal []byte) rune {
	if len(literal) < 6 || literal[0] != '\\' || literal[1] != 'u' {
		return 0
	}
	unit, _ := strconv.ParseUint(string(literal[2:6]), 16, 16) // the string is valid
	return rune(unit)
}

// pointer returns the RFC 6901 pointer of a member as a URI fragment.
func pointer(name string) string {
	escaped := strings.NewReplacer("~", "~0", "/", "~1").Replace(name)
	return "#/" + (&url.URL{Fragment: escaped}).EscapedFragment()
}
