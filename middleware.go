package main

// This file owns what is the same for all requests: an ordered list of middleware around the
// router.

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
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

// handler answers a request of a caller. If it returns an error it has written nothing, and the
// middleware answers with the problem that the error stands for.
type handler func(w *response, r *http.Request, by caller) error

// middleware wraps a handler in something that happens before or after it.
type middleware func(next handler) handler

// server is the http.Handler of the service.
type server struct {
	log      *slog.Logger
	metrics  *metrics.Set
	access   *access
	limits   limits
	traffic  *traffic
	draining *atomic.Bool // if set, each answer is the last of its connection
	handle   handler      // the router, in its middleware
}

// dependencies are what newHandler connects. newHandler starts nothing and closes nothing.
type dependencies struct {
	settings settings
	limits   limits
	store    store
	broker   broker
	log      *slog.Logger
	metrics  *metrics.Set
	draining *atomic.Bool
}

// newHandler returns the handler of all routes of the service.
func newHandler(d dependencies) http.Handler {
	t, access := &traffic{}, newAccess(d.settings)
	a := newAPI(d, t)
	h := newHealth(d, t, a.hasher.lanes)
	routes := append(publicRoutes(h), access.protect(protectedRoutes(a, h))...)
	return newServer(d, t, access, routes)
}

// newServer returns routes within the middleware. The first of the list is the outermost: it sees a
// request first, and its answer last.
func newServer(d dependencies, t *traffic, a *access, routes []route) *server {
	s := &server{log: d.log, metrics: d.metrics, access: a, limits: d.limits, traffic: t,
		draining: d.draining}
	s.handle = newRouter(routes)
	for _, wrap := range slices.Backward([]middleware{
		s.countRequests,   // the others need to know how busy the service is
		s.logRequests,     // with the final status: errors become answers here
		s.recoverPanics,   // panics become errors
		s.shareAnswers,    // CORS headers, on refusals too
		s.limitRequests,   // 429 and 503
		s.refuseOrigins,   // 403 to a page of another origin
		s.answerPreflight, // OPTIONS of a browser; any other OPTIONS is 405
	}) {
		s.handle = wrap(s.handle)
	}
	return s
}

// ServeHTTP prepares the request's trace id and the headers that every answer has.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id := requestTraceID(r.Header)
	r = r.WithContext(withTraceID(r.Context(), id))
	h := w.Header()
	maps.Copy(h, securityHeaders)
	h.Set("X-Trace-Id", id)
	if s.draining.Load() {
		h.Set("Connection", "close")
	}
	isHead := r.Method == http.MethodHead
	res := &response{ResponseWriter: w, gone: r.Context().Done(), isHead: isHead}
	if err := s.handle(res, r, s.access.identify(r.Header)); err != nil {
		// net/http would send an empty 200, or end half an answer as if it were whole.
		panic(http.ErrAbortHandler)
	}
}

// countRequests counts the requests in progress, and notes when requests other than POST end.
func (s *server) countRequests(next handler) handler {
	return func(w *response, r *http.Request, by caller) error {
		s.traffic.requests.Add(1)
		defer s.traffic.requests.Add(-1)
		err := next(w, r, by)
		if r.Method != http.MethodPost {
			s.traffic.otherDone.Store(time.Now().UnixNano())
		}
		return err
	}
}

// logRequests logs each request and counts it in the metrics. An error of next is answered here.
func (s *server) logRequests(next handler) handler {
	return func(w *response, r *http.Request, by caller) error {
		start := time.Now()
		method, path := slog.String("method", r.Method), slog.String("path", r.URL.Path)
		logInfo(r.Context(), s.log, start, "Request started", method, path)
		err := next(w, r, by)
		answered := err == nil || s.answerError(w, r, err)

		end := time.Now()
		elapsed := end.Sub(start)
		attrs := []slog.Attr{method, path,
			slog.Int("status", w.status),
			slog.Float64("duration_ms", float64(elapsed.Microseconds())/1000),
			slog.Int64("bytes", w.bytes),
		}
		if w.status == http.StatusServiceUnavailable && err != nil {
			attrs = append(attrs, slog.String("error", err.Error()))
		}
		if by.name != "" {
			attrs = append(attrs, slog.String("key", by.name))
		}
		logInfo(r.Context(), s.log, end, "Request completed", attrs...)
		s.observe(r.Pattern, w.status, elapsed)
		if answered {
			return nil
		}
		return err
	}
}

