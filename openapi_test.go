package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"mime"
	"net/http/httptest"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"
	"unicode/utf8"

	"github.com/VictoriaMetrics/metrics"
)

func TestOpenAPIIsServed(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	onDisk, err := os.ReadFile("openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	a := s.do("GET", "/openapi.json", "")
	if a.status != 200 || a.header.Get("Content-Type") != "application/json" ||
		a.body != string(onDisk) {
		t.Errorf("status %d, %v, %d bytes", a.status, a.header, len(a.body))
	}
}

// TestOpenAPIDocument checks what the document says of itself.
func TestOpenAPIDocument(t *testing.T) {
	t.Parallel()
	doc := readDocument(t)
	if version := fmt.Sprint(doc.OpenAPI); !strings.HasPrefix(version, "3.1.") {
		t.Errorf("the version of OpenAPI is %s", version)
	}
	ids := make(map[string]bool)
	for _, part := range []map[string]map[string]*operation{doc.Paths, doc.Webhooks} {
		for path, methods := range part {
			for method, o := range methods {
				if o.OperationID == "" || ids[o.OperationID] {
					t.Errorf("%s %s: the operationId %q is not its own", method, path, o.OperationID)
				}
				ids[o.OperationID] = true
				for _, name := range o.Tags {
					if !slices.ContainsFunc(doc.Tags, func(tag tag) bool { return tag.Name == name }) {
						t.Errorf("%s: the tag %s is not declared", o.OperationID, name)
					}
				}
				checkExamples(t, o)
			}
		}
	}
	for name, methods := range doc.Webhooks {
		for _, example := range methods["post"].RequestBody.Content["application/json"].examples() {
			if eventType := example.(map[string]any)["event_type"]; eventType != name {
				t.Errorf("an example of %s is a %s", name, eventType)
			}
		}
	}
}

// checkExamples holds each example of o against its schema.
func checkExamples(t *testing.T, o *operation) {
	t.Helper()
	checkOne := func(where string, schema *jsonSchema, example any) {
		t.Helper()
		if err := schema.validate(example); err != nil {
			t.Errorf("%s, example of %s: %v", o.OperationID, where, err)
		}
	}
	checkContent := func(where string, content map[string]mediaType) {
		t.Helper()
		for name, m := range content {
			if len(m.examples()) == 0 && m.Schema.Properties != nil {
				t.Errorf("%s, %s: no example of %s", o.OperationID, where, name)
			}
			for _, example := range m.examples() {
				checkOne(where, m.Schema, example)
			}
		}
	}
	for _, p := range o.Parameters {
		if p.Example != nil {
			checkOne(p.Name, p.Schema, p.Example)
		}
		if p.Schema.Default != nil {
			checkOne(p.Name, p.Schema, p.Schema.Default)
		}
	}
	checkContent("request", o.RequestBody.Content)
	for status, r := range o.Responses {
		checkContent(status, r.Content)
		for name, header := range r.Headers {
			if header.Example != nil {
				checkOne(name, header.Schema, header.Example)
			}
		}
		for _, example := range r.Content["application/problem+json"].examples() {
			if got := fmt.Sprint(example.(map[string]any)["status"]); got != status {
				t.Errorf("%s: an example of status %s says %s", o.OperationID, status, got)
			}
		}
	}
}

// routesBesideTheDocument are other spellings of documented routes, redirects to them, and
// the parts of a page.
var routesBesideTheDocument = []string{"GET /users/{$}", "POST /users/{$}", "GET /docs/{$}",
	"GET /docs/start.js", "GET /docs/swagger-ui-bundle.js", "GET /docs/swagger-ui.css",
	"GET /docs/favicon-32x32.png", "GET /schema", "GET /{$}"}

// TestOpenAPIHasEveryRoute walks the document through the router, and the list of routes
// through the document.
func TestOpenAPIHasEveryRoute(t *testing.T) {
	t.Parallel()
	server := newFaultyServer(faultyStore{}, false)
	known := make(map[string]bool)
	for _, route := range routesBesideTheDocument {
		known[route] = true
	}
	for path, methods := range readDocument(t).Paths {
		var allow []string
		for _, method := range []string{"GET", "POST", "PUT", "PATCH", "DELETE"} {
			o := methods[strings.ToLower(method)]
			if o == nil {
				continue
			}
			known[method+" "+path] = true
			allow = append(allow, strings.Replace(method, "GET", "GET, HEAD", 1))
			request := httptest.NewRequest(method, o.target(t), nil)
			if _, pattern := server.mux.Handler(request); pattern != method+" "+path {
				t.Errorf("%s %s is documented, the router has %q", method, path, pattern)
			}
		}
		// To a method that it does not have, a path answers with those that it has.
		a := ask(server, "TRACE", strings.Replace(path, "{id}", "1", 1), nil)
		if got := a.header.Get("Allow"); a.status != 405 || got != strings.Join(allow, ", ") {
			t.Errorf("%s: status %d, Allow is %q, not %q", path, a.status, got, allow)
		}
	}
	for _, route := range slices.Concat(openRoutes(&health{}), keyedRoutes(&api{}, &health{})) {
		pattern := route.method + " " + route.path
		if !known[pattern] {
			t.Errorf("the route %s is not documented", pattern)
		}
		delete(known, pattern)
	}
	for pattern := range known {
		t.Errorf("%s is no route", pattern)
	}
}

// TestOpenAPIAnswers brings about every answer that the document has, and holds them
// against it.
func TestOpenAPIAnswers(t *testing.T) {
	t.Parallel()
	doc := readDocument(t)
	t.Run("service", func(t *testing.T) {
		eachStore(t, func(t *testing.T, s *service) { testAnswers(t, doc, s) })
	})
	t.Run("faults", func(t *testing.T) { testFaults(t, doc) })
	t.Run("access", func(t *testing.T) { testAccess(t, doc) })
	for id, o := range doc.operations() {
		for status, r := range o.Responses {
			if !r.seen.Load() {
				t.Errorf("%s: no test brings about the documented status %s", id, status)
			}
		}
	}
}

func testAnswers(t *testing.T, doc *document, s *service) {
	valid := fmt.Sprintf(`{"name": " Ann ", "surname": "Lee", "password": %q}`, secret)
	other := strings.Replace(valid, "Ann", "Eve", 1)
	try := fmt.Sprintf(`{"password": %q}`, secret)
	invalid := `{"name": "", "surname": null, "age/years": 7}`
	large := `{"name": "` + strings.Repeat("x", maxBodyBytes) + `"}`
	form := "Content-Type: application/x-www-form-urlencoded"
	patch := "Content-Type: application/merge-patch+json"
	stale := `If-Match: "999"`
	change := `{"name": "Bob"}`
	for i := range 3 {
		s.createUser(fmt.Sprint("user ", i+1), "Doe")
	}
	tests := []struct {
		operation string
		path      string
		body      string
		header    string
		want      int
	}{
		{operation: "listUsers", path: "/users", want: 200},
		{operation: "listUsers", path: "/users/?page=2&per_page=1", want: 200},
		{operation: "listUsers", path: "/users?page=9", want: 200},
		{operation: "listUsers", path: "/users?after=0&per_page=1", want: 200},
		{operation: "listUsers", path: "/users?after=9", want: 200},
		{operation: "listUsers", path: "/users?page=1&after=1&per_page=0&x=1", want: 400},
		{operation: "listUsers", path: "/users?page=%", want: 400},
		{operation: "createUser", path: "/users", body: valid, want: 201},
		{operation: "createUser", path: "/users/", body: valid, want: 201},
		{operation: "createUser", path: "/users", body: invalid, want: 400},
		{operation: "createUser", path: "/users", body: `[]`, want: 400},
		{operation: "createUser", path: "/users", body: large, want: 413},
		{operation: "createUser", path: "/users", body: "name=Ann", header: form, want: 415},
		{operation: "createUser", path: "/users", body: valid, header: "Idempotency-Key: k", want: 201},
		{operation: "createUser", path: "/users", body: valid, header: "Idempotency-Key: k", want: 201},
		{operation: "createUser", path: "/users", body: other, header: "Idempotency-Key: k", want: 422},
		{operation: "createUser", path: "/users", body: valid, header: "Idempotency-Key:  k k", want: 400},
		{operation: "getUser", path: "/users/1", want: 200},
		{operation: "getUser", path: "/users/1", header: `If-None-Match: W/"1"`, want: 304},
		{operation: "getUser", path: "/users/999", want: 404},
		{operation: "getUser", path: "/users/x", want: 404},
		{operation: "updateUser", path: "/users/1", body: change, want: 200},
		{operation: "updateUser", path: "/users/1", body: change, want: 200}, // nothing new
		{operation: "updateUser", path: "/users/1", body: `{}`, want: 400},
		{operation: "updateUser", path: "/users/1", body: invalid, want: 400},
		{operation: "updateUser", path: "/users/999", body: change, want: 404},
		{operation: "updateUser", path: "/users/1", body: change, header: stale, want: 412},
		{operation: "updateUser", path: "/users/1", body: large, want: 413},
		{operation: "updateUser", path: "/users/1", body: change, header: patch, want: 415},
		{operation: "patchUser", path: "/users/1", body: valid, want: 200},
		{operation: "patchUser", path: "/users/1", body: change, header: patch, want: 200},
		{operation: "patchUser", path: "/users/1", body: invalid, want: 400},
		{operation: "patchUser", path: "/users/999", body: change, want: 404},
		{operation: "patchUser", path: "/users/1", body: change, header: `If-Match: W/"1"`, want: 412},
		{operation: "patchUser", path: "/users/1", body: large, want: 413},
		{operation: "patchUser", path: "/users/1", body: "name=Bob", header: form, want: 415},
		{operation: "deleteUser", path: "/users/1", header: stale, want: 412},
		{operation: "deleteUser", path: "/users/1", want: 200},
		{operation: "deleteUser", path: "/users/1", want: 404},
		{operation: "verifyPassword", path: "/users/2/password/verify", body: try, want: 200},
		{operation: "verifyPassword", path: "/users/999/password/verify", body: try, want: 200},
		{operation: "verifyPassword", path: "/users/x/password/verify", body: try, want: 404},
		{operation: "verifyPassword", path: "/users/2/password/verify", body: invalid, want: 400},
		{operation: "verifyPassword", path: "/users/2/password/verify", body: large, want: 413},
		{operation: "verifyPassword", path: "/users/2/password/verify", body: try, header: form, want: 415},
		{operation: "healthz", path: "/healthz", want: 200},
		{operation: "readyz", path: "/readyz", want: 200},
		{operation: "metrics", path: "/metrics", want: 200},
		{operation: "openapi", path: "/openapi.json", want: 200},
		{operation: "docs", path: "/docs", want: 200},
	}
	operations := doc.operations()
	for _, test := range tests {
		o := operations[test.operation]
		if o == nil {
			t.Fatalf("the operation %s is not documented", test.operation)
		}
		a := s.do(o.method, test.path, test.body, test.header)
		if a.status != test.want {
			t.Errorf("%.60v: status %d", test, a.status)
		}
		o.check(t, a)
		if o.method != "GET" {
			continue
		}
		head := s.do("HEAD", test.path, "", test.header)
		if head.status != a.status || head.body != "" ||
			head.header.Get("Content-Type") != a.header.Get("Content-Type") {
			t.Errorf("HEAD %s: %v, and GET: %v", test.path, head, a)
		}
	}
}

// testAccess sends each operation without a key, with one to read, and too often. What the
// document calls open needs no key.
func testAccess(t *testing.T, doc *document) {
	read, readKey := newTestKey(t, "report", true)
	_, fullKey := newTestKey(t, "shop", false)
	keyed := settings{apiKeys: []apiKey{readKey, fullKey}}
	limited := settings{rateLimit: 0.01}
	for id, o := range doc.operations() {
		target := o.target(t)
		body := func() io.Reader { return strings.NewReader(o.exampleBody(t, "application/json")) }
		if open := o.Security != nil && len(*o.Security) == 0; open != (o.Responses["401"] == nil) {
			t.Errorf("%s is open or not: its security and its 401 do not agree", id)
		}
		a := ask(newFaultyServerWith(keyed), o.method, target, body())
		if (a.status == 401) != (o.Responses["401"] != nil) {
			t.Errorf("%s without a key: status %d", id, a.status)
		}
		o.check(t, a)
		a = ask(newFaultyServerWith(keyed), o.method, target, body(), "Authorization: Bearer "+read)
		if (a.status == 403) != (o.Responses["403"] != nil) {
			t.Errorf("%s with a key to read: status %d", id, a.status)
		}
		o.check(t, a)
		server := newFaultyServerWith(limited)
		ask(server, o.method, target, body())
		a = ask(server, o.method, target, body())
		if (a.status == 429) != (o.Responses["429"] != nil) {
			t.Errorf("%s too often: status %d", id, a.status)
		}
		o.check(t, a)
	}
}

// testFaults brings about what a service whose parts work does not answer.
func testFaults(t *testing.T, doc *document) {
	stalled := iotest.ErrReader(os.ErrDeadlineExceeded)
	for _, o := range doc.operations() {
		if !strings.HasPrefix(o.path, "/users") {
			continue
		}
		faults := map[error]int{
			errors.New("inside"): 500,
			errUnavailable:       503,
			errOutcomeUnknown:    503,
		}
		if o.Responses["409"] != nil {
			faults[errReferenced], faults[errRefused] = 409, 409
		}
		for err, want := range faults {
			body := strings.NewReader(o.exampleBody(t, "application/json"))
			a := ask(newFaultyServer(faultyStore{err: err}, false), o.method, o.target(t), body)
			if a.status != want {
				t.Errorf("%s, %v: status %d, not %d", o.OperationID, err, a.status, want)
			}
			o.check(t, a)
		}
		if o.RequestBody.Required {
			a := ask(newFaultyServer(faultyStore{}, false), o.method, o.target(t), stalled)
			if a.status != 408 {
				t.Errorf("%s, stalled body: status %d", o.OperationID, a.status)
			}
			o.check(t, a)
		}
	}
	create := doc.operations()["createUser"]
	body := strings.NewReader(create.exampleBody(t, "application/json"))
	a := ask(newFaultyServer(faultyStore{}, false), "POST", "/users", body, "Idempotency-Key: running")
	if a.status != 409 {
		t.Errorf("createUser, running key: status %d", a.status)
	}
	create.check(t, a)
	readyz := doc.operations()["readyz"]
	for _, test := range []struct {
		state    string
		draining bool
		want     int
	}{
		{"up", false, 200},
		{"up", true, 503},
		{"memory", true, 503},
		{"down", false, 503},
		{"read-only", false, 503},
	} {
		a := ask(newFaultyServer(faultyStore{state: test.state}, test.draining), "GET", "/readyz", nil)
		if a.status != test.want {
			t.Errorf("database %s, draining %v: status %d", test.state, test.draining, a.status)
		}
		readyz.check(t, a)
	}
}

// TestOpenAPIExamplesWork presses Execute on each operation of a service with one user.
func TestOpenAPIExamplesWork(t *testing.T) {
	t.Parallel()
	doc := readDocument(t)
	for id, o := range doc.operations() {
		mediaTypes := slices.Collect(maps.Keys(o.RequestBody.Content))
		if mediaTypes == nil {
			mediaTypes = []string{""}
		}
		for _, mediaTypeName := range mediaTypes {
			t.Run(id+" "+mediaTypeName, func(t *testing.T) {
				t.Parallel()
				s := startService(t, memorySettings())
				s.createUser("John", "Doe")
				body := o.exampleBody(t, mediaTypeName)
				a := s.do(o.method, o.target(t), body, "Content-Type: "+mediaTypeName)
				if a.status < 200 || a.status > 299 {
					t.Errorf("status %d: %s", a.status, a.body)
				}
				o.check(t, a)
			})
		}
	}
}

// TestOpenAPIInputs sends values at the edge of what is valid: document and service agree.
func TestOpenAPIInputs(t *testing.T) {
	t.Parallel()
	const clef = "\U0001d11e" // one character, two UTF-16 units, four bytes
	doc := readDocument(t)
	s := startService(t, memorySettings())
	s.createUser("John", "Doe")
	createUser, updateUser := doc.operations()["createUser"], doc.operations()["updateUser"]
	for _, test := range []struct {
		field string
		value any
		valid bool
	}{
		{"name", "x", true},
		{"name", strings.Repeat(clef, 255), true},
		{"name", strings.Repeat(clef, 256), false},
		{"name", " \u00a0\u3000x ", true},
		{"name", "", false},
		{"name", " \u00a0\u2003", false},
		{"name", "a\nb", false},
		{"name", "a\x00b", false},
		{"name", "a\u0085b", false},
		{"name", nil, false},
		{"name", 7, false},
		{"surname", []any{}, false},
		{"surname", "O\u2019Neil-\u00d6zt\u00fcrk", true},
		{"password", strings.Repeat(clef, 8), true},
		{"password", strings.Repeat(clef, 7), false},
		{"password", strings.Repeat(clef, 128), true},
		{"password", strings.Repeat(clef, 129), false},
		{"password", "        ", true},
		{"password", "null\x00null", false},
		{"Name", "x", false},
		{"age", 7, false},
	} {
		fields := map[string]any{"name": "John", "surname": "Doe", "password": secret}
		fields[test.field] = test.value
		checkInput(t, s, createUser, fields, test.valid)
		checkInput(t, s, updateUser, map[string]any{test.field: test.value}, test.valid)
	}
	checkInput(t, s, createUser, map[string]any{"name": "John", "surname": "Doe"}, false)
	checkInput(t, s, updateUser, map[string]any{}, false)
}

func checkInput(t *testing.T, s *service, o *operation, fields map[string]any, valid bool) {
	t.Helper()
	body, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	value, err := decodeJSON(body)
	if err != nil {
		t.Fatal(err)
	}
	err = o.RequestBody.Content["application/json"].Schema.validate(value)
	a := s.do(o.method, o.target(t), string(body))
	if (err == nil) != valid || (a.status < 300) != valid {
		t.Errorf("%s %.80s: the document says %v, the service %d", o.method, body, err, a.status)
	}
}

// TestOpenAPIParameters does the same for the parameters of the list.
func TestOpenAPIParameters(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	parameters := make(map[string]parameter)
	for _, p := range readDocument(t).operations()["listUsers"].Parameters {
		parameters[p.Name] = p
	}
	for _, test := range []struct {
		name  string
		value string
		and   string
		valid bool
	}{
		{name: "page", value: "1", valid: true},
		{name: "page", value: "100001", and: "&per_page=1", valid: true},
		{name: "page", value: "100002", and: "&per_page=1"},
		{name: "page", value: "0"},
		{name: "page", value: "1.5"},
		{name: "per_page", value: "1", valid: true},
		{name: "per_page", value: "100", valid: true},
		{name: "per_page", value: "101"},
		{name: "per_page", value: "0"},
		{name: "after", value: "0", valid: true},
		{name: "after", value: "9223372036854775807", valid: true},
		{name: "after", value: "9223372036854775808"},
		{name: "after", value: "-1"},
		{name: "after", value: "one"},
	} {
		err := parameters[test.name].validateText(test.value)
		a := s.do("GET", "/users?"+test.name+"="+test.value+test.and, "")
		if (err == nil) != test.valid || (a.status == 200) != test.valid {
			t.Errorf("%+v: the document says %v, the service %d", test, err, a.status)
		}
	}
}

// TestOpenAPIEvents holds the events of changes against the webhooks.
func TestOpenAPIEvents(t *testing.T) {
	t.Parallel()
	doc := readDocument(t)
	eachStoreAlone(t, func(t *testing.T, s store) {
		ctx := withTraceID(t.Context(), newUUIDv4())
		u, err := s.createUser(ctx, input("John", "Doe", "hash"), "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.updateUser(ctx, u.ID, input("Jane", "", ""), nil); err != nil {
			t.Fatal(err)
		}
		if err := s.deleteUser(ctx, u.ID, nil); err != nil {
			t.Fatal(err)
		}
		unseen := maps.Clone(doc.Webhooks)
		for _, e := range allPending(t, s) {
			delete(unseen, e.Type)
			text, err := json.Marshal(e)
			if err != nil {
				t.Fatal(err)
			}
			webhook := doc.Webhooks[e.Type]["post"]
			if webhook == nil {
				t.Fatalf("%s is not documented", e.Type)
			}
			schema := webhook.RequestBody.Content["application/json"].Schema
			value, err := decodeJSON(text)
			if err == nil {
				err = schema.validate(value)
			}
			if err != nil {
				t.Errorf("%s: %v", text, err)
			}
			// Consumers ignore what they do not know; the document knows all.
			for _, name := range keys(string(text)) {
				if schema.Properties[name] == nil {
					t.Errorf("%s: %s is not documented", text, name)
				}
			}
		}
		for name := range unseen {
			t.Errorf("no change makes the event %s", name)
		}
	})
}

// faultyStore fails every call with err, and is ready as state says.
type faultyStore struct {
	err   error
	state string
}

func (s faultyStore) createUser(context.Context, userInput, string) (User, error) {
	return User{}, s.err
}
func (s faultyStore) creationUnder(context.Context, string) (User, string, error) {
	return User{}, "", s.err
}
func (s faultyStore) getUser(context.Context, int64) (User, error) { return User{}, s.err }
func (s faultyStore) listUsers(context.Context, int64, int64, int64) ([]User, int64, error) {
	return nil, 0, s.err
}
func (s faultyStore) updateUser(context.Context, int64, userInput, []int64) (User, error) {
	return User{}, s.err
}
func (s faultyStore) passwordHash(context.Context, int64) (string, error) { return "", s.err }
func (s faultyStore) rehashPassword(context.Context, int64, string, string) error {
	return s.err
}
func (s faultyStore) deleteUser(context.Context, int64, []int64) error   { return s.err }
func (s faultyStore) size(context.Context) (int64, time.Duration, error) { return 0, 0, s.err }
func (s faultyStore) ready(context.Context) string                       { return s.state }

// newFaultyServer has the routes of the service, without anything behind them that works.
func newFaultyServer(s faultyStore, draining bool) *server {
	return newServerOf(settings{}, s, draining)
}

func newFaultyServerWith(s settings) *server {
	return newServerOf(s, faultyStore{state: "up", err: errUnavailable}, false)
}

func newServerOf(set settings, s faultyStore, draining bool) *server {
	server := newServer(set, slog.New(slog.DiscardHandler), metrics.NewSet())
	h := &health{store: s, broker: inProcess{}, metrics: server.metrics, draining: &server.draining}
	server.draining.Store(draining)
	api := newAPI(s, settings{passwordMinLength: 8}, &server.traffic, server.log)
	api.creating.Store("running", true)
	server.addRoutes(openRoutes(h), keyedRoutes(api, h))
	return server
}

// ask sends a request to a server in this process.
func ask(server *server, method, target string, body io.Reader, headers ...string) answer {
	request := httptest.NewRequest(method, target, body)
	request.Header.Set("Content-Type", "application/json")
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		request.Header.Set(name, value)
	}
	recorder := httptest.NewRecorder()
	server.ServeHTTP(recorder, request)
	return answer{recorder.Code, recorder.Header(), recorder.Body.String()}
}

