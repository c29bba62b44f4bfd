package main

import (
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestPercentiles(t *testing.T) {
	var o outcome
	for i := range 1000 {
		o.samples = append(o.samples, sample{get, 200, time.Duration(1000-i) * time.Millisecond})
	}
	o.samples = append(o.samples, sample{get, 503, time.Hour}, sample{get, timedOut, time.Hour})
	if p := o.percentiles(50, 99, 99.9, 100); p[0] != 501 || p[1] != 991 || p[2] != 1000 ||
		p[3] != 1000 {
		t.Errorf("percentiles are %v", p)
	}
	if p := (outcome{}).percentiles(50); p[0] != 0 {
		t.Errorf("without samples, p50 is %v", p[0])
	}
}

func TestScale(t *testing.T) {
	x := scale{0.1, 1000, 100, 500, true}
	for value, want := range map[float64]float64{0.1: 100, 1: 200, 1000: 500, 0: 100, 1e6: 500} {
		if got := x.at(value); math.Abs(got-want) > 1e-9 {
			t.Errorf("%v is at %v, not at %v", value, got, want)
		}
	}
	if got := x.ticks(); len(got) != 5 {
		t.Errorf("ticks are %v", got)
	}
}

func TestSchedule(t *testing.T) {
	after, what := schedule(mixed, 10_000, time.Second)
	if n := len(after); n < 9_700 || n > 10_300 || len(what) != n || after[n-1] >= time.Second {
		t.Errorf("%d requests within %v", n, after[n-1])
	}
	counts := [kinds]int{}
	for _, k := range what {
		counts[k]++
	}
	if counts[get] < 8_000 || counts[del] == 0 || counts[post] == 0 {
		t.Errorf("kinds of requests: %v", counts)
	}
}

// TestOpenLoop sends requests to a server that does not answer the first one for a while. The
// others must be sent nevertheless.
func TestOpenLoop(t *testing.T) {
	var served atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if served.Add(1) == 1 {
			time.Sleep(300 * time.Millisecond)
		}
		w.WriteHeader(http.StatusOK)
	}))
	defer server.Close()
	l := load{address: server.Listener.Addr().String(), mix: onlyGet, users: 100}
	o := l.openLoop(200, 200*time.Millisecond)
	if n := len(o.where(answered).samples); n != len(o.samples) || n < 20 {
		t.Errorf("%d of %d requests were answered", n, len(o.samples))
	}
	if p := o.percentiles(50, 100); p[0] > 100 || p[1] < 290 {
		t.Errorf("p50 is %.1f ms, and the highest latency %.1f ms", p[0], p[1])
	}
}

func TestBrokenConnection(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	l := load{address: listener.Addr().String(), mix: onlyGet, users: 100}
	o := l.openLoop(100, 100*time.Millisecond)
	if n := len(o.where(failed).samples); n == 0 || n != len(o.samples) {
		t.Errorf("%d of %d requests failed", n, len(o.samples))
	}
}

func TestPgbenchStatement(t *testing.T) {
	sql, err := pgbenchStatement("f($1::bigint[], $2, $3, $4, $5, $6)")
	if err != nil || strings.Contains(sql, "$") || !strings.HasPrefix(sql, "f(ARRAY[:id]::bigint[]") {
		t.Errorf("%s, error %v", sql, err)
	}
	for _, sql := range []string{"$1 $2 $3 $4 $5 $6 $7", "$1 $2 $3 $4 $5"} {
		if _, err := pgbenchStatement(sql); err == nil {
			t.Errorf("%q has other parameters, but there is no error", sql)
		}
	}
}

func TestFormats(t *testing.T) {
	for x, want := range map[float64]string{0.123: "0.12", 12.34: "12.3", 999: "999",
		1234.5: "1,230", 39_512: "39,500", 1_300_000: "1,300,000"} {
		if got := digits(x); got != want {
			t.Errorf("%v is formatted as %s, not as %s", x, got, want)
		}
	}
}
