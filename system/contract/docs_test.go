package contract

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"user-service/system/env"
)

// remoteHost is this machine under a name that the browser does not treat as localhost, whose
// pages have more rights.
const remoteHost = "users.test"

// TestDocsInBrowser does what a newcomer does: it opens /docs, authorizes with an API key or with
// an access token, presses Execute on each operation with the values that the page offers, and
// reads the answer. It does so directly and behind a proxy that strips a path prefix.
func TestDocsInBrowser(t *testing.T) {
	t.Parallel()
	provider := startProvider(t)
	for _, test := range []struct {
		name        string
		prefix      string
		field       int // of the dialog; each way to authorize has one
		credentials string
	}{
		{name: "API key", field: 1, credentials: fullKey},
		{name: "access token", prefix: "/api", field: 2,
			credentials: provider.token(t, "users:read users:write")},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := startService(t, keysSetting(), "JWT_AUDIENCE=users", "JWT_JWKS_URL="+provider.url)
			for _, name := range []string{"John", "Zoë"} { // John is user 1 of the examples
				s.CreateUser(name, "Doe", "Authorization: Bearer "+fullKey)
			}
			p := openPage(t, addPrefix(t, s.URL, test.prefix), "/")
			testDocs(t, p, test.field, test.credentials)
		})
	}
}

func testDocs(t *testing.T, p *page, field int, credentials string) {
	form := fmt.Sprintf(".modal-ux .auth-container:nth-of-type(%d) ", field)
	p.run(
		chromedp.Click(chromedp.CSS(".btn.authorize")),
		chromedp.SendKeys(chromedp.CSS(form+"input"), credentials),
		chromedp.Click(chromedp.CSS(form+".btn.authorize")),
		chromedp.Click(chromedp.CSS(form+".btn-done")),
		chromedp.Navigate(p.origin+"/docs/"), // the page keeps the credentials
	)
	d := readDocument(t)
	for id, o := range d.operations {
		if id != "deleteUser" && id != "listUsers" {
			p.execute(o)
		}
	}
	p.execute(d.operation(t, "deleteUser"))
	var list struct{ Users []struct{ Name string } }
	body := p.execute(d.operation(t, "listUsers"))
	if err := json.Unmarshal([]byte(body), &list); err != nil || len(list.Users) != 2 ||
		list.Users[0].Name != "Zoë" {
		t.Errorf("the page shows the users %s", body)
	}
	if complaints := p.recorded(); len(complaints) > 0 {
		t.Errorf("the page causes %v", complaints)
	}
}

// addPrefix starts a proxy that serves a service under a path prefix, and returns its URL under
// the name remoteHost.
func addPrefix(t *testing.T, serviceURL, prefix string) string {
	t.Helper()
	target, err := url.Parse(serviceURL)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(prefix+"/", http.StripPrefix(prefix, httputil.NewSingleHostReverseProxy(target)))
	proxy := httptest.NewServer(mux)
	t.Cleanup(proxy.Close)
	return strings.Replace(proxy.URL, "127.0.0.1", remoteHost, 1) + prefix
}

// TestDocsLayout checks that an expanded operation fits on two desktop screens, and that neither
// a desktop nor a phone has to scroll sideways. With SCREENSHOTS=directory it leaves pictures.
func TestDocsLayout(t *testing.T) {
	t.Parallel()
	p := openPage(t, addPrefix(t, startService(t, "API_KEYS=open").URL, ""), "/docs")
	d := readDocument(t)
	for _, screen := range []struct {
		name          string
		width, height int64
		maxHeight     float64 // of an operation, in screens
	}{
		{name: "desktop", width: 1280, height: 900, maxHeight: 2},
		{name: "phone", width: 390, height: 844, maxHeight: 4},
	} {
		p.run(
			chromedp.EmulateViewport(screen.width, screen.height),
			chromedp.Navigate(p.origin+"/docs"),
		)
		for id, o := range d.operations {
			p.run(p.toggle(o), p.waitExpanded(o))
			height := evaluate(p, chromedp.Evaluate[float64](fmt.Sprintf(
				"document.querySelector(%q).getBoundingClientRect().height", o.block())))
			if limit := screen.maxHeight * float64(screen.height); height > limit {
				t.Errorf("%s, %s: height %.0f, want at most %.0f", screen.name, id, height, limit)
			}
			width := evaluate(p, chromedp.Evaluate[int64]("document.documentElement.scrollWidth"))
			if width > screen.width {
				t.Errorf("%s, %s: width %d, want at most %d", screen.name, id, width, screen.width)
			}
			if directory := os.Getenv("SCREENSHOTS"); directory != "" {
				p.screenshot(filepath.Join(directory, screen.name+"-"+id+".png"))
			}
			p.run(p.toggle(o))
		}
	}
}

// page is a page in a browser that this test started.
type page struct {
	t      *testing.T
	ctx    context.Context
	origin string

	mu         sync.Mutex
	complaints []string // what the page should not have done
}

