package main

// This file owns /docs, which shows openapi.json in Swagger UI, and needs no other host.

import (
	"compress/gzip"
	"embed"
	"io"
	"io/fs"
	"net/http"
	"path"
	"strconv"
	"strings"

	"github.com/swaggest/swgui/v5/static"
)

//go:embed openapi.json assets/docs.html assets/docs.js
var assets embed.FS

// docsTypes has the media types of the files. Those that package mime knows differ between
// machines.
var docsTypes = map[string]string{
	".css":  "text/css; charset=utf-8",
	".html": "text/html; charset=utf-8",
	".js":   "text/javascript; charset=utf-8",
	".json": "application/json",
	".png":  "image/png",
}

// docsPolicy allows the page to load files of this service and to send requests to it. Swagger UI
// writes style attributes and uses data: images.
const docsPolicy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; " +
	"img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; " +
	"form-action 'none'; frame-ancestors 'none'"

// serveOpenAPI answers with openapi.json, byte for byte.
func serveOpenAPI(w *response, _ *http.Request, _ caller) error {
	return serveFile(w, assets, "openapi.json", ".json")
}

// serveDocs answers with the page of Swagger UI.
func serveDocs(w *response, _ *http.Request, _ caller) error {
	w.Header().Set("Content-Security-Policy", docsPolicy)
	return serveFile(w, assets, "assets/docs.html", ".html")
}

// serveDocsScript answers with the script that starts Swagger UI. It is a file because docsPolicy
// allows no inline scripts.
func serveDocsScript(w *response, _ *http.Request, _ caller) error {
	return serveFile(w, assets, "assets/docs.js", ".js")
}

// redirectToDocs redirects / and /schema to the page, and /docs/, where the page's relative URLs
// would not resolve. Location is relative because a proxy may add a prefix to the path.
func redirectToDocs(w *response, r *http.Request, _ caller) error {
	location := "docs"
	if r.URL.Path == "/docs/" {
		location = "../docs"
	}
	w.Header().Set("Location", location) // http.Redirect would make it absolute
	w.WriteHeader(http.StatusFound)
	return nil
}

// serveSwaggerUI serves a file of Swagger UI. The large ones are embedded with gzip, and are
// unpacked for clients that do not accept it.
func serveSwaggerUI(w *response, r *http.Request, _ caller) error {
	name := path.Base(r.URL.Path)
	extension := path.Ext(name)
	if extension == ".png" {
		return serveFile(w, static.FS, name, extension)
	}
	w.Header().Set("Vary", "Accept-Encoding")
	if acceptsGzip(r.Header) {
		w.Header().Set("Content-Encoding", "gzip")
		return serveFile(w, static.FS, name+".gz", extension)
	}
	file, err := static.FS.Open(name + ".gz")
	if err != nil {
		return err
	}
	unpacked, err := gzip.NewReader(file)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", docsTypes[extension])
	_, _ = io.Copy(w, unpacked) // #nosec G110 -- a file of ours; response records a failure
	return nil
}

// acceptsGzip reports whether Accept-Encoding allows gzip and does not prefer identity (RFC 9110,
// section 12.5.3). A malformed weight counts as 0.
func acceptsGzip(h http.Header) bool {
	weights := make(map[string]float64)
	list := strings.ToLower(strings.Join(h["Accept-Encoding"], ","))
	for coding := range strings.SplitSeq(list, ",") {
		name, parameter, weighted := strings.Cut(coding, ";")
		weight := 1.0
		if weighted {
			text, _ := strings.CutPrefix(strings.TrimSpace(parameter), "q=")
			weight, _ = strconv.ParseFloat(text, 64)
		}
		weights[strings.TrimSpace(name)] = weight
	}
	weight, listed := weights["gzip"]
	if !listed {
		weight = weights["*"]
	}
	return weight > 0 && weight >= weights["identity"]
}

// serveFile streams an embedded file.
func serveFile(w *response, files fs.FS, name, extension string) error {
	file, err := files.Open(name)
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", docsTypes[extension])
	w.Header().Set("Content-Length", strconv.FormatInt(info.Size(), 10))
	_, _ = io.Copy(w, file) // response records a failure
	return nil
}
