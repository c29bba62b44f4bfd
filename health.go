package main

// This file owns what operators look at: probes and metrics.

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
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
		"password_hashes_queued_limit":  func() int64 { return passwords.most },
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
	}{"ready", h.store.ready(r.Context()), h.broker.state()}
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
	"password_hashes_queued_limit":           "Queued passwords at most.",
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
