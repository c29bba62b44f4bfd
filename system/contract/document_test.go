package contract

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/pb33f/jsonschema/v6"
	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator"
	"github.com/pb33f/libopenapi-validator/config"
	validation "github.com/pb33f/libopenapi-validator/errors"
	"github.com/pb33f/libopenapi-validator/responses"
	"github.com/pb33f/libopenapi-validator/schema_validation"
	"github.com/pb33f/libopenapi/datamodel/high/base"
	v3 "github.com/pb33f/libopenapi/datamodel/high/v3"
	"github.com/pb33f/libopenapi/orderedmap"

	"user-service/system/env"
)

// document is openapi.json, parsed, and which of its responses the tests have seen.
type document struct {
	*v3.Document
	validator  validator.Validator
	responses  responses.ResponseBodyValidator // refuses members that are not documented
	schemas    schema_validation.SchemaValidator
	operations map[string]*operation // by operationId

	mu   sync.Mutex
	seen map[string]bool // "operationId status"
}

// operation is an operation of a path.
type operation struct {
	*v3.Operation
	doc    *document
	method string
	path   string
	item   *v3.PathItem
}

// readDocument parses openapi.json. A $ref that does not resolve fails the test.
func readDocument(t *testing.T) *document {
	t.Helper()
	parsed, err := libopenapi.NewDocument([]byte(readFile(t, "openapi.json")))
	if err != nil {
		t.Fatal(err)
	}
	model, err := parsed.BuildV3Model()
	if err != nil {
		t.Fatal(err)
	}
	options := []config.Option{config.WithFormatAssertions(), config.WithoutSecurityValidation()}
	v, problems := validator.NewValidator(parsed, options...)
	if err := errors.Join(problems...); err != nil {
		t.Fatal(err)
	}
	d := &document{
		Document:  &model.Model,
		validator: v,
		responses: responses.NewResponseBodyValidator(&model.Model, append(options,
			config.WithStrictMode(), config.WithStrictIgnoredHeadersExtra(undocumentedHeaders...))...),
		schemas:    schema_validation.NewSchemaValidator(options...),
		operations: make(map[string]*operation),
		seen:       make(map[string]bool),
	}
	for path, item := range d.Paths.PathItems.FromOldest() {
		for method, o := range item.GetOperations().FromOldest() {
			d.operations[o.OperationId] = &operation{o, d, strings.ToUpper(method), path, item}
		}
	}
	return d
}

// operation returns the operation with an operationId.
func (d *document) operation(t *testing.T, id string) *operation {
	t.Helper()
	o := d.operations[id]
	if o == nil {
		t.Fatalf("the operation %s is not documented", id)
	}
	return o
}

// validate checks a decoded JSON value, with numbers as json.Number, against a schema.
func (d *document) validate(schema *base.SchemaProxy, value any) error {
	_, problems := d.schemas.ValidateSchemaObject(schema.Schema(), value)
	return joined(problems)
}

// validateText checks the value of a parameter or a header against its schema.
func (d *document) validateText(schema *base.SchemaProxy, text string) error {
	var value any = text
	if types := schema.Schema().Type; len(types) == 1 && types[0] == "integer" {
		value = json.Number(text)
		if _, err := strconv.ParseFloat(text, 64); err != nil {
			return fmt.Errorf("%q is not a number", text)
		}
	}
	return d.validate(schema, value)
}

func joined(problems []*validation.ValidationError) error {
	var errs []error
	for _, p := range problems {
		errs = append(errs, p)
	}
	return errors.Join(errs...)
}

// decodeJSON decodes text with numbers as json.Number. Nothing may follow the value.
func decodeJSON(text string) (any, error) {
	return jsonschema.UnmarshalJSON(strings.NewReader(text))
}

// decodeNode returns an example of the document as decodeJSON would.
func decodeNode(t *testing.T, node interface{ Decode(any) error }) any {
	t.Helper()
	var value any
	if err := node.Decode(&value); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	if value, err = decodeJSON(string(text)); err != nil {
		t.Fatal(err)
	}
	return value
}

// examples returns all examples of a media type, of either form.
func examples(t *testing.T, m *v3.MediaType) []any {
	t.Helper()
	var values []any
	if m.Example != nil {
		values = append(values, decodeNode(t, m.Example))
	}
	for _, example := range orderedOrEmpty(m.Examples) {
		values = append(values, decodeNode(t, example.Value))
	}
	return values
}

// orderedOrEmpty returns the entries of a map of the document that may be absent.
func orderedOrEmpty[V any](m *orderedmap.Map[string, V]) map[string]V {
	if m == nil {
		return nil
	}
	return maps.Collect(m.FromOldest())
}

// content returns the media types of the request body.
func (o *operation) content() map[string]*v3.MediaType {
	if o.RequestBody == nil {
		return nil
	}
	return orderedOrEmpty(o.RequestBody.Content)
}

