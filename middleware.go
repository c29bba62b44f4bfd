package main

// This file owns what is the same for all requests: an ordered list of middleware around the
// router.

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/http"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
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

	mu       sync.Mutex
	outcomes map[outcome]outcomeMetrics
	bodies   int64            // bytes of the large bodies in progress
	bodiesOf map[string]int64 // bytes of those of a client
}

// dependencies are what newHandler connects. newHandler starts nothing and closes nothing.
type dependencies struct {
	settings settings
	limits   limits
	store    store
	broker   broker
	log      *slog.Logger
	metrics  *metrics.Set
	tokens   *tokens // nil: no access tokens
	draining *atomic.Bool
}

// newHandler returns the handler of all routes of the service.
func newHandler(d dependencies) http.Handler {
	t, access := &traffic{}, newAccess(d.settings, d.tokens)
	a := newAPI(d, t)
	h := newHealth(d, t, a.hasher.lanes)
	routes := append(publicRoutes(h), access.protect(protectedRoutes(a, h))...)
	return newServer(d, t, access, routes)
}

// newServer returns routes within the middleware. The first of the list is the outermost: it sees a
// request first, and its answer last.
func newServer(d dependencies, t *traffic, a *access, routes []route) *server {
	s := &server{log: d.log, metrics: d.metrics, access: a, limits: d.limits, traffic: t,
		draining: d.draining, outcomes: make(map[outcome]outcomeMetrics),
		bodiesOf: make(map[string]int64)}
	s.handle = newRouter(routes)
	for _, wrap := range slices.Backward([]middleware{
		s.countRequests,   // the others need to know how busy the service is
		s.identifyCallers, // by API key, access token or address
		s.logRequests,     // with the final status: errors become answers here
		s.recoverPanics,   // panics become errors
		s.shareAnswers,    // CORS: headers, on refusals too, and preflight requests
		s.limitRequests,   // 429 and 503
		s.limitBodies,     // 503
		s.refuseHosts,     // 403 to a page that poses as this machine
		s.refuseOrigins,   // 403 to a page of another origin
	}) {
		s.handle = wrap(s.handle)
	}
	return s
}

