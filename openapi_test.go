package main

import (
	"encoding/json"
	"fmt"
	"runtime"
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

// TestVersion checks that the document, the start line and the metrics show the same release.
func TestVersion(t *testing.T) {
	t.Parallel()
	var document struct {
		Info struct{ Version string }
	}
	text, err := assets.ReadFile("openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &document); err != nil {
		t.Fatal(err)
	}
	if document.Info.Version != release {
		t.Errorf("openapi.json has version %q, want %q", document.Info.Version, release)
	}
	s := startService(t, memorySettings())
	shown, _ := s.waitForLine("Service started")["version"].(string)
	if number, _, _ := strings.Cut(shown, "+"); number != release {
		t.Errorf("the start line has version %q, want %q", shown, release)
	}
	want := fmt.Sprintf("build_info{version=%q,go=%q} 1", shown, runtime.Version())
	if a := s.do("GET", "/metrics", ""); !strings.Contains(a.body, want) {
		t.Errorf("the metrics do not have %s", want)
	}
}
