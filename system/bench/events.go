package main

import (
	"encoding/json"
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
// queue is exclusive, and messages are acknowledged automatically. stop returns when handle does not
// run any more.
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
