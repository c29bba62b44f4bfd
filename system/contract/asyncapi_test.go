package contract

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/pb33f/jsonschema/v6"
	amqp "github.com/rabbitmq/amqp091-go"

	"user-service/system/env"
)

// asyncDocument is asyncapi.json, and which of its messages and headers the tests have seen.
type asyncDocument struct {
	root     any
	compiler *jsonschema.Compiler

	mu   sync.Mutex
	seen map[string]bool // routing keys, and names of headers
}

const asyncURL = "https://example.com/asyncapi.json"

// readAsyncDocument parses asyncapi.json.
func readAsyncDocument(t *testing.T) *asyncDocument {
	t.Helper()
	root, err := decodeJSON(readFile(t, "assets/asyncapi.json"))
	if err != nil {
		t.Fatal(err)
	}
	d := &asyncDocument{root: root, compiler: jsonschema.NewCompiler(), seen: make(map[string]bool)}
	d.compiler.DefaultDraft(jsonschema.Draft7)
	d.compiler.AssertFormat()
	if err := d.compiler.AddResource(asyncURL, root); err != nil {
		t.Fatal(err)
	}
	return d
}

// asyncNode is a value of the document. A $ref is replaced by what it refers to.
type asyncNode struct {
	doc     *asyncDocument
	pointer string
	value   any
}

// at returns the value at a path of member names. The value is nil if there is none.
func (d *asyncDocument) at(names ...string) asyncNode {
	return asyncNode{d, "", d.root}.at(names...)
}

func (n asyncNode) at(names ...string) asyncNode {
	for _, name := range names {
		n = asyncNode{n.doc, n.pointer + "/" + name, n.members()[name]}
		for ref := n.ref(); ref != ""; ref = n.ref() {
			n = n.doc.at(strings.Split(strings.TrimPrefix(ref, "#/"), "/")...)
		}
	}
	return n
}

func (n asyncNode) members() map[string]any {
	members, _ := n.value.(map[string]any)
	return members
}

func (n asyncNode) ref() string {
	ref, _ := n.members()["$ref"].(string)
	return ref
}

func (n asyncNode) text() string { return fmt.Sprint(n.value) }

// validate checks a decoded JSON value against the schema at n.
func (n asyncNode) validate(value any) error {
	schema, err := n.doc.compiler.Compile(asyncURL + "#" + n.pointer)
	if err != nil {
		return err
	}
	return schema.Validate(value)
}

// properties returns the names of the properties of the schema at n, which may be in allOf.
func (n asyncNode) properties() map[string]bool {
	names := make(map[string]bool)
	for name := range n.at("properties").members() {
		names[name] = true
	}
	parts, _ := n.at("allOf").value.([]any)
	for _, part := range parts {
		if ref := (asyncNode{value: part}).ref(); ref != "" {
			part := n.doc.at(strings.Split(strings.TrimPrefix(ref, "#/"), "/")...)
			maps.Copy(names, part.properties())
		}
	}
	return names
}

// asyncMessage is a message of the document, and where it is sent.
type asyncMessage struct{ operation, channel, message asyncNode }

// messages returns the messages that the service sends, by their routing keys.
func (d *asyncDocument) messages() map[string]asyncMessage {
	messages := make(map[string]asyncMessage)
	for name := range d.at("operations").members() {
		operation := d.at("operations", name)
		channel := operation.at("channel")
		for name := range channel.at("messages").members() {
			messages[channel.at("address").text()] =
				asyncMessage{operation, channel, channel.at("messages", name)}
		}
	}
	return messages
}

