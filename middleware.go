package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// statusClientGone is what the log says where the client left before its answer.
const statusClientGone = 499

// retryAfter goes with every 503, in seconds.
const retryAfter = "1"

// handler answers a request, or returns the error that decides the answer. Before an
// error it has written nothing.
type handler func(w http.ResponseWriter, r *http.Request) error

// server is the outermost http.Handler: what is the same for all routes happens in its
// ServeHTTP, in that order.
type server struct {
	mux      *http.ServeMux
	log      *slog.Logger
	metrics  *metrics.Set
	access   *access
	traffic  traffic
	draining atomic.Bool // when set, each answer is the last of its connection
}

func newServer(s settings, log *slog.Logger, set *metrics.Set) *server {
	return &server{mux: http.NewServeMux(), log: log, metrics: set, access: newAccess(s)}
}

// traffic counts the requests.
type traffic struct {
	begun, ended atomic.Int64
	other        atomic.Int64 // when the last that is no POST ended, in ns since 1970
}

func (t *traffic) underWay() int64 { return t.begun.Load() - t.ended.Load() }

// mixedFor is how long one request announces others: where at least four a second come, a core
// stays theirs, and a probe now and then hardly slows the creation of users.
const mixedFor = 250 * time.Millisecond

// mixed says whether requests come that need not hash a password: all but POST count as such.
// Those under way would not tell: where every core hashes, others wait before they are read.
func (t *traffic) mixed() bool {
	return time.Since(time.Unix(0, t.other.Load())) < mixedFor
}

// route is a method of a path, and what answers it.
type route struct {
	method, path string
	handler      handler
}

// addRoutes registers routes, those that are open to everybody and those that may need a
// key, and what answers to anything else.
func (s *server) addRoutes(open, keyed []route) {
	for i := range keyed {
		keyed[i].handler = s.access.needsKey(keyed[i].handler)
	}
	allow := make(map[string]string)
	for _, r := range slices.Concat(open, keyed) {
		s.handle(r.method+" "+r.path, r.handler)
		if allow[r.path] != "" {
			allow[r.path] += ", "
		}
		allow[r.path] += strings.Replace(r.method, "GET", "GET, HEAD", 1)
	}
	for path, methods := range allow {
		s.handle(path, methodNotAllowed(methods))
	}
	s.handle("/", func(http.ResponseWriter, *http.Request) error { return errNoRoute })
}

// handle registers h. Its error reaches ServeHTTP in the response.
func (s *server) handle(pattern string, h handler) {
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		w.(*response).err = h(w, r)
	})
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.traffic.begun.Add(1)
	defer s.traffic.ended.Add(1)
	start := time.Now()
	id := requestTraceID(r.Header)
	r = r.WithContext(withTraceID(r.Context(), id))
	res := &response{ResponseWriter: w, gone: r.Context().Done(),
		head: r.Method == http.MethodHead}
	maps.Copy(res.Header(), securityHeaders)
	res.Header().Set("X-Trace-Id", id)
	if s.draining.Load() {
		res.Header().Set("Connection", "close")
	}
	method, path := slog.String("method", r.Method), slog.String("path", r.URL.Path)

	logInfo(r.Context(), s.log, start, "Request started", method, path)
	s.dispatch(res, r)
	answered := res.err == nil || s.fail(res, r)

	end := time.Now()
	elapsed := end.Sub(start)
	attrs := []slog.Attr{method, path,
		slog.Int("status", res.status),
		slog.Float64("duration_ms", float64(elapsed.Microseconds())/1000),
		slog.Int64("bytes", res.bytes),
	}
	if res.status == http.StatusServiceUnavailable && res.err != nil {
		attrs = append(attrs, slog.String("error", res.err.Error()))
	}
	if res.key != nil {
		attrs = append(attrs, slog.String("key", res.key.name))
	}
	logInfo(r.Context(), s.log, end, "Request completed", attrs...)
	s.observe(r.Pattern, res.status, elapsed)
	if r.Method != http.MethodPost {
		s.traffic.other.Store(end.UnixNano())
	}
	if !answered { // net/http would send an empty 200, or end half an answer as a whole one
		panic(http.ErrAbortHandler)
	}
}

