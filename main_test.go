package main

// The tests of the compiled program are in system/process. These call functions of this package.

import (
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// occupiedPort returns a port that accepts connections, and never answers, until the test ends.
func occupiedPort(t *testing.T) int {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return listener.Addr().(*net.TCPAddr).Port
}

// TestRunGivesUpOnDatabase waits a minute of a bubble's time. Nothing listens on port 1, and run
// must not get as far as listening on its own port, which is in use.
func TestRunGivesUpOnDatabase(t *testing.T) {
	t.Parallel()
	s := memorySettings()
	s.databaseURL = "postgres://john:" + secret + "@127.0.0.1:1/users"
	s.port = occupiedPort(t)
	synctest.Test(t, func(t *testing.T) {
		log := &logBuffer{}
		start := time.Now()
		err := run(t.Context(), s, testLimits, &logWriter{w: log})
		if err == nil || !strings.Contains(err.Error(), "opening the database") ||
			strings.Contains(err.Error(), secret) {
			t.Errorf("got error %v, want one about opening the database, without the password", err)
		}
		if waited := time.Since(start); waited < 55*time.Second || waited > time.Minute {
			t.Errorf("waited for %v, want almost a minute", waited)
		}
		if n := len(log.lines("Waiting for the database")); n < 10 || n != len(log.lines("")) {
			t.Errorf("got %d lines about waiting, want at least 10 and no others:\n%s", n, log)
		}
		log.check(t)
	})
}

// lateListener delays the error of Accept that tells its server that it is closed.
type lateListener struct{ net.Listener }

func (l lateListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		time.Sleep(2 * drainIdle)
	}
	return conn, err
}

// TestShutDownBeforeServeReturns covers a race: net/http closes the listener again if Serve has
// not returned yet.
func TestShutDownBeforeServeReturns(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newHTTPServer(http.NotFoundHandler(), slog.New(slog.DiscardHandler))
	go s.Serve(lateListener{listener})
	response, err := client.Get("http://" + listener.Addr().String()) // now it serves
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if err := s.shutDown(listener); err != nil {
		t.Error(err)
	}
}