// decoded returns a value as decodeJSON would decode its JSON.
func decoded(t *testing.T, value any) any {
	t.Helper()
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	result, err := decodeJSON(string(text))
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// check checks a message of RabbitMQ against the document.
func (d *asyncDocument) check(t *testing.T, received amqp.Delivery) {
	t.Helper()
	m, ok := d.messages()[received.RoutingKey]
	if !ok {
		t.Fatalf("the routing key %s is not documented", received.RoutingKey)
	}
	body, err := decodeJSON(string(received.Body))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.message.at("payload").validate(body); err != nil {
		t.Errorf("%s: %v", received.Body, err)
	}
	headers := decoded(t, received.Headers)
	if err := m.message.at("headers").validate(headers); err != nil {
		t.Errorf("%v: %v", received.Headers, err)
	}
	documented := m.message.at("headers").properties()
	d.mu.Lock()
	d.seen[received.RoutingKey] = true
	for name := range received.Headers {
		if d.seen[name] = true; !documented[name] {
			t.Errorf("the header %s is not documented", name)
		}
	}
	d.mu.Unlock()

	binding := func(n asyncNode, name string) asyncNode { return n.at("bindings", "amqp", name) }
	mode := binding(m.operation, "deliveryMode")
	var event struct {
		ID   string `json:"event_id"`
		Type string `json:"event_type"`
		Data struct {
			UserID json.Number `json:"user_id"`
		}
		TraceID    string `json:"trace_id"`
		OccurredAt string `json:"occurred_at"`
	}
	if err := json.Unmarshal(received.Body, &event); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, got, want string }{
		{"action", "send", m.operation.at("action").text()},
		{"exchange", received.Exchange, binding(m.channel, "exchange").at("name").text()},
		{"kind of channel", "routingKey", binding(m.channel, "is").text()},
		{"delivery mode", fmt.Sprint(received.DeliveryMode), mode.text()},
		{"timestamp", fmt.Sprint(!received.Timestamp.IsZero()), binding(m.operation, "timestamp").text()},
		{"type", received.Type, binding(m.message, "messageType").text()},
		{"content type", received.ContentType, m.message.at("contentType").text()},
		{"content encoding", received.ContentEncoding, ""},
		{"correlation id", "$message.header#/trace_id", m.message.at("correlationId", "location").text()},
		{"correlation_id", received.CorrelationId, event.TraceID},
		{"message_id", received.MessageId, event.ID},
	} {
		if test.got != test.want {
			t.Errorf("%s: the %s is %q, want %q", received.RoutingKey, test.name, test.got, test.want)
		}
	}
	for name, want := range map[string]string{
		"trace_id":                event.TraceID,
		"cloudEvents:specversion": "1.0",
		"cloudEvents:id":          event.ID,
		"cloudEvents:source":      "/user-service", // APP_NAME
		"cloudEvents:type":        event.Type,
		"cloudEvents:subject":     event.Data.UserID.String(),
		"cloudEvents:time":        event.OccurredAt,
	} {
		if got := received.Headers[name]; got != want {
			t.Errorf("%s: the header %s is %q, want %q", received.RoutingKey, name, got, want)
		}
	}
}