// dispatch runs the handler of r, if r is let in. A panic becomes the error of the response.
func (s *server) dispatch(res *response, r *http.Request) {
	defer func() {
		if v := recover(); v != nil {
			res.err = &panicError{value: v, stack: debug.Stack()}
		}
	}()
	if res.err = s.access.admit(res, r, s.traffic.underWay()); res.err != nil {
		return
	}
	if !strings.HasPrefix(r.URL.Path, "/") { // OPTIONS *, CONNECT host:port
		res.err = errNoRoute
		return
	}
	if !preflight(res, r) {
		s.mux.ServeHTTP(res, r)
	}
}

// fail answers with the problem document that res.err stands for. It returns false where
// that cannot be: the client has left, or half an answer is out.
func (s *server) fail(res *response, r *http.Request) bool {
	if errors.Is(res.err, errClientGone) || errors.Is(res.err, context.Canceled) && res.clientGone() {
		res.status = statusClientGone
		return false
	}
	p := *problemOf(res.err, r)
	if p.Status == http.StatusInternalServerError {
		s.logFailure(r.Context(), res.err)
	}
	if res.status != 0 {
		return false
	}
	p.Type = "about:blank"
	p.Title = http.StatusText(p.Status)
	p.Instance = r.URL.EscapedPath()
	p.TraceID = traceID(r.Context())
	switch p.Status {
	case http.StatusServiceUnavailable:
		res.Header().Set("Retry-After", retryAfter)
	case http.StatusRequestTimeout, http.StatusRequestEntityTooLarge:
		res.Header().Set("Connection", "close") // what is left of the body is not read
	}
	res.Header().Set("Content-Type", "application/problem+json")
	return writeJSON(res, p.Status, p) == nil
}

func (s *server) logFailure(ctx context.Context, err error) {
	stack := debug.Stack()
	if p, ok := errors.AsType[*panicError](err); ok {
		stack = p.stack
	}
	s.log.LogAttrs(ctx, slog.LevelError, "Request failed",
		slog.String("error", err.Error()), slog.String("stack", string(stack)))
}

func (s *server) observe(pattern string, status int, elapsed time.Duration) {
	route := `{route="` + pattern + `"`
	s.metrics.GetOrCreateCounter("http_requests_total" + route +
		`,status="` + strconv.Itoa(status) + `"}`).Inc()
	s.metrics.GetOrCreatePrometheusHistogram(
		"http_request_duration_seconds" + route + "}").Update(elapsed.Seconds())
}

// methodNotAllowed answers for the methods that a path does not have.
func methodNotAllowed(allow string) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		if r.PathValue("id") != "" {
			if _, err := userID(r); err != nil {
				return err // not even the path exists
			}
		}
		w.Header().Set("Allow", allow)
		return newProblem(http.StatusMethodNotAllowed,
			r.Method+" is not a method of this path: those are "+allow)
	}
}

// response remembers of an answer what the request log needs to know.
type response struct {
	http.ResponseWriter
	key    *apiKey         // nil: the client has none
	gone   <-chan struct{} // closed when the client has left
	head   bool            // the body is not sent
	status int             // 0: nothing was written
	bytes  int64
	err    error
}

func (w *response) clientGone() bool {
	select {
	case <-w.gone:
		return true
	default:
		return false
	}
}

func (w *response) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
		if w.clientGone() {
			w.status = statusClientGone
		}
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	n, err := w.ResponseWriter.Write(p)
	if !w.head {
		w.bytes += int64(n)
	}
	if err != nil {
		w.status = statusClientGone
	}
	return n, err
}

type panicError struct {
	value any
	stack []byte
}

func (e *panicError) Error() string {
	return fmt.Sprintf("panic: %v", e.value)
}

// writeJSON writes nothing where v cannot be encoded. The Content-Type is
// application/json unless one is set.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	var body []byte
	var err error
	if a, ok := v.(jsonAppender); ok {
		body = a.appendJSON(make([]byte, 0, 256))
	} else if body, err = json.Marshal(v); err != nil {
		return err
	}
	body = append(body, '\n')
	h := w.Header()
	if h.Get("Content-Type") == "" {
		h.Set("Content-Type", "application/json")
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body) // #nosec G705 -- never HTML; the response keeps the error
	return nil
}

