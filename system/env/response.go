package env

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"
)

// httpClient does not follow redirects.
var httpClient = &http.Client{
	Timeout:       30 * time.Second,
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	Transport:     &http.Transport{MaxIdleConnsPerHost: 16},
}

// Response is a response whose body has been read.
type Response struct {
	*http.Response
	Body string
}

// String describes the request and the response for a failed test.
func (r Response) String() string {
	if r.Response == nil {
		return "no response"
	}
	return fmt.Sprintf("%s %s: status %d, %v\n%s", r.Request.Method, r.Request.URL.RequestURI(),
		r.StatusCode, r.Header, r.Body)
}

// JSON returns the value at a path of member names in the body.
func (r Response) JSON(t *testing.T, names ...string) any {
	t.Helper()
	var value any
	if err := json.Unmarshal([]byte(r.Body), &value); err != nil {
		t.Fatalf("the body is not JSON: %v\n%v", err, r)
	}
	for _, name := range names {
		object, _ := value.(map[string]any)
		value = object[name]
	}
	return value
}

// NewRequest returns a request. Headers are "Name: value". A body has the content type
// application/json unless a header says otherwise.
func NewRequest(t *testing.T, method, url, body string, headers ...string) *http.Request {
	t.Helper()
	request, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		request.Header.Set("Content-Type", "application/json")
	}
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		request.Header.Set(name, value)
	}
	return request
}

// Do sends a request as NewRequest returns it, and checks what holds for every response.
func (p *Program) Do(method, path, body string, headers ...string) Response {
	p.t.Helper()
	request := NewRequest(p.t, method, p.URL+path, body, headers...)
	response, err := httpClient.Do(request)
	if err != nil {
		p.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		p.t.Fatalf("%s %s: reading the body: %v", method, path, err)
	}
	r := Response{response, string(content)}
	r.Check(p.t)
	return r
}

// CreateUser creates a user. Headers may authenticate the request.
func (p *Program) CreateUser(name, surname string, headers ...string) {
	p.t.Helper()
	body := fmt.Sprintf(`{"name": %q, "surname": %q, "password": %q}`, name, surname, Secret)
	if r := p.Do("POST", "/users", body, headers...); r.StatusCode != http.StatusCreated {
		p.t.Fatal(r)
	}
}

var traceID = regexp.MustCompile(`^[A-Za-z0-9._:-]{1,128}$`)

// problem is a problem document (RFC 9457) with the members that the service may use.
type problem struct {
	Type, Title, Detail, Instance string
	Status                        int
	TraceID                       string `json:"trace_id"`
	Errors                        json.RawMessage
}

// Check fails the test if the response violates a rule that holds for every response: it has a
// trace id and no password, and an error is a problem document that matches it. The body of a 503
// from /readyz is the state instead.
func (r Response) Check(t *testing.T) {
	t.Helper()
	if err := r.violations(); err != nil {
		t.Errorf("%v\n%v", err, r)
	}
}

func (r Response) violations() (err error) {
	fail := func(format string, args ...any) {
		err = errors.Join(err, fmt.Errorf(format, args...))
	}
	if id := r.Header.Get("X-Trace-Id"); !traceID.MatchString(id) {
		fail("got X-Trace-Id %q, want a match of %s", id, traceID)
	}
	if containsPassword(r.Body) {
		fail("the response contains a password")
	}
	unavailable, mediaType := r.StatusCode == 503, r.Header.Get("Content-Type")
	if unavailable && r.Request.URL.Path == "/readyz" && mediaType == "application/json" {
		return err
	}
	if unavailable && r.Header.Get("Retry-After") == "" {
		fail("a 503 has no Retry-After")
	}
	if r.StatusCode < 400 || r.Request.Method == http.MethodHead {
		return err
	}
	if mediaType != "application/problem+json" {
		fail("got Content-Type %q, want application/problem+json", mediaType)
	}
	var p problem
	decoder := json.NewDecoder(strings.NewReader(r.Body))
	decoder.DisallowUnknownFields()
	if decodeErr := decoder.Decode(&p); decodeErr != nil {
		fail("an error is not a problem document: %w", decodeErr)
	} else if !p.describes(r) {
		fail("the problem document does not match its response")
	}
	return err
}

func (p problem) describes(r Response) bool {
	return p.Type == "about:blank" && p.Title == http.StatusText(r.StatusCode) &&
		p.Status == r.StatusCode && p.Detail != "" &&
		p.TraceID == r.Header.Get("X-Trace-Id") && p.Instance == r.Request.URL.EscapedPath()
}
