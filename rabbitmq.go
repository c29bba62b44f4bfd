package main

// This file owns RabbitMQ: the connections, the topology, publishing with confirms, and consuming.

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	amqp "github.com/rabbitmq/amqp091-go"
)

// rabbitMQ is the broker of a service with a RABBITMQ_URL. Its names derive from that of the
// exchange.
type rabbitMQ struct {
	urls       []string     // of the hosts of a cluster, which are tried in turn
	host       atomic.Int64 // index of the host that answered last
	appName    string
	exchange   string
	log        *slog.Logger
	returned   *metrics.Counter
	consuming  atomic.Bool // every replica consumes, whichever one relays
	mismatched sync.Map    // names of declarations that RabbitMQ has refused
}

func newRabbitMQ(s settings, log *slog.Logger, set *metrics.Set) *rabbitMQ {
	return &rabbitMQ{urls: splitHosts(s.rabbitURL), appName: s.appName, exchange: s.exchange,
		log: log, returned: set.GetOrCreateCounter("events_returned_total")}
}

func (b *rabbitMQ) queue() string              { return b.exchange + ".consumer" }
func (b *rabbitMQ) deadLetterExchange() string { return b.exchange + ".dlx" }
func (b *rabbitMQ) deadLetterQueue() string    { return b.exchange + ".dead" }

// state is that of the consumer's connection; the relay's may differ.
func (b *rabbitMQ) state() state {
	if b.consuming.Load() {
		return stateUp
	}
	return stateDown
}

// rabbitConn is a connection to a broker whose topology was complete when it was dialled.
type rabbitConn struct {
	*amqp.Connection
	socket *brokerSocket
}

// dial connects to the host that answered last, else to the next one that answers. The caller
// closes the connection with disconnect.
func (b *rabbitMQ) dial(ctx context.Context, purpose string) (c *rabbitConn, err error) {
	var errs []error
	for range b.urls {
		host := b.host.Load()
		c, err = b.dialHost(ctx, b.urls[host], purpose)
		if err == nil || ctx.Err() != nil {
			return c, err
		}
		errs = append(errs, err)
		b.host.CompareAndSwap(host, (host+1)%int64(len(b.urls)))
	}
	return nil, errors.Join(errs...)
}

// dialHost connects, within brokerTimeout for each handshake, and declares the topology. ctx ends
// only the attempt.
func (b *rabbitMQ) dialHost(ctx context.Context, url, purpose string) (*rabbitConn, error) {
	properties := amqp.NewConnectionProperties()
	properties.SetClientConnectionName(b.appName + " " + purpose)
	socket, unwatch := &brokerSocket{}, func() bool { return true }
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
	if err = b.declareTopology(conn, true); err != nil {
		c.disconnect()
		return nil, fmt.Errorf("declaring the topology: %w", err)
	}
	return c, nil
}

// disconnect closes the connection, in an orderly way if that takes at most brokerGoodbye. A broker
// that does not read blocks Close, and one that sends heartbeats prolongs CloseDeadline.
func (c *rabbitConn) disconnect() {
	defer time.AfterFunc(brokerGoodbye, func() { _ = c.socket.Close() }).Stop()
	_ = c.CloseDeadline(time.Now().Add(brokerGoodbye))
}

// brokerSocket sets a deadline for each write, in which amqp091 would hang while a broker in a
// memory alarm does not read. While it is corked, it collects messages: with a write for each of
// them, publishing takes four times as long.
type brokerSocket struct {
	net.Conn

	mu     sync.Mutex
	corked bool
	held   []byte
}

// Write holds p back while corked, up to brokerBuffer. A later Write or uncork then reports the
// failure.
func (s *brokerSocket) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = append(s.held, p...)
	if s.corked && len(s.held) < brokerBuffer {
		return len(p), nil
	}
	return len(p), s.flushLocked()
}

// cork collects messages until uncork writes them.
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
	err := s.SetWriteDeadline(time.Now().Add(brokerWrite))
	if err == nil {
		_, err = s.Conn.Write(s.held)
	}
	s.held = s.held[:0]
	return err
}

// declaration makes sure that an exchange, a queue or a binding exists.
type declaration struct {
	name    string
	declare func(*amqp.Channel) error
}

