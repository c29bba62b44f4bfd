package main

import (
	"fmt"
	"io"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	amqp "github.com/rabbitmq/amqp091-go"
)

// recorder consumes a queue that receives every event of an exchange.
type recorder struct {
	deliveries <-chan amqp.Delivery
}

// record declares the exchange as the service does, and returns a recorder that receives every
// event from now on.
func record(t *testing.T, exchange string) *recorder {
	t.Helper()
	ch := openChannel(t)
	queue, err := ch.QueueDeclare("", false, true, true, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := ch.ExchangeDeclare(exchange, "topic", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	if err := ch.QueueBind(queue.Name, "#", exchange, false, nil); err != nil {
		t.Fatal(err)
	}
	deliveries, err := ch.Consume(queue.Name, "", true, true, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &recorder{deliveries}
}

// openChannel opens a channel to the tests' broker. It is closed when the test ends.
func openChannel(t *testing.T) *amqp.Channel {
	t.Helper()
	ch, err := dialRabbit(t).Channel()
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

// nextMessage waits for the next message.
func (r *recorder) nextMessage(t *testing.T) amqp.Delivery {
	t.Helper()
	select {
	case d, ok := <-r.deliveries:
		if ok {
			return d
		}
		t.Fatal("the recorder lost its connection")
	case <-time.After(20 * time.Second):
		t.Fatal("no event in 20 s")
	}
	panic("not reached")
}

// next waits for the next message and returns its event.
func (r *recorder) next(t *testing.T) event {
	t.Helper()
	e, err := parseEvent(r.nextMessage(t).Body)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// startWithRabbit runs a service with RabbitMQ and users in memory. It also returns the names of
// what the service declares.
func startWithRabbit(t *testing.T) (*service, *rabbitMQ) {
	t.Helper()
	s := memorySettings()
	s.rabbitURL, s.exchange = testRabbitURL, newExchange(t)
	return startService(t, s), &rabbitMQ{exchange: s.exchange}
}

// proxy forwards connections between a service and its broker or database.
type proxy struct {
	address string

	mu    sync.Mutex
	conns []net.Conn
	up    bool
}

// newProxy returns a proxy that forwards to the host of a URL until the test ends.
func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{address: listener.Addr().String(), up: true}
	go func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			p.forward(in, u.Host)
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		p.set(false)
	})
	return p
}

// forward connects in to the host, or closes it if the proxy is down.
func (p *proxy) forward(in net.Conn, host string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	out, err := net.Dial("tcp", host)
	if err != nil || !p.up {
		in.Close()
		return
	}
	p.conns = append(p.conns, in, out)
	go io.Copy(in, out)
	go io.Copy(out, in)
}

// set closes all connections. New ones are forwarded if up is set, else closed.
func (p *proxy) set(up bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.up = up
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}

// throughProxy returns a URL whose host is the proxy.
func throughProxy(t *testing.T, target string, p *proxy) string {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	u.Host = p.address
	return u.String()
}

// refusedAddress returns an address that refuses connections.
func refusedAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// withHosts returns the URL of the tests' broker with other hosts.
func withHosts(t *testing.T, hosts ...string) string {
	t.Helper()
	u, err := url.Parse(testRabbitURL)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Replace(testRabbitURL, u.Host, strings.Join(hosts, ","), 1)
}

// TestRabbitURLs checks which values of RABBITMQ_URL are accepted, and the URL of each host.
func TestRabbitURLs(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][]string{
		"amqp://h":              {"amqp://h"},
		"amqp://u:p@h:5673/%2F": {"amqp://u:p@h:5673/%2F"},
		"amqp://u:p@a:5672,b:5673/vhost": {
			"amqp://u:p@a:5672/vhost", "amqp://u:p@b:5673/vhost"},
		"amqps://a,b,c": {"amqps://a", "amqps://b", "amqps://c"},
		"amqp://u:p@[::1]:5672,[2001:db8::1]/v?heartbeat=5": {
			"amqp://u:p@[::1]:5672/v?heartbeat=5", "amqp://u:p@[2001:db8::1]/v?heartbeat=5"},
		"amqp://u:a,b@c,d/":    {"amqp://u:a,b@c/", "amqp://u:a,b@d/"},
		"amqp://u:p%2C@c,d/":   {"amqp://u:p%2C@c/", "amqp://u:p%2C@d/"},
		"amqp://a,b/one,two":   {"amqp://a/one,two", "amqp://b/one,two"},
		"amqp://a:1,a:2?x=1,2": {"amqp://a:1?x=1,2", "amqp://a:2?x=1,2"},
	} {
		s, err := loadSettings(envOf("RABBITMQ_URL", text))
		if err != nil || s.rabbitURL != text {
			t.Errorf("RABBITMQ_URL=%s: error %v, want none", text, err)
		}
		if got := splitHosts(text); !slices.Equal(got, want) {
			t.Errorf("splitHosts(%q) = %q, want %q", text, got, want)
		}
	}
	for _, text := range []string{
		"amqp://a:0,b/", "amqp://a,b:99999/", "amqp://a,b:x/", "amqp://a b,c/", "amqp://a, b/",
		"amqp://[::1,::2]/", "amqp://a,b/x y", "amqp://a,b/?heartbeat=x",
		"amqp://a,/", "amqp://,b/", "amqp://a,,b/", // an empty host means localhost
		"amqp://a,amqp://b/",
	} {
		if s, err := loadSettings(envOf("RABBITMQ_URL", text)); err == nil {
			t.Errorf("RABBITMQ_URL=%s: hosts %q, want an error", text, splitHosts(s.rabbitURL))
		}
	}
}

// TestBrokerSocketCollects checks that a corked socket writes nothing until it is uncorked or its
// buffer is full, and that an uncorked socket writes immediately.
func TestBrokerSocketCollects(t *testing.T) {
	t.Parallel()
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	arrived := make(chan int, 8)
	go func() {
		buffer := make([]byte, 2*brokerBuffer)
		for {
			n, err := far.Read(buffer)
			if err != nil {
				return
			}
			arrived <- n
		}
	}()
	s := &brokerSocket{Conn: near}
	s.cork()
	for range 3 {
		if n, err := s.Write([]byte("abcd")); n != 4 || err != nil {
			t.Fatalf("write to a corked socket: %d bytes, %v, want 4", n, err)
		}
	}
	if len(arrived) > 0 {
		t.Error("a corked socket has written")
	}
	if err := s.uncork(); err != nil || <-arrived != 12 {
		t.Errorf("uncork did not write 12 bytes: %v", err)
	}
	if _, err := s.Write([]byte("abcd")); err != nil || <-arrived != 4 {
		t.Errorf("a write to an uncorked socket did not write 4 bytes: %v", err)
	}
	s.cork()
	if _, err := s.Write(make([]byte, brokerBuffer)); err != nil || <-arrived != brokerBuffer {
		t.Errorf("a write that fills the buffer of a corked socket did not write it: %v", err)
	}
	near.Close()
	if _, err := s.Write(make([]byte, brokerBuffer)); err == nil {
		t.Error("a write to a closed socket succeeded")
	}
}

// TestMessage checks the properties and the body of a message.
func TestMessage(t *testing.T) {
	t.Parallel()
	svc, names := startWithRabbit(t)
	events := record(t, names.exchange)
	a := svc.do("POST", "/users", john, "X-Request-Id: trace-1")
	d := events.nextMessage(t)
	e, err := parseEvent(d.Body)
	if err != nil {
		t.Fatal(err)
	}
	for what, value := range map[string]struct{ got, want any }{
		"routing key":    {d.RoutingKey, "user.created"},
		"type":           {d.Type, "user.created"},
		"delivery mode":  {d.DeliveryMode, amqp.Persistent},
		"content type":   {d.ContentType, "application/json"},
		"message id":     {d.MessageId, e.ID},
		"app id":         {d.AppId, "test"},
		"timestamp":      {d.Timestamp.Unix(), e.OccurredAt.Unix()},
		"correlation id": {d.CorrelationId, "trace-1"},
		"header":         {d.Headers["trace_id"], "trace-1"},
		"trace id":       {e.TraceID, "trace-1"},
		"data":           {e.Data, eventData{1, 1}},
		"time":           {e.OccurredAt.Format(microseconds), a.json(t, "updated_at")},
		"members": {fmt.Sprint(keys(string(d.Body))),
			"[event_id event_type data trace_id occurred_at]"},
	} {
		if value.got != value.want {
			t.Errorf("%s: %v, want %v", what, value.got, value.want)
		}
	}
	if strings.Contains(string(d.Body), secret) {
		t.Errorf("the event contains the password: %s", d.Body)
	}
}

// TestMalformedMessages checks that malformed messages go to the dead letter queue, each once, and
// that the messages between them are consumed.
func TestMalformedMessages(t *testing.T) {
	t.Parallel()
	svc, names := startWithRabbit(t)
	svc.createUser("John", "Doe")
	svc.waitForLine("Received event user.created with user_id=1")
	ch := openChannel(t)
	malformed := []string{"not JSON", `{"event_type": "user.renamed"}`, strings.Repeat("x", 1<<20)}
	for i, body := range malformed {
		err := ch.Publish("", names.queue(), false, false, amqp.Publishing{Body: []byte(body)})
		if err != nil {
			t.Fatal(err)
		}
		svc.createUser("John", fmt.Sprint("Doe", i))
	}
	svc.waitForLine("Received event user.created with user_id=4")
	var got []string
	eventually(t, "all malformed messages in the dead letter queue", func() bool {
		d, ok, err := ch.Get(names.deadLetterQueue(), true)
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			got = append(got, string(d.Body))
		}
		return len(got) == len(malformed)
	})
	if fmt.Sprint(got) != fmt.Sprint(malformed) {
		t.Errorf("dead letters %.100q, want %.100q", got, malformed)
	}
	if n := len(svc.log.lines("Rejected message")); n != len(malformed) {
		t.Errorf("%d lines \"Rejected message\", want %d", n, len(malformed))
	}
}

