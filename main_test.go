package main

// The tests of the compiled program are in system/process. These call functions of this package.

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// occupiedPort returns a port that accepts connections, and sends nothing, until the test ends.
func occupiedPort(t *testing.T) int {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return listener.Addr().(*net.TCPAddr).Port
}

// TestRunGivesUpOnDatabase checks that run fails after it has waited for the database for a minute.
func TestRunGivesUpOnDatabase(t *testing.T) {
	t.Parallel()
	s := memorySettings()
	s.databaseURL, s.port = "postgres://john:"+secret+"@127.0.0.1:1/users", occupiedPort(t)
	synctest.Test(t, func(t *testing.T) {
		log := &logBuffer{}
		start := time.Now()
		err := run(t.Context(), s, testLimits, &logWriter{w: log})
		if err == nil || !strings.Contains(err.Error(), "opening the database") ||
			strings.Contains(err.Error(), secret) {
			t.Errorf("run: got %v, want an error about opening the database, without the password", err)
		}
		if waited := time.Since(start); waited < 55*time.Second || waited > time.Minute {
			t.Errorf("run took %v, want 55 s to 60 s", waited)
		}
		if n := len(log.lines("Waiting for the database")); n < 10 || n != len(log.lines("")) {
			t.Errorf("got %d lines of waiting, want at least 10 and no others:\n%s", n, log)
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

// TestShutDownBeforeServeReturns checks that shutDown succeeds if Serve has not returned yet. In this case
// http.Server.Shutdown closes the listener a second time.
func TestShutDownBeforeServeReturns(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newHTTPServer(http.NotFoundHandler(), slog.New(slog.DiscardHandler))
	go s.Serve(lateListener{listener})
	response, err := client.Get("http://" + listener.Addr().String()) // returns when Serve runs
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if err := s.shutDown(listener); err != nil {
		t.Error(err)
	}
}

// TestSlowClients checks that requests are answered while other clients never finish sending their
// headers or body, or reading their answers.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		const users = 3
		for range users {
			s.createUser("John", "Doe")
		}
		const slow = 60
		for range slow {
			for _, head := range []string{
				"GET /users HTTP/1.1\r\nHost: slow\r\n",
				"POST /users HTTP/1.1\r\nHost: slow\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
				strings.Repeat("GET /users?per_page=100 HTTP/1.1\r\nHost: slow\r\n\r\n", 20),
			} {
				conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if _, err := conn.Write([]byte(head)); err != nil {
					t.Fatal(err)
				}
			}
		}
		for i := range 20 {
			path := fmt.Sprint("/users/", i%users+1)
			if a := s.do("GET", path, ""); a.status != 200 {
				t.Errorf("GET %s: got %d %s, want 200", path, a.status, a.body)
			}
			body := fmt.Sprintf(`{"name": "Jane %d"}`, i)
			if a := s.do("PUT", path, body); a.status != 200 {
				t.Errorf("PUT %s: got %d %s, want 200", path, a.status, a.body)
			}
		}
	})
}
