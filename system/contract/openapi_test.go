package contract

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pb33f/jsonschema/v6"
	"github.com/pb33f/libopenapi/datamodel/high/base"
	v3 "github.com/pb33f/libopenapi/datamodel/high/v3"
	amqp "github.com/rabbitmq/amqp091-go"

	"user-service/system/env"
)

func bodyOf(text string) io.ReadCloser { return io.NopCloser(strings.NewReader(text)) }

// TestDocumentIsValid checks the document against the schema of OpenAPI 3.1.
func TestDocumentIsValid(t *testing.T) {
	t.Parallel()
	d := readDocument(t)
	if !strings.HasPrefix(d.Version, "3.1.") {
		t.Errorf("the version of OpenAPI is %s", d.Version)
	}
	if _, problems := d.validator.ValidateDocument(); len(problems) > 0 {
		t.Errorf("%v", joined(problems))
	}
}

// strictSchema is the JSON Schema for JSON Schemas without unknown keywords. The schema of
// OpenAPI would accept a misspelled keyword.
const strictSchema = `{
	"$id": "https://example.com/strict",
	"$dynamicAnchor": "meta",
	"$ref": "https://json-schema.org/draft/2020-12/schema",
	"unevaluatedProperties": false
}`

// TestDocumentSchemas checks that the schemas have no unknown keyword, that nothing stands
// beside a $ref, and that each component is used.
func TestDocumentSchemas(t *testing.T) {
	t.Parallel()
	strict, err := decodeJSON(strictSchema)
	if err != nil {
		t.Fatal(err)
	}
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource("https://example.com/strict", strict); err != nil {
		t.Fatal(err)
	}
	schemas, err := compiler.Compile("https://example.com/strict")
	if err != nil {
		t.Fatal(err)
	}
	text := readFile(t, "openapi.json")
	document, err := decodeJSON(text)
	if err != nil {
		t.Fatal(err)
	}
	components := document.(map[string]any)["components"].(map[string]any)
	unused := make(map[string]bool)
	for kind, named := range components {
		for name, component := range named.(map[string]any) {
			unused["#/components/"+kind+"/"+name] = kind != "securitySchemes" // named otherwise
			if kind == "schemas" {
				if err := schemas.Validate(component); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
		}
	}
	walk(document, func(object map[string]any) {
		if schema, ok := object["schema"]; ok {
			if err := schemas.Validate(schema); err != nil {
				t.Error(err)
			}
		}
		if ref, ok := object["$ref"].(string); ok {
			unused[ref] = false
			if len(object) > 1 {
				t.Errorf("other names beside the $ref to %s", ref)
			}
		}
	})
	for ref, is := range unused {
		if is {
			t.Errorf("nothing uses %s", ref)
		}
	}
}

// walk calls visit for each object in a JSON value.
func walk(value any, visit func(map[string]any)) {
	switch value := value.(type) {
	case []any:
		for _, item := range value {
			walk(item, visit)
		}
	case map[string]any:
		visit(value)
		for _, member := range value {
			walk(member, visit)
		}
	}
}

// TestDocumentOperations checks ids, tags and examples of operations and webhooks.
func TestDocumentOperations(t *testing.T) {
	t.Parallel()
	d := readDocument(t)
	ids := make(map[string]bool)
	check := func(o *v3.Operation) {
		if o.OperationId == "" || ids[o.OperationId] {
			t.Errorf("the operationId %q is empty or used twice", o.OperationId)
		}
		ids[o.OperationId] = true
		for _, name := range o.Tags {
			if !slices.ContainsFunc(d.Tags, func(tag *base.Tag) bool { return tag.Name == name }) {
				t.Errorf("%s: the tag %s is not declared", o.OperationId, name)
			}
		}
		checkExamples(t, d, o)
	}
	for _, item := range d.Paths.PathItems.FromOldest() {
		for _, o := range item.GetOperations().FromOldest() {
			check(o)
		}
	}
	for name, item := range d.Webhooks.FromOldest() {
		check(item.Post)
		for _, example := range examples(t, item.Post.RequestBody.Content.GetOrZero("application/json")) {
			if eventType := example.(map[string]any)["event_type"]; eventType != name {
				t.Errorf("an example of %s has the event_type %s", name, eventType)
			}
		}
	}
}

// checkExamples checks the examples and defaults of o against their schemas.
func checkExamples(t *testing.T, d *document, o *v3.Operation) {
	t.Helper()
	checkContent := func(where string, content map[string]*v3.MediaType) {
		for name, m := range content {
			values := examples(t, m)
			if len(values) == 0 && m.Schema.Schema().Properties != nil {
				t.Errorf("%s, %s: no example of %s", o.OperationId, where, name)
			}
			for _, value := range values {
				if err := d.validate(m.Schema, value); err != nil {
					t.Errorf("%s, %s: an example: %v", o.OperationId, where, err)
				}
			}
		}
	}
	for _, p := range o.Parameters {
		if p.Example != nil {
			if err := d.validate(p.Schema, decodeNode(t, p.Example)); err != nil {
				t.Errorf("%s: the example of %s: %v", o.OperationId, p.Name, err)
			}
		}
		if value := p.Schema.Schema().Default; value != nil {
			if err := d.validate(p.Schema, decodeNode(t, value)); err != nil {
				t.Errorf("%s: the default of %s: %v", o.OperationId, p.Name, err)
			}
		}
	}
	if o.RequestBody != nil {
		checkContent("request", orderedOrEmpty(o.RequestBody.Content))
	}
	if o.Responses == nil {
		return
	}
	if (o.Responses.Default != nil) != listedErrors.MatchString(o.Description) {
		t.Errorf("%s: the description has a list of errors without `default`, or the reverse",
			o.OperationId)
	}
	responses := maps.Collect(o.Responses.Codes.FromOldest())
	if o.Responses.Default != nil {
		responses["default"] = o.Responses.Default
	}
	for status, response := range responses {
		checkContent(status, orderedOrEmpty(response.Content))
		for name, header := range orderedOrEmpty(response.Headers) {
			if header.Example == nil {
				continue
			}
			if err := d.validate(header.Schema, decodeNode(t, header.Example)); err != nil {
				t.Errorf("%s: the example of %s: %v", o.OperationId, name, err)
			}
		}
	}
}

// TestDocumentedMethods checks that each path has the methods that are documented, and only
// those: a 405 lists them in Allow.
func TestDocumentedMethods(t *testing.T) {
	t.Parallel()
	d := readDocument(t)
	s := startService(t)
	for path, item := range d.Paths.PathItems.FromOldest() {
		operations := item.GetOperations()
		var methods []string
		for _, method := range []string{"GET", "POST", "PUT", "PATCH", "DELETE"} {
			if o := operations.GetOrZero(strings.ToLower(method)); o != nil {
				methods = append(methods, strings.Replace(method, "GET", "GET, HEAD", 1))
			}
		}
		e := s.Do("TRACE", strings.Replace(path, "{id}", "1", 1), "")
		allow := e.Header.Get("Allow")
		if want := strings.Join(methods, ", "); e.StatusCode != 405 || allow != want {
			t.Errorf("%s: status %d, Allow is %q, not %q", path, e.StatusCode, allow, want)
		}
	}
}

// TestExamplesWork sends the example of each operation to a service with one user.
func TestExamplesWork(t *testing.T) {
	t.Parallel()
	d := readDocument(t)
	for id, o := range d.operations {
		mediaTypes := slices.Collect(maps.Keys(o.content()))
		if len(mediaTypes) == 0 {
			mediaTypes = []string{""}
		}
		for _, mediaType := range mediaTypes {
			t.Run(id+" "+mediaType, func(t *testing.T) {
				t.Parallel()
				s := startService(t)
				s.CreateUser("John", "Doe")
				e := s.Do(o.method, o.target(t), o.exampleBody(t, mediaType), "Content-Type: "+mediaType)
				if e.StatusCode < 200 || e.StatusCode > 299 {
					t.Error(e)
				}
				o.check(t, e)
			})
		}
	}
}

// TestRequestBodies sends values at the bounds of what is valid. Document and service agree.
func TestRequestBodies(t *testing.T) {
	t.Parallel()
	const clef = "\U0001d11e" // one character, two UTF-16 units, four bytes
	d := readDocument(t)
	s := startService(t)
	s.CreateUser("John", "Doe")
	create, update := d.operation(t, "createUser"), d.operation(t, "updateUser")
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
		fields := map[string]any{"name": "John", "surname": "Doe", "password": env.Secret}
		fields[test.field] = test.value
		checkBody(t, s, create, fields, test.valid)
		checkBody(t, s, update, map[string]any{test.field: test.value}, test.valid)
	}
	checkBody(t, s, create, map[string]any{"name": "John", "surname": "Doe"}, false)
	checkBody(t, s, update, map[string]any{}, false)
}