// TestDuplicateMessage checks that the consumer drops the second delivery of an event.
func TestDuplicateMessage(t *testing.T) {
	t.Parallel()
	svc, names := startWithRabbit(t)
	svc.waitForLine("Service started")
	svc.createUser("John", "Doe")
	svc.waitForLine("Received event user.created with user_id=1")
	ch := openChannel(t)
	body := encode(t, newEvent(userCreated, 77, 1))
	for range 2 {
		err := ch.Publish("", names.queue(), false, false, amqp.Publishing{Body: body})
		if err != nil {
			t.Fatal(err)
		}
	}
	svc.waitForLine("Skipped duplicate event", "user_id", 77, "level", "DEBUG")
	if n := len(svc.log.lines("Received event user.created with user_id=77")); n != 1 {
		t.Errorf("an event that was delivered twice was logged %d times, want 1", n)
	}
	eventually(t, "an empty queue", func() bool {
		q, err := ch.QueueDeclarePassive(names.queue(), true, false, false, false, nil)
		return err == nil && q.Messages == 0
	})
}

// TestTopologyIsRedeclared checks that the service declares its queues and exchanges again after
// all of them were deleted, and that events arrive.
func TestTopologyIsRedeclared(t *testing.T) {
	t.Parallel()
	svc, names := startWithRabbit(t)
	svc.createUser("John", "Doe")
	svc.waitForLine("Received event user.created with user_id=1")
	ch := openChannel(t)
	for _, queue := range []string{names.queue(), names.deadLetterQueue()} {
		if _, err := ch.QueueDelete(queue, false, false, false); err != nil {
			t.Fatal(err)
		}
	}
	for _, exchange := range []string{names.exchange, names.deadLetterExchange()} {
		if err := ch.ExchangeDelete(exchange, false, false); err != nil {
			t.Fatal(err)
		}
	}
	conn := dialRabbit(t)
	exists := func(check func(*amqp.Channel) error) bool {
		ch, err := conn.Channel()
		if err != nil {
			t.Fatal(err)
		}
		defer ch.Close()
		return check(ch) == nil
	}
	for _, queue := range []string{names.queue(), names.deadLetterQueue()} {
		eventually(t, "queue "+queue, func() bool {
			return exists(func(ch *amqp.Channel) error {
				_, err := ch.QueueDeclarePassive(queue, true, false, false, false, nil)
				return err
			})
		})
	}
	for exchange, kind := range map[string]string{
		names.exchange: "topic", names.deadLetterExchange(): "fanout",
	} {
		eventually(t, "exchange "+exchange, func() bool {
			return exists(func(ch *amqp.Channel) error {
				return ch.ExchangeDeclarePassive(exchange, kind, true, false, false, false, nil)
			})
		})
	}
	svc.createUser("Jane", "Doe")
	svc.waitForLine("Received event user.created with user_id=2")
}