// checkExchange declares the exchange of each message with the documented properties. RabbitMQ
// refuses that if it has others.
func (d *asyncDocument) checkExchange(t *testing.T, rabbitURL string) {
	t.Helper()
	conn, err := amqp.Dial(rabbitURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for key, m := range d.messages() {
		exchange := m.channel.at("bindings", "amqp", "exchange")
		durable, _ := exchange.at("durable").value.(bool)
		autoDelete, _ := exchange.at("autoDelete").value.(bool)
		channel, err := conn.Channel()
		if err != nil {
			t.Fatal(err)
		}
		if err := channel.ExchangeDeclare(exchange.at("name").text(), exchange.at("type").text(),
			durable, autoDelete, false, false, nil); err != nil {
			t.Errorf("%s: the exchange differs from the documented one: %v", key, err)
		}
	}
}

// checkSeen checks that the tests have seen each documented message and header.
func (d *asyncDocument) checkSeen(t *testing.T) {
	t.Helper()
	for key, m := range d.messages() {
		for _, name := range slices.AppendSeq([]string{key},
			maps.Keys(m.message.at("headers").properties())) {
			if !d.seen[name] {
				t.Errorf("%s: no message has the documented %s", key, name)
			}
		}
	}
}

// TestAsyncDocumentExamples checks the examples of the messages against their schemas.
func TestAsyncDocumentExamples(t *testing.T) {
	t.Parallel()
	d := readAsyncDocument(t)
	for key, m := range d.messages() {
		examples, _ := m.message.at("examples").value.([]any)
		if len(examples) == 0 {
			t.Errorf("%s has no example", key)
		}
		for _, example := range examples {
			example := asyncNode{value: example}
			headers, payload := example.members()["headers"], example.members()["payload"]
			if err := m.message.at("headers").validate(headers); err != nil {
				t.Errorf("%s: the headers of an example: %v", key, err)
			}
			if err := m.message.at("payload").validate(payload); err != nil {
				t.Errorf("%s: the payload of an example: %v", key, err)
			}
			id, _ := headers.(map[string]any)["trace_id"].(string)
			if want := (asyncNode{value: payload}).members()["trace_id"]; id != want {
				t.Errorf("%s: an example has the trace ids %v and %v", key, id, want)
			}
		}
	}
}

// TestDocumentsAgree compares what both documents describe: the version, the messages, and the
// schemas of their bodies.
func TestDocumentsAgree(t *testing.T) {
	t.Parallel()
	d := readAsyncDocument(t)
	text, err := decodeJSON(readFile(t, "openapi.json"))
	if err != nil {
		t.Fatal(err)
	}
	openAPI := &asyncDocument{root: text}
	if got, want := d.at("info", "version").text(), openAPI.at("info", "version").text(); got != want {
		t.Errorf("asyncapi.json has the version %s, openapi.json %s", got, want)
	}
	keys := slices.Sorted(maps.Keys(d.messages()))
	webhooks := slices.Sorted(maps.Keys(openAPI.at("webhooks").members()))
	if !slices.Equal(keys, webhooks) {
		t.Errorf("asyncapi.json has the messages %v, openapi.json %v", keys, webhooks)
	}
	for _, name := range []string{"Event", "EventData", "UserId", "Version", "TraceId", "Timestamp"} {
		want := maps.Clone(openAPI.at("components", "schemas", name).members())
		if name == "EventData" { // these are for generators of clients
			delete(want, "not")
			delete(want, "$comment")
		}
		if got := d.at("components", "schemas", name).value; fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("asyncapi.json has the schema %s\n%v\nopenapi.json\n%v", name, got, want)
		}
	}
}

// TestDocumentsAreServed checks that the service serves the files byte for byte.
func TestDocumentsAreServed(t *testing.T) {
	t.Parallel()
	s := startService(t, keysSetting()) // they need no key
	for path, file := range map[string]string{
		"/openapi.json":  "openapi.json",
		"/asyncapi.json": "assets/asyncapi.json",
	} {
		e := s.Do("GET", path, "")
		if e.StatusCode != 200 || e.Body != readFile(t, file) ||
			e.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: status %d, %v, %d bytes", path, e.StatusCode, e.Header, len(e.Body))
		}
	}
}

// TestAsyncDocumentLink checks that /docs has a link to asyncapi.json, also behind a proxy that
// strips a path prefix.
func TestAsyncDocumentLink(t *testing.T) {
	t.Parallel()
	p := openPage(t, addPrefix(t, startService(t, "API_KEYS=open").URL, "/api"), "/docs")
	link := chromedp.CSS(`.info a[href$="asyncapi.json"]`)
	p.run(chromedp.WaitVisible(link))
	address := evaluate(p, chromedp.Evaluate[string](
		`document.querySelector('.info a[href$="asyncapi.json"]').href`))
	if want := p.origin + "/asyncapi.json"; address != want {
		t.Fatalf("the link leads to %s, want %s", address, want)
	}
	p.run(chromedp.Navigate(address))
	text := evaluate(p, chromedp.Evaluate[string](`document.querySelector("pre").textContent`))
	if text != readFile(t, "assets/asyncapi.json") {
		t.Errorf("the link leads to %.200s", text)
	}
	if complaints := p.recorded(); len(complaints) > 0 {
		t.Errorf("the pages cause %v", complaints)
	}
}

// awaitRabbitMQ waits until the service is connected to RabbitMQ.
func awaitRabbitMQ(t *testing.T, s *env.Program) {
	t.Helper()
	env.Eventually(t, "RabbitMQ", func() bool {
		return strings.Contains(s.Do("GET", "/readyz", "").Body, `"rabbitmq":"up"`)
	})
}