// observe counts an answer in the metrics of its route. Requests without a route share the pattern
// "/".
func (s *server) observe(pattern string, status int, elapsed time.Duration) {
	route := `{route="` + pattern + `"`
	s.metrics.GetOrCreateCounter("http_requests_total" + route +
		`,status="` + strconv.Itoa(status) + `"}`).Inc()
	s.metrics.GetOrCreatePrometheusHistogram(
		"http_request_duration_seconds" + route + "}").Update(elapsed.Seconds())
}

// answerError writes the problem document for err, and logs an internal error. It returns false if
// there is nothing to write to: the client has gone, or the handler has begun to answer.
func (s *server) answerError(w *response, r *http.Request, err error) bool {
	if errors.Is(err, errClientGone) || errors.Is(err, context.Canceled) && w.clientGone() {
		w.status = statusClientGone
		return false
	}
	p := problemOf(err, r)
	if p.Status == http.StatusInternalServerError {
		stack := debug.Stack()
		if panicked, ok := errors.AsType[*panicError](err); ok {
			stack = panicked.stack
		}
		s.log.LogAttrs(r.Context(), slog.LevelError, "Request failed",
			slog.String("error", err.Error()), slog.String("stack", string(stack)))
	}
	return w.status == 0 && writeProblem(w, r, p) == nil
}

// recoverPanics turns a panic of next into a *panicError, which is answered with 500.
func (s *server) recoverPanics(next handler) handler {
	return func(w *response, r *http.Request, by caller) (err error) {
		defer func() {
			if v := recover(); v != nil {
				err = &panicError{value: v, stack: debug.Stack()}
			}
		}()
		return next(w, r, by)
	}
}

// shareAnswers lets pages of the allowed origins read the answer.
func (s *server) shareAnswers(next handler) handler {
	return func(w *response, r *http.Request, by caller) error {
		s.access.allowOrigin(w.Header(), r.Header.Get("Origin"))
		return next(w, r, by)
	}
}

// limitRequests refuses requests of callers who send too many, and all when too many are in
// progress. It admits every probe: an overloaded process is alive.
func (s *server) limitRequests(next handler) handler {
	return func(w *response, r *http.Request, by caller) error {
		if r.URL.Path == "/healthz" || r.URL.Path == "/readyz" {
			return next(w, r, by)
		}
		if err := s.access.limitRate(w.Header(), r, by); err != nil {
			return err
		}
		if s.traffic.requests.Load() > int64(s.limits.requests) {
			return errOverloaded
		}
		return next(w, r, by)
	}
}

// refuseOrigins refuses changes that a page of another origin sends, unless its origin is allowed.
func (s *server) refuseOrigins(next handler) handler {
	return func(w *response, r *http.Request, by caller) error {
		if err := s.access.crossOrigin.Check(r); err != nil {
			return newProblem(http.StatusForbidden, "Pages of this origin must not send this")
		}
		return next(w, r, by)
	}
}

// answerPreflight answers preflight requests of the allowed origins. Others reach the router.
func (s *server) answerPreflight(next handler) handler {
	return func(w *response, r *http.Request, by caller) error {
		if isPreflight(r) && w.Header().Get("Access-Control-Allow-Origin") != "" {
			allowPreflight(w)
			return nil
		}
		return next(w, r, by)
	}
}

// route is a method of a path and its handler.
type route struct {
	method, path string
	handler      handler
}

// newRouter returns the handler that calls the route of a request. A path without a route is 404; a
// path without the method is 405 and lists the methods that it has.
//
// The ServeMux only matches: its handlers do nothing. So a route's handler can return an error and
// have a caller, which http.Handler does not provide for.
func newRouter(routes []route) handler {
	handlers := make(map[string]handler) // by pattern
	allow := make(map[string]string)     // the methods of a path
	for _, r := range routes {
		handlers[r.method+" "+r.path] = r.handler
		if allow[r.path] != "" {
			allow[r.path] += ", "
		}
		allow[r.path] += strings.Replace(r.method, "GET", "GET, HEAD", 1)
	}
	for path, methods := range allow {
		handlers[path] = methodNotAllowed(methods)
	}
	handlers["/"] = func(*response, *http.Request, caller) error { return errNoRoute }
	mux := http.NewServeMux()
	for pattern := range handlers {
		mux.HandleFunc(pattern, func(http.ResponseWriter, *http.Request) {})
	}
	return func(w *response, r *http.Request, by caller) error {
		if !strings.HasPrefix(r.URL.Path, "/") { // OPTIONS *, CONNECT host:port
			return errNoRoute
		}
		mux.ServeHTTP(w, r) // sets r.Pattern and the path values
		if w.status != 0 {  // redirects an unclean path
			return nil
		}
		return handlers[r.Pattern](w, r, by)
	}
}