// openPage starts a browser that can reach nothing but this machine, and opens a page in it.
func openPage(t *testing.T, origin, path string) *page {
	t.Helper()
	executable, err := findBrowser()
	if err != nil {
		env.Missing(t, "Chromium", err)
	}
	home := t.TempDir()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewExecAllocator(ctx, chromedp.ExecPath(executable),
		chromedp.UserDataDir(filepath.Join(home, "profile")), chromedp.Env("HOME="+home, "TMPDIR="+home),
		chromedp.Flag("headless", "new"), chromedp.NoSandbox, chromedp.DisableGPU,
		chromedp.NoFirstRun, chromedp.WindowSize(1280, 1024),
		chromedp.Flag("disable-dev-shm-usage", true),
		chromedp.Flag("disable-background-networking", true),
		chromedp.Flag("disable-component-update", true), chromedp.Flag("disable-sync", true),
		chromedp.Flag("host-resolver-rules", "MAP "+remoteHost+" 127.0.0.1, "+
			"MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"))
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(func() {
		if err := chromedp.Cancel(ctx); err != nil { // closes the browser and waits for it
			t.Logf("closing the browser: %v", err)
		}
		cancel()
	})
	p := &page{t: t, ctx: ctx, origin: origin}
	t.Cleanup(p.explainFailure)
	if err := chromedp.Listen(ctx, p.record); err != nil { // starts the browser
		t.Fatal(err)
	}
	p.run(chromedp.Func(func(ctx context.Context, target *chromedp.Target) error {
		_, err := cdp.Call(ctx, target, runtime.Enable, cdp.Empty{})
		return err
	}), chromedp.Navigate(origin+path))
	return p
}

func findBrowser() (path string, err error) {
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err = exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", errors.New("no chromium, chromium-browser or google-chrome in PATH")
}

// run performs actions, each of which waits for its element.
func (p *page) run(actions ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	evaluate(p, chromedp.Steps(actions...))
}

// evaluate performs an action for at most 30 s and returns its result.
func evaluate[T any](p *page, action chromedp.Action[T]) T {
	p.t.Helper()
	result, err := chromedp.Run(p.ctx, func(ctx context.Context, t *chromedp.Target) (T, error) {
		ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		return action(ctx, t)
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return result
}

// block returns the selector of the operation's part of the page.
func (o *operation) block() string { return "#operations-" + o.Tags[0] + "-" + o.OperationId }

// toggle expands or collapses an operation.
func (p *page) toggle(o *operation) chromedp.Action[chromedp.Void] {
	return chromedp.Click(chromedp.CSS(o.block() + " .opblock-summary-control"))
}

// waitExpanded waits until the page shows the parameters and responses of an operation, which is
// when every $ref is resolved.
func (p *page) waitExpanded(o *operation) chromedp.Action[chromedp.Void] {
	actions := []chromedp.Action[chromedp.Void]{
		chromedp.WaitVisible(chromedp.CSS(o.block() + " .responses-table .response")),
	}
	for _, parameter := range o.Parameters {
		actions = append(actions, chromedp.WaitVisible(chromedp.CSS(fmt.Sprintf(
			"%s [data-param-name=%q] input", o.block(), parameter.Name))))
	}
	return chromedp.Steps(actions...)
}

// execute expands an operation, presses Execute, checks that the page shows a 2xx, collapses it
// again and returns the body that the page shows, if any.
func (p *page) execute(o *operation) string {
	p.t.Helper()
	live := o.block() + " .live-responses-table .response "
	p.run(p.toggle(o), p.waitExpanded(o), chromedp.Click(chromedp.CSS(o.block()+" .btn.execute")))
	status := evaluate(p, chromedp.Text(chromedp.CSS(live+".response-col_status")))
	if !strings.HasPrefix(status, "20") {
		p.t.Errorf("%s: the page shows the status %q", o.OperationId, status)
	}
	body := evaluate(p, chromedp.Evaluate[string](fmt.Sprintf(
		"document.querySelector(%q)?.innerText ?? ''", live+".highlight-code code")))
	p.run(p.toggle(o))
	return body
}

// record keeps the events that a page without faults does not cause: resources that fail to
// load or belong to another server, and messages on the console, which include violations of
// its Content-Security-Policy.
func (p *page) record(event any) {
	switch event := event.(type) {
	case *network.EventRequestWillBeSent:
		address := event.Request.URL
		if !strings.HasPrefix(address, p.origin+"/") && !strings.HasPrefix(address, "data:") {
			p.complain("a request to " + address)
		}
	case *network.EventResponseReceived:
		if event.Response.Status >= 400 {
			p.complain(fmt.Sprint("status ", event.Response.Status, " of ", event.Response.URL))
		}
	case *network.EventLoadingFailed:
		p.complain(event.ErrorText)
	case *log.EventEntryAdded:
		if event.Entry.Level == log.EntryLevelWarning || event.Entry.Level == log.EntryLevelError {
			p.complain(event.Entry.Text + " " + event.Entry.URL)
		}
	case *runtime.EventConsoleAPICalled:
		for _, argument := range event.Args {
			p.complain("the console message " + string(argument.Value) + argument.Description)
		}
	case *runtime.EventExceptionThrown:
		p.complain(fmt.Sprintf("the exception %+v", event.ExceptionDetails))
	}
}

func (p *page) complain(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.complaints = append(p.complaints, text)
}

func (p *page) recorded() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.complaints
}

// screenshot writes a picture of the whole page as PNG.
func (p *page) screenshot(file string) {
	picture, err := chromedp.Run(p.ctx, chromedp.FullScreenshot(100))
	if err != nil {
		p.t.Error(err)
		return
	}
	if err := os.WriteFile(file, picture, 0o600); err != nil {
		p.t.Error(err)
	}
}

// explainFailure leaves a picture of the page if the test failed.
func (p *page) explainFailure() {
	if !p.t.Failed() {
		return
	}
	p.t.Logf("the page caused %v", p.recorded())
	file := filepath.Join(os.TempDir(), env.UniqueName()+".png")
	p.screenshot(file)
	p.t.Logf("the page is in %s", file)
}