// document is openapi.json with what each $ref points to in its place. Decoding it refuses
// every name that is not here, so that no keyword can be there and go unchecked.
type document struct {
	OpenAPI, Info, Servers, Security, Components any

	Tags            []tag
	Paths, Webhooks map[string]map[string]*operation // by path or event, then by method
}

type tag struct{ Name, Description string }

type operation struct {
	OperationID, Summary, Description string

	Tags        []string
	Parameters  []parameter
	RequestBody struct {
		Description string
		Required    bool
		Content     map[string]mediaType
	}
	Responses map[string]*documentedResponse
	Security  *[]map[string][]string // nil: that of the document

	method, path string
}

type parameter struct {
	Name, In, Description string

	Required bool
	Example  any
	Schema   *jsonSchema
}

type documentedResponse struct {
	Description string
	Headers     map[string]parameter
	Content     map[string]mediaType

	seen atomic.Bool // a test had this answer
}

type mediaType struct {
	Schema   *jsonSchema
	Example  any
	Examples map[string]struct {
		Summary string
		Value   any
	}
}

// examples are all examples of m, however they are given.
func (m mediaType) examples() []any {
	var values []any
	if m.Example != nil {
		values = append(values, m.Example)
	}
	for _, example := range m.Examples {
		values = append(values, example.Value)
	}
	return values
}

