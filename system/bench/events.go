package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const exchange = "user_events"

// event is a message about a user.
type event struct {
	Type string `json:"event_type"`
	Data struct {
		UserID  int64 `json:"user_id"`
		Version int64 `json:"version"`
	} `json:"data"`
}

// openChannel opens a channel of a connection of its own, and declares the exchange.
func openChannel(url string) (*amqp.Channel, error) {
	conn, err := amqp.Dial(url)
	if err != nil {
		return nil, err
	}
	ch, err := conn.Channel()
	if err != nil {
		return nil, err
	}
	return ch, ch.ExchangeDeclare(exchange, amqp.ExchangeTopic, true, false, false, false, nil)
}

// publish publishes the event of a changed user without waiting for a confirm.
func publish(ch *amqp.Channel, u user) error {
	e := event{Type: "user.updated"}
	e.Data.UserID = u.ID
	body, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return ch.Publish(exchange, e.Type, false, false,
		amqp.Publishing{ContentType: "application/json", DeliveryMode: amqp.Persistent, Body: body})
}

// listen passes every event of a vhost to handle, one at a time, with the time of its arrival. Its
// queue is exclusive, and messages are acknowledged automatically. stop returns when handle does
// not run any more.
func (s *servers) listen(vhost string, handle func(event, time.Time)) (stop func(), err error) {
	ch, err := openChannel(s.rabbit.URL() + vhost)
	if err != nil {
		return nil, err
	}
	queue, err := ch.QueueDeclare("", false, true, true, false, nil)
	if err == nil {
		err = ch.QueueBind(queue.Name, "user.*", exchange, false, nil)
	}
	if err != nil {
		return nil, err
	}
	deliveries, err := ch.Consume(queue.Name, "", true, true, false, false, nil)
	if err != nil {
		return nil, err
	}
	var handling sync.WaitGroup
	handling.Go(func() {
		for d := range deliveries {
			now := time.Now()
			var e event
			if err := json.Unmarshal(d.Body, &e); err == nil {
				handle(e, now)
			}
		}
	})
	return func() {
		ch.Close()
		handling.Wait()
	}, nil
}

const (
	outboxUsers    = 10_000
	outboxVersions = 20 // of each user
)

// received checks the events that a relay delivers.
type received struct {
	mu       sync.Mutex
	first    time.Time
	events   int
	newest   map[int64]int64 // versions, by user
	disorder int             // versions that did not follow the one before
}

func (c *received) event(e event, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.events == 0 {
		c.first = at
	}
	last, known := c.newest[e.Data.UserID]
	switch {
	case known && e.Data.Version <= last: // sent twice
		return
	case known && e.Data.Version != last+1:
		c.disorder++
	}
	c.newest[e.Data.UserID] = e.Data.Version
	c.events++
}

// relayRate measures how fast the service delivers a full outbox.
func relayRate(s *servers, o options) (string, error) {
	r, err := s.rig()
	if err != nil {
		return "", err
	}
	ctx := context.Background()
	for range outboxVersions { // no service runs
		_, err := r.db.Exec(ctx, "UPDATE users SET surname = surname || 'e' WHERE id <= $1", outboxUsers)
		if err != nil {
			return "", err
		}
	}
	c := &received{newest: make(map[int64]int64)}
	stop, err := s.listen(r.database, c.event)
	if err != nil {
		return "", err
	}
	if _, err := r.start(service); err != nil {
		return "", err
	}
	ended, err := r.emptied(ctx)
	if err != nil {
		return "", err
	}
	rate := outboxUsers * outboxVersions / ended.Sub(c.first).Seconds()
	if err := r.finish(); err != nil {
		return "", err
	}
	stop()
	if c.events != outboxUsers*outboxVersions || c.disorder > 0 {
		return "", fmt.Errorf("%d events arrived, and %d were not in order", c.events, c.disorder)
	}
	return fmt.Sprintf("\nOf %d events, the relay delivered %s per second.\n",
		outboxUsers*outboxVersions, digits(rate)), nil
}

// emptied returns when the outbox is empty. Counting it more often would slow the relay down.
func (r *rig) emptied(ctx context.Context) (time.Time, error) {
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); {
		var empty bool
		err := r.db.QueryRow(ctx, "SELECT NOT EXISTS (SELECT FROM outbox)").Scan(&empty)
		if empty || err != nil {
			return time.Now(), err
		}
		time.Sleep(50 * time.Millisecond)
	}
	return time.Time{}, errors.New("the outbox is not empty after 2 minutes")
}
