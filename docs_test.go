package main

import (
	"compress/gzip"
	"io"
	"strings"
	"testing"
)

// TestDocsPage checks the page /docs and the redirects to it.
func TestDocsPage(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	a := s.do("GET", "/docs", "")
	if got := a.header.Get("Content-Type"); a.status != 200 || got != "text/html; charset=utf-8" {
		t.Errorf("GET /docs: status %d, Content-Type %q, want 200, text/html", a.status, got)
	}
	const policy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; " +
		"img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; " +
		"form-action 'none'; frame-ancestors 'none'"
	if got := a.header.Get("Content-Security-Policy"); got != policy {
		t.Errorf("Content-Security-Policy: got %q, want %q", got, policy)
	}
	for _, path := range []string{"/docs/", "/schema", "/"} {
		a := s.do("GET", path, "")
		if got := a.header.Get("Location"); a.status != 302 || got != "/docs" {
			t.Errorf("GET %s: status %d, Location %q, want 302, /docs", path, a.status, got)
		}
	}
}

// TestDocsFiles checks the files of Swagger UI, with and without compression.
func TestDocsFiles(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for _, test := range []struct{ name, contentType, prefix string }{
		{name: "swagger-ui.css", contentType: "text/css; charset=utf-8", prefix: ".swagger-ui"},
		{name: "swagger-ui-bundle.js", contentType: "text/javascript; charset=utf-8",
			prefix: "/*! For license"},
		{name: "start.js", contentType: "text/javascript; charset=utf-8", prefix: "SwaggerUIBundle("},
		{name: "favicon-32x32.png", contentType: "image/png", prefix: "\x89PNG"},
	} {
		path := "/docs/" + test.name
		plain := s.do("GET", path, "", "Accept-Encoding: identity")
		if got := plain.header.Get("Content-Type"); plain.status != 200 || got != test.contentType {
			t.Errorf("GET %s: status %d, Content-Type %q, want 200, %q", path, plain.status, got,
				test.contentType)
		}
		if plain.header.Get("Content-Encoding") != "" || !strings.HasPrefix(plain.body, test.prefix) {
			t.Errorf("GET %s: Content-Encoding %q, body %.40q, want a body with the prefix %q", path,
				plain.header.Get("Content-Encoding"), plain.body, test.prefix)
		}
		zipped := s.do("GET", path, "", "Accept-Encoding: gzip, deflate, br")
		if unzip(t, zipped) != plain.body {
			t.Errorf("GET %s with gzip: got another file than without", path)
		}
		if vary := zipped.header.Get("Vary"); zipped.header.Get("Content-Encoding") != "" &&
			vary != "Accept-Encoding" {
			t.Errorf("GET %s: Vary: got %q, want Accept-Encoding", path, vary)
		}
		head := s.do("HEAD", path, "", "Accept-Encoding: identity")
		for _, name := range []string{"Content-Type", "Content-Length", "Cache-Control", "Vary"} {
			if got, want := head.header.Get(name), plain.header.Get(name); got != want {
				t.Errorf("HEAD %s: %s: got %q, want %q", path, name, got, want)
			}
		}
		if head.status != 200 || head.body != "" {
			t.Errorf("HEAD %s: status %d with %d bytes, want 200 without a body", path, head.status,
				len(head.body))
		}
	}
	for _, name := range []string{"nothing.js", "swagger-ui.css.gz", "embed.go", "..%2fgo.mod"} {
		if a := s.do("GET", "/docs/"+name, ""); a.status != 404 {
			t.Errorf("GET /docs/%s: status %d, want 404", name, a.status)
		}
	}
}

// unzip returns the body without its Content-Encoding.
func unzip(t *testing.T, a answer) string {
	t.Helper()
	if a.header.Get("Content-Encoding") == "" {
		return a.body
	}
	reader, err := gzip.NewReader(strings.NewReader(a.body))
	if err != nil {
		t.Fatal(err)
	}
	content, err := io.ReadAll(reader)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}
