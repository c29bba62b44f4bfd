package main

// This file owns the routes about the service itself: probes, metrics, and /docs. It also owns what
// the log says about a database that cannot be opened.

import (
	"cmp"
	"compress/gzip"
	"crypto/tls"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/swaggest/swgui/v5/static"
)

// state is the state of a dependency, as /readyz shows it.
type state string

const (
	stateUp        state = "up"
	stateDown      state = "down"
	stateReadOnly  state = "read-only"  // a database that takes no writes
	stateMemory    state = "memory"     // no database
	stateInProcess state = "in-process" // no broker
)

// health has the handlers for operators.
type health struct {
	store    store
	broker   broker
	metrics  *metrics.Set
	draining *atomic.Bool
}

// newHealth returns the handlers, and registers the metrics of what is limited, with its limits.
func newHealth(d dependencies, t *traffic, passwords *hashLanes) *health {
	for name, value := range map[string]func() int64{
		"http_requests_in_flight":       t.requests.Load,
		"http_requests_in_flight_limit": func() int64 { return int64(d.limits.requests) },
		"password_hashes_queued":        passwords.queued.Load,
		"password_hashes_queued_limit":  func() int64 { return int64(d.limits.hashQueue) },
	} {
		d.metrics.NewGauge(name, func() float64 { return float64(value()) })
	}
	return &health{d.store, d.broker, d.metrics, d.draining}
}

// live answers 200 as long as the process serves requests. It asks no dependency, so that an outage
// of the database does not restart the service.
func (h *health) live(w *response, r *http.Request, _ caller) error {
	return writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
}

// ready reports whether this replica should receive requests. The state of RabbitMQ does not count,
// because no request waits for it.
func (h *health) ready(w *response, r *http.Request, _ caller) error {
	answer := struct {
		Status   string `json:"status"`
		Database state  `json:"database"`
		RabbitMQ state  `json:"rabbitmq"`
	}{"ready", h.store.ready(), h.broker.state()}
	if h.draining.Load() || answer.Database == stateDown || answer.Database == stateReadOnly {
		answer.Status = "not ready"
		w.Header().Set("Retry-After", retryAfter)
		return writeJSON(w, http.StatusServiceUnavailable, answer)
	}
	return writeJSON(w, http.StatusOK, answer)
}

// prometheus answers in the Prometheus text format. The outbox metrics are missing while the
// database does not answer.
func (h *health) prometheus(w *response, r *http.Request, _ caller) error {
	var text strings.Builder
	h.metrics.WritePrometheus(&text)
	h.store.writeMetrics(&text)
	if pending, oldest, err := h.store.size(r.Context()); err == nil {
		metrics.WriteGaugeUint64(&text, "outbox_pending", uint64(pending)) // #nosec G115 -- a count
		metrics.WriteGaugeFloat64(&text, "outbox_oldest_seconds", oldest.Seconds())
	}
	metrics.WriteProcessMetrics(&text)
	metrics.WriteFDMetrics(&text)
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	_, _ = io.WriteString(w, describe(text.String())) // response records a failure
	return nil
}

// writeMetrics implements store.
func (s *postgres) writeMetrics(w io.Writer) {
	pool := s.pool.Stat()
	metrics.WriteGaugeFloat64(w, "database_connections_in_use", float64(pool.AcquiredConns()))
	metrics.WriteGaugeFloat64(w, "database_connections_limit", float64(pool.MaxConns()))
	metrics.WriteCounterFloat64(w, "database_connection_waits_total",
		float64(pool.EmptyAcquireCount()))
	metrics.WriteCounterFloat64(w, "database_connection_wait_seconds_total",
		pool.EmptyAcquireWaitTime().Seconds())
}