// TestMismatchedQueue checks that the service warns once of a queue that exists with other
// arguments, and consumes it.
func TestMismatchedQueue(t *testing.T) {
	t.Parallel()
	s := memorySettings()
	s.rabbitURL, s.exchange = testRabbitURL, newExchange(t)
	names := &rabbitMQ{exchange: s.exchange}
	_, err := openChannel(t).QueueDeclare(names.queue(), true, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	svc := startService(t, s)
	svc.createUser("John", "Doe")
	svc.waitForLine("Received event user.created with user_id=1")
	time.Sleep(2 * topologyInterval) // the service declares everything again meanwhile
	const warning = "RabbitMQ declaration mismatch, keeping the existing one"
	if n := len(svc.log.lines(warning)); n != 1 {
		t.Errorf("%d warnings of one mismatched queue, want 1", n)
	}
	svc.waitForLine(warning, "what", "queue "+names.queue())
	svc.createUser("Jane", "Doe")
	svc.waitForLine("Received event user.created with user_id=2")
}

// TestPublishCountsReturns checks that publish stops before an event that the broker returns
// because no queue is bound to its routing key, and that the metric counts it.
func TestPublishCountsReturns(t *testing.T) {
	t.Parallel()
	b := newRabbitMQ(settings{rabbitURL: testRabbitURL, exchange: newExchange(t), appName: "test"},
		newLogger(&logWriter{w: t.Output()}, 0), metrics.NewSet())
	p, err := b.publisher(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	n, err := p.publish(t.Context(), []event{newEvent(userCreated, 1, 1)})
	if n != 1 || err != nil {
		t.Errorf("event with a queue: published %d, %v, want 1", n, err)
	}
	// Only updates have a queue, so other events are returned.
	ch := openChannel(t)
	if err := ch.QueueUnbind(b.queue(), "user.*", b.exchange, nil); err != nil {
		t.Fatal(err)
	}
	if err := ch.QueueBind(b.queue(), userUpdated, b.exchange, false, nil); err != nil {
		t.Fatal(err)
	}
	events := []event{newEvent(userUpdated, 1, 2), newEvent(userUpdated, 1, 3),
		newEvent(userDeleted, 1, 4), newEvent(userUpdated, 2, 2)}
	if n, err := p.publish(t.Context(), events); n != 2 || err == nil {
		t.Errorf("third event without a queue: published %d, %v, want 2 and an error", n, err)
	}
	if b.returned.Get() != 1 {
		t.Errorf("events_returned_total %d, want 1", b.returned.Get())
	}
}

// TestBrokerOutage closes the connections to the broker while users change. It checks that every
// request succeeds, that readiness reports the outage, and that every event arrives afterwards in
// order.
func TestBrokerOutage(t *testing.T) {
	t.Parallel()
	s := postgresSettings(t)
	s.exchange = newExchange(t)
	events := record(t, s.exchange)
	p := newProxy(t, testRabbitURL)
	s.rabbitURL = throughProxy(t, testRabbitURL, p)
	svc := startService(t, s)
	svc.createUser("John", "Doe")
	for i := range 60 {
		if i%20 == 10 {
			p.set(false)
		}
		if i%20 == 15 {
			p.set(true)
		}
		if i == 13 {
			eventually(t, "readiness with rabbitmq down", func() bool {
				a := svc.do("GET", "/readyz", "")
				return a.status == 200 && a.json(t, "rabbitmq") == "down"
			})
		}
		a := svc.do("PUT", "/users/1", fmt.Sprintf(`{"name": "name %d"}`, i))
		if a.status != 200 {
			t.Errorf("PUT /users/1: status %d, want 200: %s", a.status, a.body)
		}
	}
	for last := int64(0); last < 61; {
		switch version := events.next(t).Data.Version; {
		case version == last+1:
			last = version
		case version > last+1:
			t.Fatalf("event of version %d after version %d, want %d", version, last, last+1)
		}
	}
	svc.waitForLine("Event connection restored", "connection", "relay")
	svc.waitForLine("Event connection restored", "connection", "consumer")
	eventually(t, "readiness with rabbitmq up", func() bool {
		return svc.do("GET", "/readyz", "").json(t, "rabbitmq") == "up"
	})
}

// TestSeveralBrokerHosts checks that the service reconnects to whichever of several hosts is up.
func TestSeveralBrokerHosts(t *testing.T) {
	t.Parallel()
	s := memorySettings()
	s.exchange = newExchange(t)
	first, second := newProxy(t, testRabbitURL), newProxy(t, testRabbitURL)
	second.set(false)
	s.rabbitURL = withHosts(t, refusedAddress(t), first.address, second.address)
	svc := startService(t, s)
	for i, up := range []*proxy{first, second, first} {
		for _, p := range []*proxy{first, second} {
			p.set(p == up)
		}
		id := svc.createUser("John", "Doe")
		svc.waitForLine(fmt.Sprintf("Received event user.created with user_id=%d", id))
		eventually(t, "readiness with rabbitmq up again", func() bool {
			return svc.do("GET", "/readyz", "").json(t, "rabbitmq") == "up"
		})
		if id != int64(i+1) {
			t.Errorf("user with id %d, want %d", id, i+1)
		}
	}
}

// TestUnresponsiveBroker checks that neither requests nor the stop wait for a broker that accepts
// connections and never answers, and that the metrics show it as down.
func TestUnresponsiveBroker(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	s := memorySettings()
	s.rabbitURL = "amqp://guest:guest@" + listener.Addr().String()
	svc := startService(t, s)
	svc.createUser("John", "Doe")
	if a := svc.do("GET", "/readyz", ""); a.status != 200 || a.json(t, "rabbitmq") != "down" {
		t.Errorf("GET /readyz: status %d, want 200 with rabbitmq down: %s", a.status, a.body)
	}
	samples := svc.samples()
	for series, want := range map[string]float64{"outbox_pending": 1, "broker_connected": 0,
		"relay_leader": 0, "events_published_total": 0, "events_returned_total": 0} {
		if got, ok := samples[series]; got != want || !ok {
			t.Errorf("%s: %v, want %v", series, got, want)
		}
	}
	if samples["outbox_oldest_seconds"] <= 0 {
		t.Errorf("outbox_oldest_seconds: %v, want more than 0", samples["outbox_oldest_seconds"])
	}
	if err := svc.stop(); err != nil {
		t.Error(err)
	}
}
