package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	brokerTimeout    = 5 * time.Second  // to connect, and to shake hands
	brokerWrite      = 3 * time.Second  // for one write to the socket
	brokerGoodbye    = time.Second      // to close a connection in good order
	brokerHeartbeat  = 10 * time.Second // a frozen broker is noticed after one and a half
	publishWait      = 10 * time.Second // for a window
	topologyInterval = 2 * time.Second
	consumerPrefetch = 64

	// The pauses of a consumer that cannot do its work. RabbitMQ takes messages back after 30 minutes.
	firstPause = 500 * time.Millisecond
	maxPause   = 10 * time.Second
)

// rabbitMQ is the broker of a service with a RABBITMQ_URL. All names in it derive from
// that of the exchange.
type rabbitMQ struct {
	urls      []string     // of the hosts of a cluster, which are tried in turn
	host      atomic.Int64 // index of the host that answered last
	appName   string
	exchange  string
	log       *slog.Logger
	returned  *metrics.Counter
	consuming atomic.Bool // every replica is connected as a consumer, whoever relays
	told      sync.Map    // what the log has named as foreign, on whatever connection
}

func newRabbitMQ(s settings, log *slog.Logger, set *metrics.Set) *rabbitMQ {
	return &rabbitMQ{
		urls:     splitHosts(s.rabbitURL),
		appName:  s.appName,
		exchange: s.exchange,
		log:      log,
		returned: set.GetOrCreateCounter("events_returned_total"),
	}
}

// parseRabbitURL returns text if it is a URL, of one host or several, that can be dialled.
func parseRabbitURL(text string) (string, error) {
	if err := checkURL(text, "amqp", "amqps"); err != nil {
		return "", err
	}
	hosts := splitHosts(text)
	for _, single := range hosts {
		if u, err := url.Parse(single); err != nil || u.Host == "" && len(hosts) > 1 {
			return "", errUnusable
		}
		if _, err := amqp.ParseURI(single); err != nil {
			return "", err
		}
	}
	return text, nil
}

func (b *rabbitMQ) queue() string              { return b.exchange + ".consumer" }
func (b *rabbitMQ) deadLetterExchange() string { return b.exchange + ".dlx" }
func (b *rabbitMQ) deadLetterQueue() string    { return b.exchange + ".dead" }

func (b *rabbitMQ) status() string {
	if b.consuming.Load() {
		return "up"
	}
	return "down"
}

// rabbitConn is a connection to a broker that had the topology when it was dialled.
type rabbitConn struct {
	*amqp.Connection
	socket *brokerSocket
}

// dial connects to the host that answered last, or else to the next one that answers, unless ctx
// ends before. The connection is the caller's to hang up.
func (b *rabbitMQ) dial(ctx context.Context, purpose string) (c *rabbitConn, err error) {
	var errs []error
	for range b.urls {
		host := b.host.Load()
		if c, err = b.dialHost(ctx, b.urls[host], purpose); err == nil {
			return c, nil
		}
		errs = append(errs, err)
		b.host.CompareAndSwap(host, (host+1)%int64(len(b.urls)))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

func (b *rabbitMQ) dialHost(ctx context.Context, url, purpose string) (*rabbitConn, error) {
	properties := amqp.NewConnectionProperties()
	properties.SetClientConnectionName(b.appName + " " + purpose)
	socket := &brokerSocket{}
	unwatch := func() bool { return true }
	defer func() { unwatch() }()
	conn, err := amqp.DialConfig(url, amqp.Config{
		Heartbeat:  brokerHeartbeat,
		Properties: properties,
		Dial: func(network, address string) (c net.Conn, err error) {
			dialer := net.Dialer{Timeout: brokerTimeout}
			if socket.Conn, err = dialer.DialContext(ctx, network, address); err != nil {
				return nil, err
			}
			unwatch = context.AfterFunc(ctx, func() { _ = socket.Close() })
			return socket, socket.SetDeadline(time.Now().Add(brokerTimeout))
		},
	})
	if err != nil {
		return nil, err
	}
	c := &rabbitConn{conn, socket}
	if err := b.declareTopology(conn, make(map[string]bool)); err != nil {
		c.hangUp()
		return nil, fmt.Errorf("declaring the topology: %w", err)
	}
	return c, nil
}

// hangUp closes the connection in good order if that can be done soon. The plain Close
// waits for ever where the broker has stopped to read, and CloseDeadline for as long as it
// sends heartbeats.
func (c *rabbitConn) hangUp() {
	defer time.AfterFunc(brokerGoodbye, func() { _ = c.socket.Close() }).Stop()
	_ = c.CloseDeadline(time.Now().Add(brokerGoodbye))
}

// brokerSocket bounds each write: a broker in a memory alarm does not read, and amqp091
// would hang in the write. While it is corked it collects what amqp091 writes message by
// message: a write for each would cost more than the message.
type brokerSocket struct {
	net.Conn

	mu     sync.Mutex
	corked bool
	held   []byte
}

const socketCapacity = 32 << 10 // bytes

func (s *brokerSocket) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = append(s.held, p...)
	if s.corked && len(s.held) < socketCapacity {
		return len(p), nil
	}
	return len(p), s.flushLocked()
}

func (s *brokerSocket) cork() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.corked = true
}