// metricHelp has the HELP text of each metric that /metrics shows.
var metricHelp = map[string]string{
	"broker_connected":                       "1 while the consumer is connected to the broker.",
	"build_info":                             "1. The labels name the release and the Go version.",
	"database_connection_wait_seconds_total": "Time spent waiting for a connection.",
	"database_connection_waits_total":        "Statements that waited for a connection.",
	"database_connections_in_use":            "Connections that run a statement.",
	"database_connections_limit":             "Maximum of connections to the database.",
	"events_consumed_total":                  "Events that the consumer logged.",
	"events_published_total":                 "Events that the broker confirmed.",
	"events_rejected_total":                  "Messages that became dead letters.",
	"events_returned_total":                  "Events that no queue accepted.",
	"events_skipped_total":                   "Duplicates that the consumer dropped.",
	"http_request_duration_seconds":          "Duration of requests.",
	"http_requests_in_flight":                "Requests in progress, including this one.",
	"http_requests_in_flight_limit":          "Requests in progress at most.",
	"http_requests_total":                    "Requests by route and status.",
	"log_lines_dropped_total":                "Log lines that could not be written.",
	"outbox_oldest_seconds":                  "Age of the oldest pending event.",
	"outbox_pending":                         "Events that the broker has not confirmed.",
	"password_hashes_queued":                 "Passwords that wait or are being hashed.",
	"password_hashes_queued_limit":           "Queued passwords of one client at most.",
	"relay_leader":                           "1 on the replica that publishes events.",

	"go_gc_cpu_seconds_total":       "Processor time of the garbage collector, an estimate.",
	"go_gc_duration_seconds":        "Pauses for garbage collection.",
	"go_goroutines":                 "Goroutines.",
	"go_gomaxprocs":                 "Threads that run Go code at the same time.",
	"go_info":                       "1. The label names the Go version.",
	"go_memlimit_bytes":             "Memory limit of the Go runtime.",
	"go_memstats_alloc_bytes":       "Heap in use by objects.",
	"go_memstats_alloc_bytes_total": "Bytes allocated for objects so far.",
	"go_memstats_heap_inuse_bytes":  "Heap in spans with objects.",
	"go_memstats_mallocs_total":     "Objects allocated so far.",
	"go_memstats_next_gc_bytes":     "Heap size at which the next garbage collection starts.",
	"go_memstats_stack_inuse_bytes": "Memory for stacks.",
	"go_memstats_sys_bytes":         "Memory from the operating system.",
	"go_mutex_wait_seconds_total":   "Time for which goroutines waited for mutexes.",
	"go_sched_latencies_seconds":    "Time for which goroutines waited for a thread.",
	"go_threads":                    "Threads.",
	"process_cpu_seconds_total":     "Processor time.",
	"process_max_fds":               "Maximum of open file descriptors.",
	"process_open_fds":              "Open file descriptors.",
	"process_resident_memory_bytes": "Resident memory.",
	"process_start_time_seconds":    "Start of the process, in seconds since 1970.",
	"process_virtual_memory_bytes":  "Virtual memory.",
}

// describe completes the HELP lines of text, which the library leaves empty. It drops metrics that
// are not in metricHelp: several of those that the library adds have the wrong type.
func describe(text string) string {
	var described strings.Builder
	for family := range strings.SplitSeq(text, "# HELP ") {
		name, rest, _ := strings.Cut(family, "\n")
		if help, ok := metricHelp[name]; ok {
			described.WriteString("# HELP " + name + " " + help + "\n" + rest)
		}
	}
	return described.String()
}

// oneIf returns the value of a gauge that is 1 or 0.
func oneIf(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// checkHealth asks for /healthz of the service that runs with the same settings. It is the command
// of the image's HEALTHCHECK.
func checkHealth(s settings) error {
	host := s.host
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1" // an image without /etc/hosts has no localhost
	}
	url := "http://" + net.JoinHostPort(host, strconv.Itoa(s.port)) + "/healthz"
	client := &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{}} // no proxy
	response, err := client.Get(url)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", url, response.Status)
	}
	return nil
}

//go:embed openapi.json assets/asyncapi.json assets/docs.html assets/docs.js
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

// serveAsset returns a handler that answers with an embedded file, byte for byte.
func serveAsset(name string) handler {
	return func(w *response, _ *http.Request, _ caller) error {
		return serveFile(w, assets, name, path.Ext(name))
	}
}