func checkBody(t *testing.T, s *env.Program, o *operation, fields map[string]any, valid bool) {
	t.Helper()
	body, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	request := env.NewRequest(t, o.method, s.URL+o.target(t), string(body))
	ok, problems := o.doc.validator.ValidateHttpRequestSync(request)
	e := s.Do(o.method, o.target(t), string(body))
	if ok != valid || (e.StatusCode < 300) != valid {
		t.Errorf("%s %.80s: the document says %v (%v), the service %d", o.method, body, ok,
			joined(problems), e.StatusCode)
	}
}

// TestListParameters does the same for the parameters of the list.
func TestListParameters(t *testing.T) {
	t.Parallel()
	d := readDocument(t)
	s := startService(t)
	parameters := make(map[string]*v3.Parameter)
	for _, p := range d.operation(t, "listUsers").Parameters {
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
		{name: "q", value: "x", valid: true},
		{name: "q", value: strings.Repeat("x", 255), valid: true},
		{name: "q", value: strings.Repeat("x", 256)},
		{name: "q", value: ""},
	} {
		err := d.validateText(parameters[test.name].Schema, test.value)
		e := s.Do("GET", "/users?"+test.name+"="+test.value+test.and, "")
		if (err == nil) != test.valid || (e.StatusCode == 200) != test.valid {
			t.Errorf("%+v: the document says %v, the service %d", test, err, e.StatusCode)
		}
	}
}

