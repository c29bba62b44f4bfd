package main

import (
	"fmt"
	"net"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestHealthz checks the answer of GET /healthz with each store.
func TestHealthz(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		a := s.do("GET", "/healthz", "")
		if a.status != 200 || a.json(t, "status") != "ok" {
			t.Errorf("GET /healthz: got %d %s, want 200 with status ok", a.status, a.body)
		}
	})
}

// checkReady waits until /readyz returns a status code and an object with exactly these three members.
func (s *service) checkReady(want int, status, database, rabbitMQ string) {
	s.t.Helper()
	body := fmt.Sprint(map[string]any{"status": status, "database": database, "rabbitmq": rabbitMQ})
	eventually(s.t, fmt.Sprintf("an answer %d of /readyz with %s", want, body), func() bool {
		a := s.do("GET", "/readyz", "")
		if got := a.header.Get("Content-Type"); got != "application/json" {
			s.t.Errorf("GET /readyz: Content-Type: got %q, want application/json", got)
		}
		return a.status == want && fmt.Sprint(a.json(s.t)) == body
	})
}

// TestReadyzInMemory checks GET and HEAD /readyz without PostgreSQL and RabbitMQ.
func TestReadyzInMemory(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	s.checkReady(200, "ready", "memory", "in-process")
	if a := s.do("HEAD", "/readyz", ""); a.status != 200 {
		t.Errorf("HEAD /readyz: got %d, want 200", a.status)
	}
}

// TestReadyzWithRabbitMQ checks that /readyz reports the connection to RabbitMQ.
func TestReadyzWithRabbitMQ(t *testing.T) {
	t.Parallel()
	settings := memorySettings()
	settings.exchange = newExchange(t)
	settings.rabbitURL = testRabbitURL
	startService(t, settings).checkReady(200, "ready", "memory", "up")
}

// TestReadyzFollowsDatabase checks /readyz while the database is read-only, while it refuses connections,
// and after it has recovered.
func TestReadyzFollowsDatabase(t *testing.T) {
	t.Parallel()
	settings := postgresSettings(t)
	settings.appName = uniqueName()
	u, err := url.Parse(settings.databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	database := strings.TrimPrefix(u.Path, "/")
	s := startService(t, settings)
	alter := func(change string) {
		err := admin(t.Context(), "ALTER DATABASE "+database+" "+change,
			"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '"+
				settings.appName+"'")
		if err != nil {
			t.Fatal(err)
		}
	}
	s.checkReady(200, "ready", "up", "in-process")
	alter("SET default_transaction_read_only = on")
	s.checkReady(503, "not ready", "read-only", "in-process")
	alter("RESET default_transaction_read_only")
	s.checkReady(200, "ready", "up", "in-process")
	alter("ALLOW_CONNECTIONS false")
	s.checkReady(503, "not ready", "down", "in-process")
	if a := s.do("GET", "/healthz", ""); a.status != 200 {
		t.Errorf("GET /healthz without a database: got %d %s, want 200", a.status, a.body)
	}
	alter("ALLOW_CONNECTIONS true")
	s.checkReady(200, "ready", "up", "in-process")
}

// TestReadyzFrozenDatabase checks that /readyz answers in time while the database accepts data but does not
// answer.
func TestReadyzFrozenDatabase(t *testing.T) {
	t.Parallel()
	settings := postgresSettings(t)
	var freeze func()
	settings.databaseURL, freeze = freezable(t, settings.databaseURL)
	s := startService(t, settings)
	s.checkReady(200, "ready", "up", "in-process")
	freeze()
	begin := time.Now()
	if a := s.do("GET", "/readyz", ""); a.status != 503 || a.json(t, "database") != "down" {
		t.Errorf("GET /readyz: got %d %s, want 503 with database down", a.status, a.body)
	}
	if took := time.Since(begin); took > 2*readyBudget {
		t.Errorf("GET /readyz took %v, want at most %v", took, 2*readyBudget)
	}
}

// freezable returns a URL of a database behind a proxy. After freeze, the proxy still accepts connections
// and data, but forwards nothing.
func freezable(t *testing.T, databaseURL string) (proxyURL string, freeze func()) {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	server := u.Host
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	var frozen sync.RWMutex
	forward := func(to, from net.Conn) {
		defer to.Close()
		buffer := make([]byte, 32<<10)
		for {
			n, err := from.Read(buffer)
			frozen.RLock()
			to.Write(buffer[:n])
			frozen.RUnlock()
			if err != nil {
				return
			}
		}
	}
	go func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", server)
			if err != nil {
				in.Close()
				continue
			}
			go forward(in, out)
			go forward(out, in)
		}
	}()
	u.Host = listener.Addr().String()
	return u.String(), func() {
		frozen.Lock()
		t.Cleanup(frozen.Unlock)
	}
}

// samplePattern matches a sample of the Prometheus text format, version 0.0.4: a series, which is a name
// with or without labels, and a value.
var samplePattern = regexp.MustCompile(
	`^([a-zA-Z_:][\w:]*(?:\{(?:[a-zA-Z_]\w*="(?:[^"\\]|\\[\\"n])*"(?:, ?|\}))+)?) (\S+)$`)

// samples returns the value of each series of /metrics.
func (s *service) samples() map[string]float64 {
	s.t.Helper()
	a := s.do("GET", "/metrics", "")
	if a.status != 200 || !strings.HasPrefix(a.header.Get("Content-Type"), "text/plain; version=0.0.4") {
		s.t.Errorf("GET /metrics: status %d, Content-Type %q", a.status, a.header.Get("Content-Type"))
	}
	samples := make(map[string]float64)
	for line := range strings.Lines(a.body) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "#") {
			continue
		}
		fields := samplePattern.FindStringSubmatch(line)
		if fields == nil {
			s.t.Errorf("not a sample: %q", line)
			continue
		}
		series := fields[1]
		value, err := strconv.ParseFloat(fields[2], 64)
		if err != nil {
			s.t.Errorf("not a number: %q", line)
		}
		if _, ok := samples[series]; ok {
			s.t.Errorf("duplicate series: %q", series)
		}
		samples[series] = value
	}
	return samples
}

// TestMetrics checks the values of metrics after some requests.
func TestMetrics(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		s.createUser("Jane", "Doe")
		s.do("GET", "/users/1", "")
		s.do("GET", "/users/3", "")
		s.do("GET", "/users/2", "")
		s.do("GET", "/no/such/path", "")
		var samples map[string]float64
		eventually(t, "two consumed events", func() bool {
			samples = s.samples()
			return samples["events_published_total"] == 2 && samples["events_consumed_total"] == 2 &&
				samples["outbox_pending"] == 0
		})
		for series, want := range map[string]float64{
			"outbox_pending":        0,
			"outbox_oldest_seconds": 0,
			"events_returned_total": 0,
			"relay_leader":          1,
			"broker_connected":      1,
			`http_requests_total{route="POST /users",status="201"}`:               2,
			`http_requests_total{route="GET /users/{id}",status="200"}`:           2,
			`http_requests_total{route="GET /users/{id}",status="404"}`:           1,
			`http_requests_total{route="/",status="404"}`:                         1,
			`http_request_duration_seconds_count{route="POST /users"}`:            2,
			`http_request_duration_seconds_bucket{route="POST /users",le="+Inf"}`: 2,
		} {
			if got, ok := samples[series]; got != want || !ok {
				t.Errorf("%s: got %v, want %v", series, got, want)
			}
		}
	})
}