// ServeHTTP prepares the request's trace and the headers that every answer has.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	t := requestTrace(r.Header)
	r = r.WithContext(withTrace(r.Context(), t))
	h := w.Header()
	maps.Copy(h, securityHeaders)
	h["X-Trace-Id"] = []string{t.id}
	if s.draining.Load() || len(r.TransferEncoding) > 0 || !r.ProtoAtLeast(1, 1) {
		// After a chunked body, which may have had a Content-Length too, a proxy and net/http might
		// disagree where the next request begins (RFC 9112, section 6.3). In HTTP/1.0, net/http
		// ignores Transfer-Encoding and does not show it.
		h.Set("Connection", "close")
	}
	isHead := r.Method == http.MethodHead
	res := &response{ResponseWriter: w, gone: r.Context().Done(), isHead: isHead}
	if err := s.handle(res, r, caller{}); err != nil {
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

// identifyCallers tells the handlers who has sent a request. It may wait for the keys of the identity
// provider.
func (s *server) identifyCallers(next handler) handler {
	return func(w *response, r *http.Request, _ caller) error {
		return next(w, r, s.access.identify(r))
	}
}

// isProbe reports whether a request comes from a monitor, and is of little interest in the log.
func isProbe(r *http.Request) bool {
	return r.URL.Path == "/healthz" || r.URL.Path == "/readyz" || r.URL.Path == "/metrics"
}

// logRequests logs each request and counts it in the metrics. An error of next is answered here.
// Probes are logged at DEBUG, and answers of 500 and above at WARN.
func (s *server) logRequests(next handler) handler {
	return func(w *response, r *http.Request, by caller) error {
		start := time.Now()
		method := slog.String("method", cut(r.Method, maxLogged))
		path := slog.String("path", cut(r.URL.Path, maxLogged))
		level := slog.LevelInfo
		if isProbe(r) {
			level = slog.LevelDebug
		}
		_ = logAt(r.Context(), s.log, level, start, "Request started", method, path)
		err := next(w, r, by)
		answered := err == nil || s.answerError(w, r, err)

		end := time.Now()
		elapsed := end.Sub(start)
		attrs := []slog.Attr{method, path,
			slog.Int("status", w.status),
			slog.Float64("duration_ms", float64(elapsed.Microseconds())/1000),
			slog.Int64("bytes", w.bytes),
		}
		if w.status >= http.StatusInternalServerError {
			level = slog.LevelWarn
			attrs = append(attrs, slog.Any("error", cmp.Or(err, errNotReady)))
		}
		if by.kind != "" {
			attrs = append(attrs, slog.String(by.kind, by.name))
		}
		_ = logAt(r.Context(), s.log, level, end, "Request completed", attrs...)
		s.observe(outcome{r.Pattern, w.status}, elapsed)
		if answered {
			return nil
		}
		return err
	}
}

// outcome is what the metrics distinguish requests by. Requests without a route share the pattern
// "/".
type outcome struct {
	pattern string
	status  int
}

// outcomeMetrics are the metrics of an outcome. All outcomes of a route share the histogram.
type outcomeMetrics struct {
	count    *metrics.Counter
	duration *metrics.PrometheusHistogram
}

// observe counts an answer in the metrics of its outcome.
func (s *server) observe(o outcome, elapsed time.Duration) {
	s.mu.Lock()
	m, ok := s.outcomes[o]
	if !ok {
		route := `{route="` + o.pattern + `"`
		m.count = s.metrics.GetOrCreateCounter("http_requests_total" + route +
			`,status="` + strconv.Itoa(o.status) + `"}`)
		m.duration = s.metrics.GetOrCreatePrometheusHistogram(
			"http_request_duration_seconds" + route + "}")
		s.outcomes[o] = m
	}
	s.mu.Unlock()
	m.count.Inc()
	m.duration.Update(elapsed.Seconds())
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

// shareAnswers lets pages of the allowed origins read the answer, and answers their preflight
// requests. Any other OPTIONS is 405.
func (s *server) shareAnswers(next handler) handler {
	return func(w *response, r *http.Request, by caller) error {
		allowed := s.access.allowOrigin(w.Header(), r.Header.Get("Origin"))
		if allowed && isPreflight(r) {
			allowPreflight(w)
			return nil
		}
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
		if rates := s.access.rates; rates != nil {
			if err := rates.admit(w.Header(), by.client); err != nil {
				return err
			}
		}
		if s.traffic.requests.Load() > int64(s.limits.requests) {
			return errOverloaded
		}
		return next(w, r, by)
	}
}

// limitBodies refuses a request with a large body, or one of unknown length, while other bodies take
// too much memory. A client gets half of it at most.
func (s *server) limitBodies(next handler) handler {
	return func(w *response, r *http.Request, by caller) error {
		size := min(r.ContentLength, maxBodyBytes)
		if size < 0 {
			size = maxBodyBytes
		}
		if size <= smallBody {
			return next(w, r, by)
		}
		if !s.takeBody(by.client, size) {
			return errOverloaded
		}
		defer s.takeBody(by.client, -size)
		return next(w, r, by)
	}
}

// takeBody takes memory for a body of a client, or returns it if size is negative.
func (s *server) takeBody(client string, size int64) (taken bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all, own := s.bodies+size, s.bodiesOf[client]+size
	if size > 0 && (all > s.limits.bodies || own > max(s.limits.bodies/2, maxBodyBytes)) {
		return false
	}
	s.bodies, s.bodiesOf[client] = all, own
	if own == 0 {
		delete(s.bodiesOf, client)
	}
	return true
}

// refuseHosts refuses requests for other hosts than this machine, if only this machine can connect
// and there are no API keys. A page can make its own host name resolve to 127.0.0.1 (DNS
// rebinding): to the browser, the service then has the same origin as the page.
func (s *server) refuseHosts(next handler) handler {
	return func(w *response, r *http.Request, by caller) error {
		if s.access.onlyLocal && !isLocal(r.Host) {
			return newProblem(http.StatusForbidden, "Without API_KEYS the service answers only "+
				"requests for localhost; API_KEYS=open allows every host name")
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
		if r.Method == http.MethodConnect { // a ServeMux does not clean its path
			r.Method = http.MethodOptions // which no path has either
		}
		mux.ServeHTTP(w, r) // sets r.Pattern and the path values
		if w.status != 0 {  // redirects an unclean path
			return nil
		}
		if r.PathValue("id") != "" {
			if _, err := userID(r); err != nil {
				return err // 404, before 405 and 401
			}
		}
		return handlers[r.Pattern](w, r, by)
	}
}

// methodNotAllowed returns the handler for the methods that a path does not have.
func methodNotAllowed(allow string) handler {
	return func(w *response, r *http.Request, _ caller) error {
		w.Header().Set("Allow", allow)
		return newProblem(http.StatusMethodNotAllowed,
			"This path has only the methods "+allow)
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

// WriteHeader implements http.ResponseWriter.
func (w *response) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
	_ = w.sendToHalfClosed()
}

// sendToHalfClosed sends what was written, if the client has closed its half of the connection. It
// may have closed the other half too: then the system of the client refuses what it receives, and
// the next call fails.
func (w *response) sendToHalfClosed() error {
	if !w.clientGone() {
		return nil
	}
	return http.NewResponseController(w.ResponseWriter).Flush()
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
	if err == nil {
		err = w.sendToHalfClosed()
	}
	if err != nil {
		w.status = statusClientGone
	}
	return n, err
}