func (s *brokerSocket) uncork() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.corked = false
	return s.flushLocked()
}

func (s *brokerSocket) flushLocked() error {
	if len(s.held) == 0 {
		return nil
	}
	err := s.SetWriteDeadline(time.Now().Add(brokerWrite))
	if err == nil {
		_, err = s.Conn.Write(s.held)
	}
	s.held = s.held[:0]
	return err
}

// declaration makes sure that one thing exists on the broker.
type declaration struct {
	name    string
	declare func(*amqp.Channel) error
}

// topology is the exchange of the events, the consumer's queue, and where it puts aside
// what is unreadable. The arguments are those that RabbitMQ takes from 3.10 on.
func (b *rabbitMQ) topology() []declaration {
	exchange := func(name, kind string) declaration {
		return declaration{"exchange " + name, func(ch *amqp.Channel) error {
			return ch.ExchangeDeclare(name, kind, true, false, false, false, nil)
		}}
	}
	queue := func(name string, arguments amqp.Table) declaration {
		return declaration{"queue " + name, func(ch *amqp.Channel) error {
			_, err := ch.QueueDeclare(name, true, false, false, false, arguments)
			return err
		}}
	}
	binding := func(queue, key, exchange string) declaration {
		return declaration{"binding of " + queue, func(ch *amqp.Channel) error {
			return ch.QueueBind(queue, key, exchange, false, nil)
		}}
	}
	return []declaration{
		exchange(b.deadLetterExchange(), amqp.ExchangeFanout),
		queue(b.deadLetterQueue(), amqp.Table{"x-queue-type": "quorum"}),
		binding(b.deadLetterQueue(), "", b.deadLetterExchange()),
		exchange(b.exchange, amqp.ExchangeTopic),
		queue(b.queue(), amqp.Table{
			"x-queue-type":             "quorum",
			"x-single-active-consumer": true,
			"x-delivery-limit":         20,
			"x-dead-letter-exchange":   b.deadLetterExchange(),
			"x-dead-letter-strategy":   "at-least-once",
			"x-overflow":               "reject-publish",
		}),
		binding(b.queue(), "user.*", b.exchange),
	}
}

// foreignCodes are the refusals of what exists with other properties, or of a user who may
// not declare it.
var foreignCodes = []int{amqp.PreconditionFailed, amqp.AccessRefused, amqp.ResourceLocked}