// problem is an error that the client may see: a problem document by RFC 9457.
type problem struct {
	Type     string       `json:"type"`
	Title    string       `json:"title"`
	Status   int          `json:"status"`
	Detail   string       `json:"detail"`
	Instance string       `json:"instance"`
	TraceID  string       `json:"trace_id"`
	Errors   []fieldError `json:"errors,omitempty"`
}

// fieldError says what is wrong with one member of the body (Pointer: an RFC 6901
// pointer as a URI fragment) or with one query parameter.
type fieldError struct {
	Pointer   string `json:"pointer,omitempty"`
	Parameter string `json:"parameter,omitempty"`
	Detail    string `json:"detail"`
}

func (p *problem) Error() string {
	return p.Detail
}

func newProblem(status int, detail string) *problem {
	return &problem{Status: status, Detail: detail}
}

// invalid is the 400 that names every wrong part; one of them is called what.
func invalid(what string, errs []fieldError) *problem {
	detail := "1 " + what + " is not valid"
	if len(errs) > 1 {
		detail = fmt.Sprintf("%d %ss are not valid", len(errs), what)
	}
	return &problem{Status: http.StatusBadRequest, Detail: detail, Errors: errs}
}

var (
	errNoRoute    = newProblem(http.StatusNotFound, "There is nothing at this path")
	errOverloaded = newProblem(http.StatusServiceUnavailable, "Too many requests are under way")
	errClientGone = errors.New("the client went away")
)

// problemOf is the one place where an error becomes what the client is told. An error
// that it does not know is a 500 that tells nothing.
func problemOf(err error, r *http.Request) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	switch {
	case errors.Is(err, errNotFound):
		return newProblem(http.StatusNotFound, "User with id "+r.PathValue("id")+" not found")
	case errors.Is(err, errVersionMismatch):
		return newProblem(http.StatusPreconditionFailed,
			"If-Match does not name the current version of the user")
	case errors.Is(err, errInvalidValue):
		return newProblem(http.StatusBadRequest, "A value cannot be stored")
	case errors.Is(err, errReferenced):
		return newProblem(http.StatusConflict,
			"Other data refer to user with id "+r.PathValue("id"))
	case errors.Is(err, errRefused):
		return newProblem(http.StatusConflict, "A rule of the database refuses the change")
	case errors.Is(err, errUnavailable), errors.Is(err, errBusy):
		return newProblem(http.StatusServiceUnavailable,
			"The service cannot take the request now; nothing was changed")
	case errors.Is(err, errOutcomeUnknown):
		return newProblem(http.StatusServiceUnavailable,
			"The database did not answer; whether the change was made is not known")
	}
	return newProblem(http.StatusInternalServerError, "The service failed inside")
}

type traceIDKey struct{}

func withTraceID(ctx context.Context, id string) context.Context {
	return context.WithValue(ctx, traceIDKey{}, id)
}

// traceID is "" where ctx belongs neither to a request nor to an event.
func traceID(ctx context.Context) string {
	id, _ := ctx.Value(traceIDKey{}).(string)
	return id
}

var (
	requestIDPattern   = regexp.MustCompile(`^[A-Za-z0-9._:-]{1,128}$`)
	traceparentPattern = regexp.MustCompile(
		`^([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?$`)
)

// requestTraceID is the id that the client gave, or a new one.
func requestTraceID(h http.Header) string {
	if ids := h["X-Request-Id"]; len(ids) == 1 && requestIDPattern.MatchString(ids[0]) {
		return ids[0]
	}
	if parents := h["Traceparent"]; len(parents) == 1 {
		if id := traceparentID(parents[0]); id != "" {
			return id
		}
	}
	return newUUIDv4()
}

// traceparentID is the trace-id field of a header by W3C Trace Context, section 3.2, or
// "" where the header is not valid. Only versions above 00 may have a fifth field.
func traceparentID(header string) string {
	fields := traceparentPattern.FindStringSubmatch(header)
	if fields == nil {
		return ""
	}
	version, id, parent, more := fields[1], fields[2], fields[3], fields[4]
	if version == "ff" || version == "00" && more != "" ||
		strings.Trim(id, "0") == "" || strings.Trim(parent, "0") == "" {
		return ""
	}
	return id
}
