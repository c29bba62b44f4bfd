package main

// This file owns what operators look at: probes and metrics.

import (
	"fmt"
	"net"
	"net/http"
	"strconv"
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
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	h.metrics.WritePrometheus(w)
	if pending, oldest, err := h.store.size(r.Context()); err == nil {
		metrics.WriteGaugeUint64(w, "outbox_pending", uint64(pending)) // #nosec G115 -- a count
		metrics.WriteGaugeFloat64(w, "outbox_oldest_seconds", oldest.Seconds())
	}
	metrics.WriteProcessMetrics(w)
	return nil
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