// declareTopology declares what is missing. What RabbitMQ refuses to change is named in
// the log, and from then on, being in foreign, left as it is.
func (b *rabbitMQ) declareTopology(conn *amqp.Connection, foreign map[string]bool) error {
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	for _, d := range b.topology() {
		if foreign[d.name] {
			continue
		}
		err := d.declare(ch)
		if err == nil {
			continue
		}
		refusal, ok := errors.AsType[*amqp.Error](err)
		if !ok || !slices.Contains(foreignCodes, refusal.Code) {
			return err
		}
		foreign[d.name] = true
		if _, again := b.told.LoadOrStore(d.name, true); !again {
			b.log.Warn("RabbitMQ keeps this as it is, not as the service declares it",
				"what", d.name, "error", refusal.Reason)
		}
		if ch, err = conn.Channel(); err != nil { // a refusal closes the channel
			return err
		}
	}
	return ch.Close()
}

// rabbitPublisher publishes on one channel of a connection of its own: an alarm blocks
// the connections that publish, and the consumer must go on.
type rabbitPublisher struct {
	broker  *rabbitMQ
	conn    *rabbitConn
	channel *amqp.Channel
	returns chan amqp.Return
}

func (b *rabbitMQ) publisher(ctx context.Context) (publisher, error) {
	conn, err := b.dial(ctx, "relay")
	if err != nil {
		return nil, err
	}
	p := &rabbitPublisher{broker: b, conn: conn}
	if p.channel, err = conn.Channel(); err == nil {
		err = p.channel.Confirm(false)
	}
	if err != nil {
		conn.hangUp()
		return nil, err
	}
	p.returns = p.channel.NotifyReturn(make(chan amqp.Return, relayWindow))
	return p, nil
}

func (p *rabbitPublisher) closed() bool { return p.channel.IsClosed() }

func (p *rabbitPublisher) close() { p.conn.hangUp() }

// publish sends all events and then waits for their confirms. Where no queue takes an
// event and a queue is bound before the next one of its user is sent, the two arrive in
// reverse; that takes somebody who deletes queues, and their content.
func (p *rabbitPublisher) publish(ctx context.Context, events []event) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, publishWait)
	defer cancel()
	confirms, publishErr := p.sendAll(ctx, events)
	n, err := countConfirmed(ctx, confirms)
	if publishErr != nil {
		err = publishErr
	}
	// A message that no queue took is returned, and then confirmed like any other.
	if first := p.firstReturned(events[:n]); first < n {
		return first, errors.New("the broker returned an event: no queue takes it")
	}
	return n, err
}

// sendAll returns the confirms to wait for, of those events that were sent.
func (p *rabbitPublisher) sendAll(ctx context.Context, events []event) (
	confirms []*amqp.DeferredConfirmation, err error) {
	p.conn.socket.cork()
	defer func() { err = cmp.Or(err, p.conn.socket.uncork()) }()
	for _, e := range events {
		confirm, err := p.send(ctx, e)
		if err != nil {
			return confirms, err
		}
		confirms = append(confirms, confirm)
	}
	return confirms, nil
}

func (p *rabbitPublisher) send(ctx context.Context, e event) (*amqp.DeferredConfirmation, error) {
	body, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encoding an event: %w", err)
	}
	const mandatory, immediate = true, false
	return p.channel.PublishWithDeferredConfirmWithContext(ctx, p.broker.exchange, e.Type,
		mandatory, immediate, amqp.Publishing{
			Headers:       amqp.Table{"trace_id": e.TraceID},
			ContentType:   "application/json",
			DeliveryMode:  amqp.Persistent,
			CorrelationId: e.TraceID,
			MessageId:     e.ID,
			Timestamp:     e.OccurredAt.Time,
			Type:          e.Type,
			AppId:         p.broker.appName,
			Body:          body,
		})
}

// countConfirmed counts the confirms from the first on that the broker has given.
func countConfirmed(ctx context.Context, confirms []*amqp.DeferredConfirmation) (int, error) {
	for i, confirm := range confirms {
		acknowledged, err := confirm.WaitContext(ctx)
		if err != nil {
			return i, fmt.Errorf("waiting for the broker's confirm: %w", err)
		}
		if !acknowledged {
			return i, errors.New("the broker refused an event, or closed the connection")
		}
	}
	return len(confirms), nil
}