// serveDocs answers with the page of Swagger UI. docsPolicy allows no script in it.
func serveDocs(w *response, _ *http.Request, _ caller) error {
	w.Header().Set("Content-Security-Policy", docsPolicy)
	return serveFile(w, assets, "assets/docs.html", ".html")
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
// unpacked, once, for clients that do not accept it.
func serveSwaggerUI(w *response, r *http.Request, _ caller) error {
	name, extension := path.Base(r.URL.Path), path.Ext(r.URL.Path)
	if extension == ".png" {
		return serveFile(w, static.FS, name, extension)
	}
	w.Header().Set("Vary", "Accept-Encoding")
	if acceptsGzip(r.Header) {
		w.Header().Set("Content-Encoding", "gzip")
		return serveFile(w, static.FS, name+".gz", extension)
	}
	content, err := unpack(name + ".gz")
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", docsTypes[extension])
	w.Header().Set("Content-Length", strconv.Itoa(len(content)))
	_, _ = io.Copy(w, strings.NewReader(content)) // response records a failure
	return nil
}

// unpacked has the result of unpack by name. The largest takes 15 ms, and anybody may ask for it.
var unpacked sync.Map

// unpack returns the content of a file of Swagger UI.
func unpack(name string) (string, error) {
	if content, ok := unpacked.Load(name); ok {
		return content.(string), nil
	}
	file, err := static.FS.Open(name)
	if err != nil {
		return "", err
	}
	packed, err := gzip.NewReader(file)
	if err != nil {
		return "", err
	}
	content, err := io.ReadAll(packed)
	if err == nil {
		unpacked.Store(name, string(content))
	}
	return string(content), err
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

// remedies say what to do if the server refuses a connection or the schema, by SQLSTATE. Step 0 of
// schema.sql has its own hints.
var remedies = map[string]string{
	"28000": "check the user in DATABASE_URL, and pg_hba.conf",
	"28P01": "check the user and the password in DATABASE_URL",
	"3D000": "create the database with createdb, or check its name in DATABASE_URL",
	"42501": "the role must own its database or be granted CREATE on its schema",
	"53300": "close other connections, or raise max_connections of PostgreSQL",
	"57P03": "wait until PostgreSQL has started; if it does not, see its log",
}

// databaseFailure is the reason why the database cannot be opened.
type databaseFailure struct {
	text   string
	remedy string // may be empty
	denied bool   // waiting is of little use
}

// Error implements error.
func (f databaseFailure) Error() string {
	if f.remedy == "" {
		return f.text
	}
	return f.text + "; " + f.remedy
}

// warn logs that the start waits, for the time left at most. isNew adds the remedy.
func (f databaseFailure) warn(log *slog.Logger, left time.Duration, isNew bool) {
	attrs := []any{"error", f.text, "seconds_left", int(left.Seconds())}
	if isNew && f.remedy != "" {
		attrs = append(attrs, "remedy", f.remedy)
	}
	log.Warn("Waiting for the database", attrs...)
}

// explainFailure returns the reason for an error of prepareDatabase. The error of a connection has
// one text per address and TLS mode; the reason has one per host, and the remedy for the first.
func explainFailure(err error) databaseFailure {
	code := sqlState(err)
	remedy := remedies[code]
	f := databaseFailure{err.Error(), remedy, remedy != "" && !isTemporary(code)}
	failed, ok := errors.AsType[*pgconn.ConnectError](err)
	if !ok {
		return f
	}
	attempts := []error{failed.Unwrap()}
	for cause := failed.Unwrap(); cause != nil; cause = errors.Unwrap(cause) {
		if joined, ok := cause.(interface{ Unwrap() []error }); ok {
			attempts = joined.Unwrap()
		}
	}
	var hosts, texts []string
	unusable := true
	for _, attempt := range slices.SortedStableFunc(slices.Values(attempts), compareAttempts) {
		host, reason := explainAttempt(attempt)
		if slices.Contains(hosts, host) {
			continue
		}
		hosts, texts = append(hosts, host), append(texts, reason.text)
		f.remedy = cmp.Or(f.remedy, reason.remedy)
		unusable = unusable && reason.denied
	}
	return databaseFailure{strings.Join(texts, "; "), f.remedy, f.denied || unusable}
}

// compareAttempts puts an answer of the server first, and last that it has no TLS, because another
// attempt on the same host may have gone without.
func compareAttempts(a, b error) int {
	rank := func(err error) int {
		switch {
		case sqlState(err) != "":
			return 0
		case lacksTLS(err):
			return 2
		}
		return 1
	}
	return cmp.Compare(rank(a), rank(b))
}

// lacksTLS reports whether a server refused TLS. The driver has only a text for that.
func lacksTLS(err error) bool {
	return strings.HasSuffix(err.Error(), "server refused TLS connection")
}

// explainAttempt returns the host and the reason of one failed attempt to connect. The driver's
// text is such as "127.0.0.1:5432 (localhost): dial error: connect: connection refused".
func explainAttempt(err error) (host string, f databaseFailure) {
	where, cause, _ := strings.Cut(err.Error(), "): ")
	address, name, _ := strings.Cut(where, " (")
	if _, port, err := net.SplitHostPort(address); err == nil {
		address = net.JoinHostPort(name, port)
	}
	const unreachable = "start PostgreSQL, or check the host and the port in DATABASE_URL"
	if refusal, ok := errors.AsType[*pgconn.PgError](err); ok {
		return address, databaseFailure{text: address + ": " + refusal.Error()}
	}
	if lookup, ok := errors.AsType[*net.DNSError](err); ok {
		return lookup.Name, databaseFailure{fmt.Sprintf("host %s: %s", lookup.Name, lookup.Err),
			"check the host in DATABASE_URL, and the DNS", false}
	}
	if invalid, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return address, databaseFailure{address + ": " + invalid.Err.Error(),
			"check the host and sslrootcert in DATABASE_URL, and the server's certificate", true}
	}
	errno, failed := errors.AsType[syscall.Errno](err)
	switch {
	case lacksTLS(err):
		return address, databaseFailure{address + " does not support TLS",
			"turn on ssl in PostgreSQL, or change sslmode in DATABASE_URL", true}
	case errno == syscall.ECONNREFUSED:
		return address, databaseFailure{"connection to " + address + " refused", unreachable, false}
	case pgconn.Timeout(err):
		return address, databaseFailure{"connection to " + address + " timed out",
			unreachable, false}
	case failed:
		cause = errno.Error()
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		cause = "closed by the server"
	}
	return address, databaseFailure{"connection to " + address + ": " + cause, unreachable, false}
}