// topology returns the exchange of the events, the consumer's queue, and the exchange and queue of
// dead letters. RabbitMQ accepts these arguments from 3.10 on.
func (b *rabbitMQ) topology() []declaration {
	exchange := func(name, kind string) declaration {
		return declaration{"exchange " + name, func(ch *amqp.Channel) error {
			return ch.ExchangeDeclare(name, kind, true, false, false, false, nil)
		}}
	}
	queue := func(name string, arguments amqp.Table) declaration {
		return declaration{"queue " + name, func(ch *amqp.Channel) error {
			arguments["x-queue-type"] = "quorum"
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
		queue(b.deadLetterQueue(), amqp.Table{}),
		binding(b.deadLetterQueue(), "", b.deadLetterExchange()),
		exchange(b.exchange, amqp.ExchangeTopic),
		queue(b.queue(), amqp.Table{
			"x-single-active-consumer": true,
			"x-delivery-limit":         20,
			"x-dead-letter-exchange":   b.deadLetterExchange(),
			"x-dead-letter-strategy":   "at-least-once",
			"x-overflow":               "reject-publish",
		}),
		binding(b.queue(), "user.*", b.exchange),
	}
}

// mismatchCodes are the refusals of a declaration whose name exists with other properties, or that
// the user may not make.
var mismatchCodes = []int{amqp.PreconditionFailed, amqp.AccessRefused, amqp.ResourceLocked}

// declareTopology declares what is missing. It logs what RabbitMQ refuses to change, and keeps it.
// Unless all is set, it skips what was refused before: each refusal closes a channel.
func (b *rabbitMQ) declareTopology(conn *amqp.Connection, all bool) error {
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	for _, d := range b.topology() {
		if _, mismatched := b.mismatched.Load(d.name); mismatched && !all {
			continue
		}
		err := d.declare(ch)
		if err == nil {
			b.mismatched.Delete(d.name)
			continue
		}
		refusal, ok := errors.AsType[*amqp.Error](err)
		if !ok || !slices.Contains(mismatchCodes, refusal.Code) {
			return err
		}
		if _, known := b.mismatched.LoadOrStore(d.name, true); !known {
			b.log.Warn("RabbitMQ declaration mismatch, keeping the existing one",
				"what", d.name, "error", refusal.Reason)
		}
		if ch, err = conn.Channel(); err != nil {
			return err
		}
	}
	return ch.Close()
}

// rabbitPublisher publishes on one channel. Its connection is not the consumer's, because an alarm
// of the broker blocks connections that publish.
type rabbitPublisher struct {
	broker  *rabbitMQ
	conn    *rabbitConn
	channel *amqp.Channel
	returns chan amqp.Return
}

// publisher opens a connection of its own in confirm mode. The caller closes it.
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
		conn.disconnect()
		return nil, err
	}
	p.returns = p.channel.NotifyReturn(make(chan amqp.Return, relayWindow)) // one for each event
	return p, nil
}

func (p *rabbitPublisher) closed() bool { return p.channel.IsClosed() }
func (p *rabbitPublisher) close()       { p.conn.disconnect() }

// publish sends all events and then waits for their confirms.
func (p *rabbitPublisher) publish(ctx context.Context, events []event) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, publishWait)
	defer cancel()
	confirms, publishErr := p.sendAll(ctx, events)
	n, err := countConfirmed(ctx, confirms)
	err = cmp.Or(publishErr, err)
	// The broker returns a message that no queue takes, and then confirms it like any other.
	if first := p.firstReturned(events[:n]); first < n {
		return first, errors.New("the broker returned an event, because no queue is bound for it")
	}
	return n, err
}

