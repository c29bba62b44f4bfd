package env

import (
	"bufio"
	"fmt"
	"net"
	"testing"
	"time"
)

// TestProxy sends lines to a server that echoes them, through a proxy.
func TestProxy(t *testing.T) {
	e, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	go func() {
		for {
			conn, err := server.Accept()
			if err != nil {
				return
			}
			go func() {
				for lines := bufio.NewScanner(conn); lines.Scan(); {
					fmt.Fprintln(conn, lines.Text())
				}
			}()
		}
	}()
	p, err := e.NewProxy("amqp://guest@" + server.Addr().String() + "/")
	if err != nil {
		t.Fatal(err)
	}
	for _, direction := range []Direction{FromClient, FromServer} {
		c := dial(t, p)
		c.expect("one", true)
		p.Hold(direction)
		c.expect("two", false)
		p.Release(direction)
		if line, err := c.lines.ReadString('\n'); line != "two\n" {
			t.Errorf("after the release: %q, %v", line, err)
		}
		p.Hold(direction)
		c.expect("three", false)
		p.Cut(true)
		p.Release(direction)
		c.expect("four", false)
		dial(t, p).expect("five", false)
		p.Cut(false)
		dial(t, p).expect("six", true)
	}
}

// client is a connection through a proxy.
type client struct {
	t     *testing.T
	conn  net.Conn
	lines *bufio.Reader
}

func dial(t *testing.T, p *Proxy) *client {
	t.Helper()
	conn, err := net.Dial("tcp", Host(p.URL))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &client{t, conn, bufio.NewReader(conn)}
}

// expect sends a line and expects that it comes back, or that nothing comes within 100 ms.
func (c *client) expect(text string, back bool) {
	c.t.Helper()
	fmt.Fprintln(c.conn, text)
	timeout := 100 * time.Millisecond
	if back {
		timeout = 5 * time.Second
	}
	c.conn.SetReadDeadline(time.Now().Add(timeout))
	line, _ := c.lines.ReadString('\n')
	if got := line == text+"\n"; got != back || !back && line != "" {
		c.t.Errorf("sent %q: got %q, want an echo: %t", text, line, back)
	}
	c.conn.SetReadDeadline(time.Time{})
}