// readDocument checks that each $ref points to something, and that something points to
// each component.
func readDocument(t *testing.T) *document {
	t.Helper()
	root, err := decodeJSON(openAPI)
	if err != nil {
		t.Fatal(err)
	}
	object := root.(map[string]any)
	unused := make(map[string]bool)
	for kind, components := range object["components"].(map[string]any) {
		if kind == "securitySchemes" {
			continue // used by name
		}
		for name := range components.(map[string]any) {
			unused["#/components/"+kind+"/"+name] = true
		}
	}
	for _, part := range []string{"paths", "webhooks"} {
		object[part] = expand(t, object, object[part], unused)
	}
	for ref := range unused {
		t.Errorf("nothing uses %s", ref)
	}
	expanded, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	var doc document
	decoder := json.NewDecoder(bytes.NewReader(expanded))
	decoder.UseNumber()
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&doc); err != nil {
		t.Fatalf("openapi.json: %v", err)
	}
	for path, methods := range doc.Paths {
		for method, o := range methods {
			o.method, o.path = strings.ToUpper(method), path
		}
	}
	return &doc
}

// expand returns node with what each $ref points to in its place.
func expand(t *testing.T, root map[string]any, node any, unused map[string]bool) any {
	t.Helper()
	switch node := node.(type) {
	case []any:
		for i := range node {
			node[i] = expand(t, root, node[i], unused)
		}
	case map[string]any:
		if ref, ok := node["$ref"].(string); ok {
			if len(node) > 1 {
				t.Errorf("beside the $ref to %s are other names", ref)
			}
			delete(unused, ref)
			var target any = root
			for name := range strings.SplitSeq(strings.TrimPrefix(ref, "#/"), "/") {
				object, _ := target.(map[string]any)
				target = object[name]
			}
			if target == nil {
				t.Fatalf("nothing is at %s", ref)
			}
			return expand(t, root, target, unused)
		}
		for name := range node {
			node[name] = expand(t, root, node[name], unused)
		}
	}
	return node
}

