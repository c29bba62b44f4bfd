package main

import (
	"bufio"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
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

// TestDocsInBrowser does what a newcomer does: open /docs, authorize with an API key, press
// Execute on each operation with what the page offers for it, and read the answer.
func TestDocsInBrowser(t *testing.T) {
	t.Parallel()
	key, setting := newTestKey(t, "newcomer", false)
	set := memorySettings()
	set.apiKeys = []apiKey{setting}
	s := startService(t, set)
	for _, name := range []string{"John", "Zoë"} { // John is the user 1 of the examples
		body := fmt.Sprintf(`{"name": %q, "surname": "Doe", "password": %q}`, name, secret)
		if a := s.do("POST", "/users", body, "Authorization: Bearer "+key); a.status != 201 {
			t.Fatalf("POST /users: %d %s", a.status, a.body)
		}
	}
	b := startBrowser(t)
	b.open(strings.Replace(s.url, "127.0.0.1", remoteHost, 1), "/docs")
	b.click(".btn.authorize")
	b.waitFor(".modal-ux input")
	b.evaluate(find(".modal-ux input") + ".focus()")
	b.call("Input.insertText", map[string]any{"text": key}, nil)
	b.click(".modal-ux .btn.authorize")
	b.click(".modal-ux .btn-done")

	const toggle = ".opblock-summary-control"
	press := func(o *operation) (block string) {
		block = "#operations-" + o.Tags[0] + "-" + o.OperationID + " "
		b.click(block + toggle)
		b.waitFor(block + "[data-param-name=X-Request-Id] input") // the $refs are resolved
		b.click(block + ".btn.execute")
		status := b.text(block + ".live-responses-table .response .response-col_status")
		if !strings.HasPrefix(status, "20") {
			t.Errorf("%s: the page shows the status %q", o.OperationID, status)
		}
		return block
	}
	operations := readDocument(t).operations()
	for id, o := range operations {
		if id != "deleteUser" && id != "listUsers" {
			b.click(press(o) + toggle)
		}
	}
	b.click(press(operations["deleteUser"]) + toggle)
	block := press(operations["listUsers"])
	var list userList
	body := b.text(block + ".live-responses-table .response .highlight-code code")
	if err := json.Unmarshal([]byte(body), &list); err != nil || len(list.Users) != 2 ||
		list.Users[0].Name != "Zoë" {
		t.Errorf("the page shows the users %s", body)
	}
	if complaints := b.complaints(); len(complaints) > 0 {
		t.Errorf("the page is not as it should be: %v", complaints)
	}
	if file := os.Getenv("SCREENSHOT"); file != "" {
		b.screenshot(file)
	}
}

// browser is a page in a Chromium of the test's own, which speaks the DevTools protocol:
// JSON messages that end with a NUL, through a pipe in each direction.
type browser struct {
	t       *testing.T
	out     *os.File
	in      *bufio.Reader
	session string
	origin  string
	lastID  int
	events  []browserEvent
}

type browserEvent struct {
	Method string
	Params struct {
		Args     any // of a call to the console
		Entry    struct{ Level, Text, URL string }
		Request  struct{ URL string }
		Response struct {
			URL    string
			Status int
		}
		ErrorText        string // of a request
		ExceptionDetails any
	}
}

// remoteHost is this machine by a name that the browser does not take for it: pages of
// localhost may do more.
const remoteHost = "users.test"

// startBrowser opens an empty page that can reach nothing but remoteHost.
func startBrowser(t *testing.T) *browser {
	t.Helper()
	path, err := findBrowser()
	if err != nil {
		missing(t, "Chromium", err)
	}
	home := t.TempDir()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	cmd := exec.CommandContext(ctx, path, "--headless=new", "--remote-debugging-pipe",
		"--user-data-dir="+home, "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
		"--disable-background-networking", "--disable-component-update", "--disable-sync",
		"--no-first-run", "--window-size=1280,1024",
		"--host-resolver-rules=MAP "+remoteHost+" 127.0.0.1, MAP * ~NOTFOUND", "about:blank")
	cmd.Env = append(os.Environ(), "HOME="+home, "TMPDIR="+home)
	// Its processes are a group, so that they can be made to end together.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	commandsIn, commandsOut := newPipe(t)
	answersIn, answersOut := newPipe(t)
	cmd.ExtraFiles = []*os.File{commandsIn, answersOut} // descriptors 3 and 4
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	commandsIn.Close()
	answersOut.Close()
	b := &browser{t: t, out: commandsOut, in: bufio.NewReader(answersIn)}
	t.Cleanup(func() {
		defer cancel()
		time.AfterFunc(5*time.Second, cancel)
		answersIn.SetReadDeadline(time.Now().Add(6 * time.Second))
		b.session = ""
		b.send("Browser.close", nil)
		io.Copy(io.Discard, b.in) // until its last process has ended
		cmd.Wait()
	})
	t.Cleanup(b.explainFailure)

	var target struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget",
		map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log", "Network"} {
		b.call(domain+".enable", nil, nil)
	}
	return b
}

func findBrowser() (path string, err error) {
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err = exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", errors.New("no chromium, chromium-browser or google-chrome in PATH")
}