// methodNotAllowed returns the handler for the methods that a path does not have.
func methodNotAllowed(allow string) handler {
	return func(w *response, r *http.Request, _ caller) error {
		if r.PathValue("id") != "" {
			if _, err := userID(r); err != nil {
				return err // 404: the path does not exist either
			}
		}
		w.Header().Set("Allow", allow)
		return newProblem(http.StatusMethodNotAllowed,
			"This path does not have the method "+r.Method+", only "+allow)
	}
}

// response is an http.ResponseWriter that keeps what the request log needs.
type response struct {
	http.ResponseWriter
	gone   <-chan struct{} // closed when the client has gone
	isHead bool            // net/http does not send the body
	status int             // 0 until the header is written
	bytes  int64           // of the body
}

// clientGone reports whether the client has closed the connection.
func (w *response) clientGone() bool {
	select {
	case <-w.gone:
		return true
	default:
		return false
	}
}

// WriteHeader implements http.ResponseWriter. It records 499 instead if the client has gone.
func (w *response) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
		if w.clientGone() {
			w.status = statusClientGone
		}
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (w *response) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	n, err := w.ResponseWriter.Write(p)
	if !w.isHead {
		w.bytes += int64(n)
	}
	if err != nil {
		w.status = statusClientGone
	}
	return n, err
}

// traceIDKey is the key of the trace id in a context, the only value that contexts carry here.
type traceIDKey struct{}

func withTraceID(ctx context.Context, id string) context.Context {
	return context.WithValue(ctx, traceIDKey{}, id)
}

// traceID returns "" if ctx belongs to neither a request nor an event.
func traceID(ctx context.Context) string {
	id, _ := ctx.Value(traceIDKey{}).(string)
	return id
}

var (
	requestIDPattern   = regexp.MustCompile(`^[A-Za-z0-9._:-]{1,128}$`)
	traceparentPattern = regexp.MustCompile(
		`^([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?$`)
)

// requestTraceID returns the X-Request-Id of a request, else the trace id of its traceparent, else
// a new UUID. It ignores headers that are repeated or malformed.
func requestTraceID(h http.Header) string {
	if ids := h["X-Request-Id"]; len(ids) == 1 && requestIDPattern.MatchString(ids[0]) {
		return ids[0]
	}
	if parents := h["Traceparent"]; len(parents) == 1 {
		if id := parentTraceID(parents[0]); id != "" {
			return id
		}
	}
	return newUUIDv4()
}

// parentTraceID returns the trace-id field of a traceparent header (W3C Trace Context, section
// 3.2), or "" if the header is invalid. Only versions above 00 may have a fifth field.
func parentTraceID(traceparent string) string {
	fields := traceparentPattern.FindStringSubmatch(traceparent)
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

// newUUIDv4 returns a random UUID (RFC 9562, section 5.4).
func newUUIDv4() string {
	var b [16]byte
	rand.Read(b[:]) // never fails, see its documentation
	return formatUUID(b, 4)
}

// newUUIDv7 returns a UUID that begins with the current time in milliseconds (RFC 9562, section
// 5.7).
func newUUIDv7() string {
	var b [16]byte
	rand.Read(b[:])
	milliseconds := uint64(time.Now().UnixMilli())
	binary.BigEndian.PutUint64(b[:], milliseconds<<16|uint64(b[6])<<8|uint64(b[7]))
	return formatUUID(b, 7)
}

// formatUUID sets the version and the variant, and returns the text of a UUID.
func formatUUID(b [16]byte, version byte) string {
	b[6] = b[6]&0x0f | version<<4
	b[8] = b[8]&0x3f | 0x80
	var text [36]byte
	hex.Encode(text[0:8], b[0:4])
	hex.Encode(text[9:13], b[4:6])
	hex.Encode(text[14:18], b[6:8])
	hex.Encode(text[19:23], b[8:10])
	hex.Encode(text[24:36], b[10:16])
	text[8], text[13], text[18], text[23] = '-', '-', '-', '-'
	return string(text[:])
}