func decodeJSON(text []byte) (any, error) {
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	var value any
	err := decoder.Decode(&value)
	if err == nil && decoder.More() {
		err = errors.New("something follows the value")
	}
	return value, err
}

// operations are those of the paths by their operationId.
func (d *document) operations() map[string]*operation {
	operations := make(map[string]*operation)
	for _, methods := range d.Paths {
		for _, o := range methods {
			operations[o.OperationID] = o
		}
	}
	return operations
}

// jsonSchema has the keywords of JSON Schema 2020-12 that the document uses.
type jsonSchema struct {
	Type                 any // a name, or several
	Const                any
	Enum                 []any
	Format               string
	Pattern              string
	MinLength, MaxLength *int
	Minimum, Maximum     json.Number
	Items                *jsonSchema
	MaxItems             *int
	Properties           map[string]*jsonSchema
	Required             []string
	MinProperties        int
	AdditionalProperties *bool
	OneOf, AnyOf, AllOf  []*jsonSchema

	// These say nothing of what is valid.
	Title, Description string
	Default            any
	WriteOnly          bool
}

// formats are checked as far as a pattern does not do it better.
var formats = map[string]func(text string) error{
	"":              func(string) error { return nil },
	"int64":         func(string) error { return nil },
	"password":      func(string) error { return nil },
	"uri-reference": func(text string) error { _, err := url.Parse(text); return err },
	"date-time":     func(text string) error { _, err := time.Parse(time.RFC3339, text); return err },
	"uuid": func(text string) error {
		if !regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`).MatchString(text) {
			return fmt.Errorf("%q is no UUID", text)
		}
		return nil
	},
}

// validate holds a value, decoded with numbers as json.Number, against the schema.
func (s *jsonSchema) validate(value any) error {
	types, several := s.Type.([]any)
	if !several && s.Type != nil {
		types = []any{s.Type}
	}
	is := func(candidate any) bool { return reflect.DeepEqual(candidate, value) }
	hasType := func(name any) bool { return isOfType(value, name) }
	if types != nil && !slices.ContainsFunc(types, hasType) {
		return fmt.Errorf("%v is not of type %v", value, s.Type)
	}
	if s.Const != nil && !is(s.Const) || s.Enum != nil && !slices.ContainsFunc(s.Enum, is) {
		return fmt.Errorf("%v is not %v", value, append(s.Enum, s.Const))
	}
	if err := s.validateBranches(value); err != nil {
		return err
	}
	switch value := value.(type) {
	case string:
		return s.validateString(value)
	case json.Number:
		return s.validateNumber(value)
	case []any:
		return s.validateArray(value)
	case map[string]any:
		return s.validateObject(value)
	}
	return nil
}

func isOfType(value, name any) bool {
	switch value := value.(type) {
	case nil:
		return name == "null"
	case bool:
		return name == "boolean"
	case string:
		return name == "string"
	case json.Number:
		_, integer := new(big.Int).SetString(value.String(), 10)
		return name == "number" || name == "integer" && integer
	case []any:
		return name == "array"
	}
	return name == "object"
}

func (s *jsonSchema) validateBranches(value any) error {
	valid := func(branches []*jsonSchema) (n int) {
		for _, branch := range branches {
			if branch.validate(value) == nil {
				n++
			}
		}
		return n
	}
	if s.OneOf != nil && valid(s.OneOf) != 1 || s.AnyOf != nil && valid(s.AnyOf) == 0 ||
		valid(s.AllOf) != len(s.AllOf) {
		return fmt.Errorf("%v is not valid by one, any or all of the schemas", value)
	}
	return nil
}

func (s *jsonSchema) validateString(text string) error {
	length := utf8.RuneCountInString(text)
	if s.MinLength != nil && length < *s.MinLength || s.MaxLength != nil && length > *s.MaxLength {
		return fmt.Errorf("%.40q has %d characters", text, length)
	}
	pattern, err := regexp.Compile(s.Pattern)
	if err != nil {
		return err
	}
	if !pattern.MatchString(text) {
		return fmt.Errorf("%.40q does not match %s", text, s.Pattern)
	}
	check, ok := formats[s.Format]
	if !ok {
		return fmt.Errorf("the format %s is not known", s.Format)
	}
	return check(text)
}

// validateNumber is exact beyond what a float64 can hold.
func (s *jsonSchema) validateNumber(number json.Number) error {
	for _, bound := range []struct {
		bound    json.Number
		outwards int
	}{{s.Minimum, -1}, {s.Maximum, 1}} {
		if bound.bound == "" {
			continue
		}
		value, ok := new(big.Rat).SetString(number.String())
		limit, limitOK := new(big.Rat).SetString(bound.bound.String())
		if !ok || !limitOK || value.Cmp(limit) == bound.outwards {
			return fmt.Errorf("%s is beyond %s", number, bound.bound)
		}
	}
	return nil
}

func (s *jsonSchema) validateArray(values []any) error {
	if s.MaxItems != nil && len(values) > *s.MaxItems {
		return fmt.Errorf("%d items are more than %d", len(values), *s.MaxItems)
	}
	for i, value := range values {
		if s.Items == nil {
			break
		}
		if err := s.Items.validate(value); err != nil {
			return fmt.Errorf("item %d: %w", i, err)
		}
	}
	return nil
}

func (s *jsonSchema) validateObject(object map[string]any) error {
	for _, name := range s.Required {
		if _, ok := object[name]; !ok {
			return fmt.Errorf("%s is missing", name)
		}
	}
	if len(object) < s.MinProperties {
		return fmt.Errorf("%d members are less than %d", len(object), s.MinProperties)
	}
	for name, value := range object {
		property, ok := s.Properties[name]
		if !ok && s.AdditionalProperties != nil && !*s.AdditionalProperties {
			return fmt.Errorf("%s is no property", name)
		}
		if !ok {
			continue
		}
		if err := property.validate(value); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// validateText holds the value of a parameter or a header against its schema.
func (p parameter) validateText(text string) error {
	if p.Schema.Type == "integer" {
		return p.Schema.validate(json.Number(text))
	}
	return p.Schema.validate(text)
}

// transportHeaders need no word in the document.
var transportHeaders = []string{"Cache-Control", "Connection", "Content-Length",
	"Content-Security-Policy", "Content-Type", "Date"}

// check holds an answer against what the document says of its status.
func (o *operation) check(t *testing.T, a answer) {
	t.Helper()
	fail := func(format string, args ...any) {
		t.Helper()
		t.Errorf("%s, status %d: %s\n%s", o.OperationID, a.status, fmt.Sprintf(format, args...), a.body)
	}
	documented := o.Responses[strconv.Itoa(a.status)]
	if documented == nil {
		fail("not documented")
		return
	}
	documented.seen.Store(true)
	undocumented := maps.Clone(a.header)
	for _, name := range transportHeaders {
		undocumented.Del(name)
	}
	for name := range securityHeaders { // of every answer
		undocumented.Del(name)
	}
	for name, header := range documented.Headers {
		undocumented.Del(name)
		values := a.header.Values(name)
		if len(values) > 1 || len(values) == 0 && header.Required {
			fail("the header %s is there %d times", name, len(values))
		}
		for _, value := range values {
			if err := header.validateText(value); err != nil {
				fail("the header %s: %v", name, err)
			}
		}
	}
	if len(undocumented) > 0 {
		fail("headers that are not documented: %v", undocumented)
	}
	contentType := a.header.Get("Content-Type")
	if documented.Content == nil {
		if a.body != "" || contentType != "" {
			fail("it has a body")
		}
		return
	}
	name, _, _ := mime.ParseMediaType(contentType)
	content, ok := documented.Content[name]
	if !ok {
		fail("the content type %q is not documented", contentType)
		return
	}
	var value any = a.body
	if strings.HasSuffix(name, "json") {
		var err error
		if value, err = decodeJSON([]byte(a.body)); err != nil {
			fail("%v", err)
		}
	}
	if err := content.Schema.validate(value); err != nil {
		fail("%v", err)
	}
}

// target is what Swagger UI asks for when a reader only presses Execute: parameters have
// their example or default.
func (o *operation) target(t *testing.T) string {
	t.Helper()
	target, separator := o.path, "?"
	for _, p := range o.Parameters {
		switch {
		case p.In == "path" && p.Required && p.Example != nil:
			target = strings.ReplaceAll(target, "{"+p.Name+"}", fmt.Sprint(p.Example))
		case p.In == "query" && p.Schema.Default != nil:
			target += fmt.Sprint(separator, p.Name, "=", p.Schema.Default)
			separator = "&"
		case p.Required:
			t.Errorf("%s: the parameter %s has no example", o.OperationID, p.Name)
		}
	}
	if strings.Contains(target, "{") {
		t.Errorf("%s: %s has a parameter that is not documented", o.OperationID, target)
	}
	return target
}

// exampleBody is a request body from the document, or "" where there is none to send.
func (o *operation) exampleBody(t *testing.T, mediaTypeName string) string {
	t.Helper()
	content, ok := o.RequestBody.Content[mediaTypeName]
	if !ok {
		return ""
	}
	if content.Example == nil {
		t.Fatalf("%s: the body %s has no example", o.OperationID, mediaTypeName)
	}
	body, err := json.Marshal(content.Example)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}
