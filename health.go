package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

type healthStore interface {
	ready(ctx context.Context) string
	size(ctx context.Context) (pending int64, oldest time.Duration, err error)
}

// health has the handlers for those who run the service.
type health struct {
	store    healthStore
	broker   interface{ status() string }
	metrics  *metrics.Set
	draining *atomic.Bool
}

func (h *health) live(w http.ResponseWriter, r *http.Request) error {
	return writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
}

// ready says whether this replica should get requests. RabbitMQ does not matter for it:
// no request waits for it.
func (h *health) ready(w http.ResponseWriter, r *http.Request) error {
	answer := struct {
		Status   string `json:"status"`
		Database string `json:"database"`
		RabbitMQ string `json:"rabbitmq"`
	}{"ready", h.store.ready(r.Context()), h.broker.status()}
	if h.draining.Load() || answer.Database == "down" || answer.Database == "read-only" {
		answer.Status = "not ready"
		w.Header().Set("Retry-After", retryAfter)
		return writeJSON(w, http.StatusServiceUnavailable, answer)
	}
	return writeJSON(w, http.StatusOK, answer)
}

func (h *health) prometheus(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	h.metrics.WritePrometheus(w)
	if pending, oldest, err := h.store.size(r.Context()); err == nil {
		metrics.WriteGaugeUint64(w, "outbox_pending", uint64(pending)) // #nosec G115 -- a count
		metrics.WriteGaugeFloat64(w, "outbox_oldest_seconds", oldest.Seconds())
	}
	metrics.WriteProcessMetrics(w)
	return nil
}

// checkHealth is the command of the image's HEALTHCHECK: it asks the service that runs
// with the same settings.
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
