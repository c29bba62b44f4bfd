package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// processorTime is the processor time of servers and of their databases.
type processorTime struct{ server, database time.Duration }

// sub returns the time since an earlier moment per n requests, in us.
func (t processorTime) sub(earlier processorTime, n float64) (server, database float64) {
	return float64((t.server - earlier.server).Microseconds()) / n,
		float64((t.database - earlier.database).Microseconds()) / n
}

// processorTime returns what servers have used, and their databases. PostgreSQL's time is that of
// the sessions in the database of the first server, without servers in that of the service, and of
// all sessions and workers that have ended: pgx closes the connection of a request whose client has
// gone, as at the end of a measurement.
func (r *rig) processorTime(subjects ...*subject) (t processorTime) {
	database := r.database
	if len(subjects) > 0 {
		database = subjects[0].database
	}
	for _, s := range subjects {
		t.server += ticks(s.PID(), 11, 12)
	}
	if len(subjects) > 0 && subjects[0].store != 0 {
		t.database = ticks(subjects[0].store, 11, 12)
		return t
	}
	t.database = ticks(r.postgres.PID(), 13, 14)
	stats, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range stats {
		commandLine, _ := os.ReadFile(path)
		if bytes.HasPrefix(commandLine, []byte("postgres: bench "+database+" ")) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			t.database += ticks(pid, 11, 12)
		}
	}
	return t
}

// ticks returns the sum of some fields of a process's stat, which count times. The first field
// after the name has the number 0.
func ticks(pid int, fields ...int) (sum time.Duration) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0 // it has ended
	}
	values := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	for _, i := range fields {
		n, _ := strconv.Atoi(values[i])
		sum += time.Duration(n) * 10 * time.Millisecond
	}
	return sum
}

// resetPeak makes peak count from now on.
func (s *subject) resetPeak() error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", s.PID()), []byte("5"), 0)
}

// peak returns the peak resident memory in MiB.
func (s *subject) peak() (MiB float64, err error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.PID()))
	for line := range strings.Lines(string(status)) {
		if n, _ := fmt.Sscanf(line, "VmHWM: %f kB", &MiB); n == 1 {
			return MiB / 1024, nil
		}
	}
	return 0, errors.Join(err, errors.New("the peak memory of "+s.name+" is unknown"))
}

// metric returns the value of a metric of a service that has no labels, or 0.
func (s *subject) metric(name string) (value float64) {
	response, err := http.Get(s.url + "/metrics")
	if err != nil {
		return 0
	}
	defer response.Body.Close()
	text, _ := io.ReadAll(response.Body)
	for line := range strings.Lines(string(text)) {
		if n, _ := fmt.Sscanf(line, name+" %f", &value); n == 1 {
			return value
		}
	}
	return 0
}

// consumed returns how many events a service has received, including those received twice.
func (s *subject) consumed() int {
	return int(s.metric("events_consumed_total") + s.metric("events_skipped_total"))
}

const newUser = `{"name": "John", "surname": "Doe", "password": "correct horse"}`

// send sends a request and returns an error if the answer is not 2xx.
func send(method, url, body string) error {
	request, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	if err == nil && response.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s", method, url, response.Status)
	}
	return err
}
