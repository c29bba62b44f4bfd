package main

import (
	"encoding/json"
	"strings"
	"testing"
)

// routesBesideTheDocument are other spellings of documented routes, redirects to them, and
// the parts of a page.
var routesBesideTheDocument = []string{"GET /users/{$}", "POST /users/{$}", "GET /docs/{$}",
	"GET /docs/start.js", "GET /docs/swagger-ui-bundle.js", "GET /docs/swagger-ui.css",
	"GET /docs/favicon-32x32.png", "GET /schema", "GET /{$}"}

// TestOpenAPIHasEveryRoute compares the routes with the document. What the document says about
// each of them is checked from outside, in system/contract.
func TestOpenAPIHasEveryRoute(t *testing.T) {
	t.Parallel()
	var document struct {
		Paths map[string]map[string]any
	}
	text, err := assets.ReadFile("openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &document); err != nil {
		t.Fatal(err)
	}
	missing := make(map[string]bool)
	for _, route := range routesBesideTheDocument {
		missing[route] = true
	}
	for path, methods := range document.Paths {
		for method := range methods {
			missing[strings.ToUpper(method)+" "+path] = true
		}
	}
	for _, route := range append(publicRoutes(&health{}), protectedRoutes(&api{}, &health{})...) {
		pattern := route.method + " " + route.path
		if !missing[pattern] {
			t.Errorf("the route %s is not documented", pattern)
		}
		delete(missing, pattern)
	}
	for pattern := range missing {
		t.Errorf("%s is not a route", pattern)
	}
}
