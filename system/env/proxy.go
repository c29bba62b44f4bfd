package env

import (
	"net"
	"strings"
	"sync"
)

// Proxy is a TCP proxy that simulates failures of the network between two programs.
type Proxy struct {
	URL string // leads to the target through the proxy

	listener net.Listener

	mu      sync.Mutex
	changed *sync.Cond
	down    bool
	held    [2]bool // by direction
	conns   map[net.Conn]bool
}

// Direction is the direction of bytes through a Proxy.
type Direction int

// The directions are named after the sender.
const (
	FromClient Direction = iota
	FromServer
)

// NewProxy returns a proxy to the host of a URL that has user information. Close, or the end of the
// Env, closes it.
func (e *Env) NewProxy(target string) (*Proxy, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	host := Host(target)
	p := &Proxy{
		URL:      strings.Replace(target, "@"+host, "@"+listener.Addr().String(), 1),
		listener: listener,
		conns:    make(map[net.Conn]bool),
	}
	p.changed = sync.NewCond(&p.mu)
	e.OnClose(p.Close)
	go func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			go p.connect(in, host)
		}
	}()
	return p, nil
}

// Host returns the host and port of a URL that has user information.
func Host(url string) string {
	_, rest, _ := strings.Cut(url, "@")
	host, _, _ := strings.Cut(rest, "/")
	return host
}

func (p *Proxy) hostPort() (host, port string) {
	host, port, _ = net.SplitHostPort(p.listener.Addr().String())
	return host, port
}

// Close closes the listener and all connections.
func (p *Proxy) Close() {
	p.listener.Close()
	p.Cut(true)
}

func (p *Proxy) connect(in net.Conn, target string) {
	out, err := net.Dial("tcp", target)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil || p.down {
		in.Close()
		if err == nil {
			out.Close()
		}
		return
	}
	p.conns[in], p.conns[out] = true, true
	go p.forward(out, in, FromClient)
	go p.forward(in, out, FromServer)
}

func (p *Proxy) forward(to, from net.Conn, direction Direction) {
	defer to.Close()
	defer from.Close()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			if !p.awaitRelease(from, direction) {
				return
			}
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// awaitRelease waits while a direction is held, and reports whether the connection still exists.
func (p *Proxy) awaitRelease(conn net.Conn, direction Direction) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.held[direction] && p.conns[conn] {
		p.changed.Wait()
	}
	return p.conns[conn]
}

// Cut closes all connections and discards what is held. If down is true, new connections are closed
// at once until the next Cut.
func (p *Proxy) Cut(down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = down
	for c := range p.conns {
		c.Close()
	}
	clear(p.conns)
	p.changed.Broadcast()
}

// Hold stops the delivery of what one side sends, as if the network lost every packet.
func (p *Proxy) Hold(direction Direction) { p.setHeld(direction, true) }

// Release delivers what is held, and what follows.
func (p *Proxy) Release(direction Direction) { p.setHeld(direction, false) }

func (p *Proxy) setHeld(direction Direction, held bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held[direction] = held
	p.changed.Broadcast()
}
