package main

import (
	"bytes"
	"compress/gzip"
	_ "embed"
	"io"
	"net/http"
	"path"
	"strconv"
	"strings"
	"sync"

	"github.com/swaggest/swgui/v5/static"
)

var (
	//go:embed openapi.json
	openAPI []byte
	//go:embed docs.html
	docsPage []byte
	//go:embed docs.js
	docsStart []byte
)

// docsTypes does not depend on what the machine knows of media types.
var docsTypes = map[string]string{
	".css": "text/css; charset=utf-8",
	".js":  "text/javascript; charset=utf-8",
	".png": "image/png",
}

// docsPolicy lets the page load what this service serves, and send requests to it.
// Swagger UI writes style attributes and draws with data: images.
const docsPolicy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; " +
	"img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; " +
	"form-action 'none'; frame-ancestors 'none'"

func serveOpenAPI(w http.ResponseWriter, r *http.Request) error {
	return writeBytes(w, "application/json", openAPI)
}

func serveDocs(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Content-Security-Policy", docsPolicy)
	return writeBytes(w, "text/html; charset=utf-8", docsPage)
}

func redirectToDocs(w http.ResponseWriter, r *http.Request) error {
	http.Redirect(w, r, "/docs", http.StatusFound)
	return nil
}

// serveDocsFile serves a file of Swagger UI. The larger ones are embedded with gzip, and
// unpacked for a client that does not ask for that.
func serveDocsFile(w http.ResponseWriter, r *http.Request) error {
	name := path.Base(r.URL.Path)
	contentType := docsTypes[path.Ext(name)]
	if name == "start.js" {
		return writeBytes(w, contentType, docsStart)
	}
	body, err := static.FS.ReadFile(name)
	if err == nil && path.Ext(name) == ".png" {
		return writeBytes(w, contentType, body)
	}
	body, err = static.FS.ReadFile(name + ".gz")
	if err != nil {
		return errNoRoute
	}
	w.Header().Set("Vary", "Accept-Encoding")
	if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		w.Header().Set("Content-Encoding", "gzip")
		return writeBytes(w, contentType, body)
	}
	if body, err = unzipped(name, body); err != nil {
		return err
	}
	return writeBytes(w, contentType, body)
}

// unzippedFiles has each file once, however many clients read it slowly.
var unzippedFiles sync.Map

func unzipped(name string, zipped []byte) ([]byte, error) {
	if body, ok := unzippedFiles.Load(name); ok {
		return body.([]byte), nil
	}
	reader, err := gzip.NewReader(bytes.NewReader(zipped))
	if err != nil {
		return nil, err
	}
	body, err := io.ReadAll(reader)
	if err != nil {
		return nil, err
	}
	first, _ := unzippedFiles.LoadOrStore(name, body)
	return first.([]byte), nil
}

func writeBytes(w http.ResponseWriter, contentType string, body []byte) error {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(body) // #nosec G705 -- a file of our own; the response keeps the error
	return nil
}