// sendAll returns the confirms of the events that were sent.
func (p *rabbitPublisher) sendAll(ctx context.Context, events []event) (
	confirms []*amqp.DeferredConfirmation, err error) {
	p.conn.socket.cork()
	defer func() { err = cmp.Or(err, p.conn.socket.uncork()) }()
	for _, e := range events {
		body, err := json.Marshal(e)
		if err != nil {
			return confirms, err
		}
		confirm, err := p.channel.PublishWithDeferredConfirmWithContext(ctx, p.broker.exchange,
			e.Type, true /* mandatory */, false, amqp.Publishing{
				MessageId: e.ID, Type: e.Type, AppId: p.broker.appName, CorrelationId: e.TraceID,
				Headers: e.headers(p.broker.appName), Timestamp: e.OccurredAt.Time,
				DeliveryMode: amqp.Persistent, ContentType: "application/json", Body: body,
			})
		if err != nil {
			return confirms, err
		}
		confirms = append(confirms, confirm)
	}
	return confirms, nil
}

// countConfirmed waits for confirms, and returns how many came, from the first one on. A refused
// event ends the count; later ones may have arrived, and are sent again as duplicates.
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

// firstReturned returns the index of the first event that was returned, or their number. All
// returns arrive before the confirms.
func (p *rabbitPublisher) firstReturned(events []event) int {
	returned := make(map[string]bool)
	for more := true; more; {
		var r amqp.Return
		select {
		case r, more = <-p.returns:
			returned[r.MessageId] = true
		default:
			more = false
		}
	}
	first := len(events)
	for i, e := range slices.Backward(events) {
		if returned[e.ID] {
			p.broker.returned.Inc()
			first = i
		}
	}
	return first
}

// consume returns nil only when ctx ends. It declares missing topology every topologyInterval.
func (b *rabbitMQ) consume(ctx context.Context, onReady func(), handler messageHandler) error {
	if _, err := handler.handle(ctx, nil); err != nil { // leave the messages in the queue
		return err
	}
	conn, err := b.dial(ctx, "consumer")
	if err != nil {
		return err
	}
	defer conn.disconnect()
	deliveries, err := b.subscribe(conn.Connection)
	if err != nil {
		return fmt.Errorf("subscribing to %s: %w", b.queue(), err)
	}
	onReady()
	b.consuming.Store(true)
	defer b.consuming.Store(false)
	tick := time.NewTicker(topologyInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			err = b.declareTopology(conn.Connection, false)
		case d, ok := <-deliveries:
			if !ok {
				return errors.New("the broker ended the subscription")
			}
			err = b.settle(ctx, conn, received(d, deliveries), handler)
		}
		if err != nil {
			return err
		}
	}
}

func (b *rabbitMQ) subscribe(conn *amqp.Connection) (<-chan amqp.Delivery, error) {
	ch, err := conn.Channel()
	if err == nil {
		err = ch.Qos(consumerPrefetch, 0, false)
	}
	if err != nil {
		return nil, err
	}
	return ch.Consume(b.queue(), "", false, false, false, false, nil)
}

// settle handles deliveries and then acknowledges them. While they cannot be handled it keeps them
// and tries again, with growing pauses: returning them to the queue would use up one of their 20
// deliveries. It fails only when ctx or the connection ends.
func (b *rabbitMQ) settle(ctx context.Context, conn interface{ IsClosed() bool },
	deliveries []amqp.Delivery, handler messageHandler) error {
	for pause := firstPause; ; pause = min(2*pause, maxPause) {
		err := settleOnce(ctx, deliveries, handler)
		if err == nil || ctx.Err() != nil || conn.IsClosed() {
			return err
		}
		if pause == firstPause {
			b.log.Warn("Events cannot be handled, retrying", "error", err)
		}
		sleep(ctx, pause)
	}
}

// settleOnce rejects unreadable messages, which puts them aside, and acknowledges the others
// together. If the connection ends before that, they are delivered again.
func settleOnce(ctx context.Context, deliveries []amqp.Delivery, handler messageHandler) error {
	messages := make([]message, len(deliveries))
	for i, d := range deliveries {
		actor, _ := d.Headers["actor"].(string)
		messages[i] = message{d.Body, actor}
	}
	unreadable, err := handler.handle(ctx, messages)
	if err != nil {
		return err
	}
	for _, i := range unreadable {
		if err := deliveries[i].Reject(false); err != nil {
			return err
		}
	}
	for i, d := range slices.Backward(deliveries) {
		if !slices.Contains(unreadable, i) {
			return d.Ack(true)
		}
	}
	return nil
}

// received returns d and the deliveries that have arrived after it. The prefetch limits their
// number.
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