// TestEvents checks the messages that RabbitMQ gets against the webhooks of openapi.json, and
// against asyncapi.json, with their headers.
func TestEvents(t *testing.T) {
	t.Parallel()
	d, async := readDocument(t), readAsyncDocument(t)
	rabbitURL := newVhost(t)
	db := env.NewDatabase(t)
	const (
		name   = `{"name": "Jane"}`
		parent = "traceparent: 00-" + callerTrace + "-" + callerSpan + "-01"
		state  = "tracestate: vendor=1"
		bearer = "Authorization: Bearer " + fullKey
	)
	for _, test := range []struct {
		name     string
		settings []string
		headers  []string
		actor    string
	}{
		{name: "memory", actor: "anonymous"},
		{name: "postgres", settings: []string{"DATABASE_URL=" + db.URL, keysSetting()},
			headers: []string{bearer, parent, state}, actor: "shop"},
	} {
		s := startService(t, append(test.settings, "RABBITMQ_URL="+rabbitURL)...)
		messages := consume(t, rabbitURL)
		awaitRabbitMQ(t, s)
		check := func(want, actor string) {
			t.Helper()
			message := receive(t, messages, "a message "+want)
			checkMessage(t, d, want, message)
			async.check(t, message)
			if got := message.Headers["actor"]; got != actor {
				t.Errorf("%s: %s: the actor is %q, want %q", test.name, want, got, actor)
			}
		}
		s.CreateUser("John", "Doe", test.headers...)
		s.Do("PATCH", "/users/1", name, test.headers...)
		s.Do("DELETE", "/users/1", "", test.headers...)
		for _, want := range []string{"user.created", "user.updated", "user.deleted"} {
			check(want, test.actor)
		}
		if test.name == "postgres" {
			insertUser(t, db, nil)
			check("user.created", "sql:"+db.Name)
		}
		s.Stop()
	}
	if n := d.Webhooks.Len(); n != 3 {
		t.Errorf("%d webhooks are documented", n)
	}
	async.checkExchange(t, rabbitURL)
	async.checkSeen(t)
}

// consume returns the messages of a queue that is bound to the env.Response of the service.
func consume(t *testing.T, rabbitURL string) <-chan amqp.Delivery {
	t.Helper()
	conn, err := amqp.Dial(rabbitURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	var channel *amqp.Channel
	env.Eventually(t, "the env.Response user_events", func() bool {
		if channel, err = conn.Channel(); err != nil {
			t.Fatal(err)
		}
		err = channel.ExchangeDeclarePassive("user_events", "topic", true, false, false, false, nil)
		return err == nil
	})
	queue, err := channel.QueueDeclare("", false, true, true, false, nil)
	if err == nil {
		err = channel.QueueBind(queue.Name, "#", "user_events", false, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	messages, err := channel.Consume(queue.Name, "", true, true, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	return messages
}

func checkMessage(t *testing.T, d *document, want string, message amqp.Delivery) {
	t.Helper()
	webhook := d.Webhooks.GetOrZero(want)
	if webhook == nil || message.RoutingKey != want {
		t.Fatalf("a message %s, not the documented %s", message.RoutingKey, want)
	}
	schema := webhook.Post.RequestBody.Content.GetOrZero("application/json").Schema
	value, err := decodeJSON(string(message.Body))
	if err == nil {
		err = d.validate(schema, value)
	}
	if err != nil {
		t.Fatalf("%s: %v", message.Body, err)
	}
	if strings.Contains(string(message.Body), env.Secret) {
		t.Errorf("%s contains a password", message.Body)
	}
	// The schema lets consumers accept unknown members, but documents all that there are.
	for name := range value.(map[string]any) {
		if schema.Schema().Properties.GetOrZero(name) == nil {
			t.Errorf("%s: the member %s is not documented", message.Body, name)
		}
	}
}

// sendSlowly sends a request whose body does not arrive completely, and returns the response.
func sendSlowly(s *env.Program, method, path string) (env.Response, error) {
	address := strings.TrimPrefix(s.URL, "http://")
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return env.Response{}, err
	}
	defer conn.Close()
	request, err := http.NewRequest(method, s.URL+path, nil)
	if err != nil {
		return env.Response{}, err
	}
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return env.Response{}, err
	}
	if _, err := fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n"+
		"Content-Length: 100\r\n\r\n{", method, path, address); err != nil {
		return env.Response{}, err
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), request)
	if err != nil {
		return env.Response{}, err
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	return env.Response{Response: response, Body: string(content)}, err
}