// listedErrors matches the end of the description of an operation with the response `default`. The
// group is its status codes.
var listedErrors = regexp.MustCompile(`\n\nErrors: (\d{3}(?:, \d{3})*)\.$`)

// statuses returns the statuses that the operation documents: those of its responses, and those of
// the response `default`, which its description lists.
func (o *operation) statuses() []string {
	var statuses []string
	if match := listedErrors.FindStringSubmatch(o.Description); match != nil {
		statuses = strings.Split(match[1], ", ")
	}
	return slices.AppendSeq(statuses, o.Responses.Codes.KeysFromOldest())
}

// documents reports whether the operation documents a status.
func (o *operation) documents(status int) bool {
	return slices.Contains(o.statuses(), strconv.Itoa(status))
}

// target returns what Swagger UI requests when a reader only presses Execute: path
// parameters have their example, query parameters their default.
func (o *operation) target(t *testing.T) string {
	t.Helper()
	target, separator := o.path, "?"
	for _, p := range o.Parameters {
		required := p.Required != nil && *p.Required
		switch defaultValue := p.Schema.Schema().Default; {
		case p.In == "path" && required && p.Example != nil:
			target = strings.ReplaceAll(target, "{"+p.Name+"}", p.Example.Value)
		case p.In == "query" && defaultValue != nil:
			target += separator + p.Name + "=" + defaultValue.Value
			separator = "&"
		case required:
			t.Errorf("%s: the parameter %s has no example", o.OperationId, p.Name)
		}
	}
	if strings.Contains(target, "{") {
		t.Errorf("%s: %s has a parameter that is not documented", o.OperationId, target)
	}
	return target
}

// exampleBody returns the example of a media type of the request body. It is empty if the
// operation does not take that media type.
func (o *operation) exampleBody(t *testing.T, mediaType string) string {
	t.Helper()
	m := o.content()[mediaType]
	if m == nil {
		return ""
	}
	if m.Example == nil {
		t.Fatalf("%s: the body %s has no example", o.OperationId, mediaType)
	}
	body, err := json.Marshal(decodeNode(t, m.Example))
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// undocumentedHeaders may be part of any response. The document mentions them in its description,
// or not at all.
var undocumentedHeaders = []string{"Cache-Control", "Connection", "Content-Length",
	"Content-Security-Policy", "Content-Type", "Date", "Referrer-Policy",
	"X-Content-Type-Options", "X-Trace-Id", "RateLimit", "RateLimit-Policy",
	"Access-Control-Allow-Origin"}

// requiredHeaders are those that the response `default` documents as present with a status.
var requiredHeaders = map[int][]string{
	401: {"WWW-Authenticate"}, 429: {"Retry-After"}, 503: {"Retry-After"},
}

// check checks a response against what the document says about its status.
func (o *operation) check(t *testing.T, e env.Response) {
	t.Helper()
	fail := func(format string, args ...any) {
		t.Helper()
		t.Errorf("%s: %s\n%v", o.OperationId, fmt.Sprintf(format, args...), e)
	}
	response := *e.Response
	response.Body = bodyOf(e.Body)
	bodies := o.doc.responses
	if o.OperationId == "openapi" || o.OperationId == "asyncapi" { // objects of any members
		bodies = o.doc.validator.GetResponseBodyValidator()
	}
	if _, problems := bodies.ValidateResponseBodyWithPathItem(
		e.Request, &response, o.item, o.path); len(problems) > 0 {
		fail("%v", joined(problems))
	}
	if !o.documents(response.StatusCode) {
		fail("it has a status that is not documented")
		return
	}
	documented := cmp.Or(o.Responses.Codes.GetOrZero(strconv.Itoa(response.StatusCode)),
		o.Responses.Default)
	o.doc.mu.Lock()
	o.doc.seen[fmt.Sprint(o.OperationId, " ", response.StatusCode)] = true
	o.doc.mu.Unlock()

	if orderedmap.Len(documented.Content) == 0 &&
		(e.Body != "" || response.Header.Get("Content-Type") != "") {
		fail("it has a body")
	}
	undocumented := response.Header.Clone()
	for _, name := range undocumentedHeaders {
		undocumented.Del(name)
	}
	for name, header := range orderedOrEmpty(documented.Headers) {
		undocumented.Del(name)
		values := response.Header.Values(name)
		required := header.Required || slices.Contains(requiredHeaders[response.StatusCode], name)
		if len(values) > 1 || len(values) == 0 && required {
			fail("the header %s appears %d times", name, len(values))
		}
		for _, value := range values {
			if err := o.doc.validateText(header.Schema, value); err != nil {
				fail("the header %s: %v", name, err)
			}
		}
	}
	if len(undocumented) > 0 {
		fail("headers that are not documented: %v", undocumented)
	}
}