func newPipe(t *testing.T) (in, out *os.File) {
	t.Helper()
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		out.Close()
	})
	return in, out
}

func (b *browser) send(method string, params any) error {
	b.lastID++
	message, err := json.Marshal(struct {
		ID      int    `json:"id"`
		Session string `json:"sessionId,omitempty"`
		Method  string `json:"method"`
		Params  any    `json:"params,omitempty"`
	}{b.lastID, b.session, method, params})
	if err != nil {
		return err
	}
	_, err = b.out.Write(append(message, 0))
	return err
}

// call waits for the answer to a command, and keeps the events that come before it.
func (b *browser) call(method string, params, result any) {
	b.t.Helper()
	if err := b.send(method, params); err != nil {
		b.t.Fatalf("%s: %v", method, err)
	}
	for {
		text, err := b.in.ReadBytes(0)
		if err != nil {
			b.t.Fatalf("%s: the browser ended: %v", method, err)
		}
		text = text[:len(text)-1]
		var message struct {
			ID     int
			Method string
			Error  *struct{ Message string }
			Result json.RawMessage
		}
		if err := json.Unmarshal(text, &message); err != nil {
			b.t.Fatal(err)
		}
		switch {
		case message.Method != "":
			var event browserEvent
			if err := json.Unmarshal(text, &event); err != nil {
				b.t.Fatalf("%v: %s", err, text)
			}
			b.events = append(b.events, event)
		case message.ID != b.lastID:
		case message.Error != nil:
			b.t.Fatalf("%s: %s", method, message.Error.Message)
		case result == nil:
			return
		default:
			if err := json.Unmarshal(message.Result, result); err != nil {
				b.t.Fatal(err)
			}
			return
		}
	}
}

func (b *browser) open(origin, path string) {
	b.t.Helper()
	b.origin = origin
	b.call("Page.navigate", map[string]any{"url": origin + path}, nil)
}

// evaluate returns the value of an expression of JavaScript in the page.
func (b *browser) evaluate(expression string) any {
	b.t.Helper()
	var evaluated struct {
		Result           struct{ Value any }
		ExceptionDetails any
	}
	b.call("Runtime.evaluate",
		map[string]any{"expression": expression, "returnByValue": true}, &evaluated)
	if evaluated.ExceptionDetails != nil {
		b.t.Fatalf("%s: %v", expression, evaluated.ExceptionDetails)
	}
	return evaluated.Result.Value
}

// find is an expression for the element that a CSS selector names.
func find(selector string) string {
	return fmt.Sprintf("document.querySelector(%q)", selector)
}

// waitFor waits until there is an element.
func (b *browser) waitFor(selector string) {
	b.t.Helper()
	eventually(b.t, "the element "+selector, func() bool {
		return b.evaluate(find(selector)+" !== null") == true
	})
}

func (b *browser) click(selector string) {
	b.t.Helper()
	b.waitFor(selector)
	b.evaluate(find(selector) + ".click()")
}

// text returns what a reader sees of an element.
func (b *browser) text(selector string) string {
	b.t.Helper()
	b.waitFor(selector)
	return fmt.Sprint(b.evaluate(find(selector) + ".innerText"))
}

// screenshot writes a picture of the whole page, as PNG.
func (b *browser) screenshot(file string) {
	b.t.Helper()
	var metrics struct{ CSSContentSize map[string]float64 }
	b.call("Page.getLayoutMetrics", nil, &metrics)
	clip := metrics.CSSContentSize
	clip["scale"] = 1
	var picture struct{ Data []byte }
	b.call("Page.captureScreenshot",
		map[string]any{"captureBeyondViewport": true, "clip": clip}, &picture)
	err := os.WriteFile(file, picture.Data, 0o600) // #nosec G703 -- the tester says where
	if err != nil {
		b.t.Error(err)
	}
}

// complaints are what the page should not have done: fail to load something, ask another
// server than its own, or write to the console, as it also does when its policy is broken.
func (b *browser) complaints() []any {
	var complaints []any
	for _, event := range b.events {
		p := event.Params
		switch event.Method {
		case "Network.requestWillBeSent":
			url := p.Request.URL
			if !strings.HasPrefix(url, b.origin+"/") && !strings.HasPrefix(url, "data:") {
				complaints = append(complaints, "it asks for "+url)
			}
		case "Network.responseReceived":
			if p.Response.Status >= 400 {
				complaints = append(complaints, p.Response)
			}
		case "Network.loadingFailed":
			complaints = append(complaints, p.ErrorText)
		case "Log.entryAdded":
			if p.Entry.Level == "warning" || p.Entry.Level == "error" {
				complaints = append(complaints, p.Entry)
			}
		case "Runtime.consoleAPICalled":
			complaints = append(complaints, p.Args)
		case "Runtime.exceptionThrown":
			complaints = append(complaints, p.ExceptionDetails)
		}
	}
	return complaints
}

// explainFailure leaves a picture of the page on which the test failed.
func (b *browser) explainFailure() {
	if !b.t.Failed() {
		return
	}
	b.t.Logf("the browser's events: %v", b.complaints())
	file := filepath.Join(os.TempDir(), uniqueName()+".png")
	b.screenshot(file)
	b.t.Logf("the page is in %s", file)
}