// firstReturned is the index of the first event that came back, or their number. The
// returns have all arrived before the confirms.
func (p *rabbitPublisher) firstReturned(events []event) int {
	returned := make(map[string]bool)
	for more := true; more; {
		select {
		case r, ok := <-p.returns:
			more = ok
			returned[r.MessageId] = true
		default:
			more = false
		}
	}
	first := len(events)
	for i := len(events) - 1; i >= 0; i-- {
		if returned[events[i].ID] {
			p.broker.returned.Inc()
			first = i
		}
	}
	return first
}

func (b *rabbitMQ) consume(ctx context.Context, connected func(), to messageHandler) error {
	if err := to.commit(); err != nil { // messages that cannot be handled stay in the queue
		return err
	}
	conn, err := b.dial(ctx, "consumer")
	if err != nil {
		return err
	}
	defer conn.hangUp()
	deliveries, err := b.subscribe(conn.Connection)
	if err != nil {
		return fmt.Errorf("subscribing to %s: %w", b.queue(), err)
	}
	connected()
	b.consuming.Store(true)
	defer b.consuming.Store(false)
	foreign := make(map[string]bool)
	tick := time.NewTicker(topologyInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			err = b.declareTopology(conn.Connection, foreign)
		case d, ok := <-deliveries:
			if !ok {
				return errors.New("the broker ended the subscription")
			}
			err = b.settle(ctx, conn, received(d, deliveries), to)
		}
		if err != nil {
			return err
		}
	}
}

func (b *rabbitMQ) subscribe(conn *amqp.Connection) (<-chan amqp.Delivery, error) {
	ch, err := conn.Channel()
	if err != nil {
		return nil, err
	}
	if err := ch.Qos(consumerPrefetch, 0, false); err != nil {
		return nil, err
	}
	return ch.Consume(b.queue(), "", false, false, false, false, nil)
}

// settle handles deliveries and then tells the broker, once for all that can be read. It keeps them
// while that fails and tries again, with pauses that grow: a message that is given back has one
// delivery less. It fails only when ctx or the connection ends.
func (b *rabbitMQ) settle(ctx context.Context, conn interface{ IsClosed() bool },
	deliveries []amqp.Delivery, to messageHandler) error {
	for pause := firstPause; ; pause = min(2*pause, maxPause) {
		err := settleOnce(ctx, deliveries, to)
		if err == nil || ctx.Err() != nil || conn.IsClosed() {
			return err
		}
		if pause == firstPause {
			b.log.Warn("Events cannot be handled and wait", "error", err)
		}
		sleep(ctx, pause)
	}
}

// settleOnce has the queue put aside what nobody can read. What is neither acknowledged nor rejected
// when the connection ends comes again.
func settleOnce(ctx context.Context, deliveries []amqp.Delivery, to messageHandler) error {
	var readable, unreadable []amqp.Delivery
	for _, d := range deliveries {
		switch err := to.handle(ctx, d.Body); {
		case err == nil:
			readable = append(readable, d)
		case errors.Is(err, errUnreadable):
			unreadable = append(unreadable, d)
		default:
			return err
		}
	}
	if err := to.commit(); err != nil {
		return err
	}
	for _, d := range unreadable {
		if err := d.Reject(false); err != nil {
			return err
		}
	}
	if len(readable) == 0 {
		return nil
	}
	return readable[len(readable)-1].Ack(true)
}

// received returns d and what has arrived behind it, which the prefetch bounds.
func received(d amqp.Delivery, more <-chan amqp.Delivery) []amqp.Delivery {
	deliveries := []amqp.Delivery{d}
	for {
		select {
		case d, ok := <-more:
			if !ok {
				return deliveries
			}
			deliveries = append(deliveries, d)
		default:
			return deliveries
		}
	}
}
