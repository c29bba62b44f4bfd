package main

import (
	"compress/gzip"
	"io"
	"strings"
	"testing"
)

func TestDocsPage(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	a := s.do("GET", "/docs", "")
	if got := a.header.Get("Content-Type"); a.status != 200 || got != "text/html; charset=utf-8" {
		t.Errorf("status %d, content type %q", a.status, got)
	}
	const policy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; " +
		"img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; " +
		"form-action 'none'; frame-ancestors 'none'"
	if got := a.header.Get("Content-Security-Policy"); got != policy {
		t.Errorf("Content-Security-Policy is %q", got)
	}
	for _, path := range []string{"/docs/", "/schema", "/"} {
		a := s.do("GET", path, "")
		if got := a.header.Get("Location"); a.status != 302 || got != "/docs" {
			t.Errorf("%s: status %d, Location %q", path, a.status, got)
		}
	}
}

func TestDocsFiles(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for _, test := range []struct{ name, contentType, begin string }{
		{"swagger-ui.css", "text/css; charset=utf-8", ".swagger-ui"},
		{"swagger-ui-bundle.js", "text/javascript; charset=utf-8", "/*! For license"},
		{"start.js", "text/javascript; charset=utf-8", "SwaggerUIBundle("},
		{"favicon-32x32.png", "image/png", "\x89PNG"},
	} {
		path := "/docs/" + test.name
		plain := s.do("GET", path, "", "Accept-Encoding: identity")
		if got := plain.header.Get("Content-Type"); plain.status != 200 || got != test.contentType {
			t.Errorf("%s: status %d, content type %q", path, plain.status, got)
		}
		if plain.header.Get("Content-Encoding") != "" || !strings.HasPrefix(plain.body, test.begin) {
			t.Errorf("%s: %q begins with %.40q", path, plain.header.Get("Content-Encoding"), plain.body)
		}
		zipped := s.do("GET", path, "", "Accept-Encoding: gzip, deflate, br")
		if unzip(t, zipped) != plain.body {
			t.Errorf("%s is another file with gzip", path)
		}
		if vary := zipped.header.Get("Vary"); zipped.header.Get("Content-Encoding") != "" &&
			vary != "Accept-Encoding" {
			t.Errorf("%s: Vary is %q", path, vary)
		}
		head := s.do("HEAD", path, "", "Accept-Encoding: identity")
		for _, name := range []string{"Content-Type", "Content-Length", "Cache-Control", "Vary"} {
			if got, want := head.header.Get(name), plain.header.Get(name); got != want {
				t.Errorf("HEAD %s: %s is %q, not %q", path, name, got, want)
			}
		}
		if head.status != 200 || head.body != "" {
			t.Errorf("HEAD %s: status %d, %d bytes", path, head.status, len(head.body))
		}
	}
	for _, name := range []string{"nothing.js", "swagger-ui.css.gz", "embed.go", "..%2fgo.mod"} {
		if a := s.do("GET", "/docs/"+name, ""); a.status != 404 {
			t.Errorf("%s: status %d", name, a.status)
		}
	}
}

// unzip returns the body as it was before its Content-Encoding.
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
