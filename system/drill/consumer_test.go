package drill

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"user-service/system/env"
)

// startConsumer starts a consumer, as docs/events.md describes it, while clients make 200 changes a
// second to many users. The consumer is killed while it reads the list, and again while it applies
// events. At the end it must have the same users as the table.
func startConsumer(r *trial) {
	ids := r.insertUsers(roundsOf(100_000, 2000))
	var clients [20]func(context.Context)
	for i := range clients {
		var own []*ownUser
		for j := i; j < len(ids); j += len(clients) {
			own = append(own, &ownUser{id: ids[j], version: 1})
		}
		clients[i] = func(ctx context.Context) {
			r.changeRegularly(ctx, own, time.Duration(len(clients))*time.Second/200)
		}
	}
	begin := time.Now()
	stop := inBackground(r.t, clients[:]...)
	time.Sleep(time.Second)

	m := &mirror{trial: r, users: make(map[int64]mirrored), proxy: r.newProxy(r.broker.URL())}
	kill := inBackground(r.t, m.run)
	m.await("half of the list is read", func() bool { return m.after >= ids[len(ids)/2] })
	kill()
	r.t.Logf("killed with %d users, the list complete: %t", len(m.users), m.complete)
	kill = inBackground(r.t, m.run)
	m.await("events are applied", func() bool { return m.complete && m.handled > 100 })
	kill()
	r.t.Logf("killed with %d users, after %d events", len(m.users), m.handled)
	inBackground(r.t, m.run)

	time.Sleep(roundsOf(20*time.Second, 3*time.Second))
	stop()
	r.t.Logf("%.0f changes/s", float64(r.changesSince(begin))/time.Since(begin).Seconds())
	r.finally(m.compare)
}

// insertUsers inserts users with SQL, because the API would hash a password for each, and waits for
// their events. It returns their ids.
func (r *trial) insertUsers(n int) []int64 {
	r.t.Helper()
	rows, _ := r.db.Query(r.t.Context(), `INSERT INTO users (name, surname, password)
		SELECT 'listed ' || n, 'Doe', '' FROM generate_series(1, $1::int) AS n RETURNING id`, n)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	require(r.t, err)
	for begin := time.Now(); r.ledger.received.Load() < int64(n); {
		if time.Since(begin) > 2*time.Minute {
			r.t.Fatalf("only %d events arrive", r.ledger.received.Load())
		}
		time.Sleep(100 * time.Millisecond)
	}
	return ids
}

// changeRegularly makes one change per interval until ctx ends: of 100 changes 4 creations, 8
// deletions and 88 updates.
func (r *trial) changeRegularly(ctx context.Context, own []*ownUser, interval time.Duration) {
	ticks := time.NewTicker(interval)
	defer ticks.Stop()
	for ctx.Err() == nil {
		i := rand.N(len(own))
		switch dice := rand.N(100); {
		case dice < 4:
			if u := r.create(); u != nil {
				own = append(own, u)
			}
		case dice < 12 && len(own) > 1:
			r.remove(own[i])
			own = slices.Delete(own, i, i+1)
		default:
			r.update(own[i])
		}
		select {
		case <-ctx.Done():
		case <-ticks.C:
		}
	}
}

func (r *trial) changesSince(t time.Time) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.attempts {
		if a.requested.After(t) {
			n++
		}
	}
	return n
}

// mirrorQueue is the queue of a mirror.
const mirrorQueue = "drill.mirror"

// mirror is a consumer that keeps a copy of the users. Its fields stand for its database: they
// outlive a kill, and changes under one lock for a transaction.
type mirror struct {
	*trial
	proxy *env.Proxy // to RabbitMQ

	mu       sync.Mutex
	users    map[int64]mirrored
	after    int64 // the last id of the list that was read
	complete bool  // the list was read to its end
	handled  int   // events, including those that were dropped
	dropped  int   // events of a version that was known
}

// mirrored is a user, or what is left of one: a deleted user keeps its id and version, so that an
// older state does not bring it back.
type mirrored struct {
	ID      int64
	Version int64
	Name    string
	Surname string
	deleted bool
}

// await waits until a condition, which is called under the lock, holds.
func (m *mirror) await(what string, holds func() bool) {
	m.t.Helper()
	eventually(m.t, what, func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return holds()
	})
}

// run consumes until ctx ends. That is a kill: from then on it acknowledges nothing, and its
// connection is cut.
func (m *mirror) run(ctx context.Context) {
	defer m.proxy.Cut(false)
	stop := context.AfterFunc(ctx, func() { m.proxy.Cut(false) })
	defer stop()
	if err := m.consume(ctx); err != nil && ctx.Err() == nil {
		m.problem("the consumer failed: %v", err)
	}
}

// consume binds the queue, reads what it has not read of the list, and applies events.
func (m *mirror) consume(ctx context.Context) error {
	conn, err := amqp.Dial(m.proxy.URL)
	if err != nil {
		return err
	}
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	if _, err := ch.QueueDeclare(mirrorQueue, true, false, false, false,
		amqp.Table{"x-queue-type": "quorum"}); err != nil {
		return err
	}
	if err := ch.QueueBind(mirrorQueue, "user.*", env.Exchange, false, nil); err != nil {
		return err
	}
	for !m.complete && ctx.Err() == nil {
		if err := m.readPage(); err != nil {
			return err
		}
	}
	if err := ch.Qos(100, 0, false); err != nil {
		return err
	}
	deliveries, err := ch.Consume(mirrorQueue, "", false, false, false, false, nil)
	if err != nil {
		return err
	}
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for d := range deliveries {
				if err := m.apply(d.Body); err != nil {
					m.problem("the consumer failed: %v", err)
				} else if ctx.Err() == nil {
					d.Ack(false)
				}
			}
		})
	}
	workers.Wait()
	return nil
}

// readPage stores the users of the next page and its end.
func (m *mirror) readPage() error {
	var page struct {
		Users     []mirrored
		NextAfter *int64 `json:"next_after"`
	}
	path := fmt.Sprintf("/users?after=%d&per_page=%d", m.after, roundsOf(100, 10))
	if _, err := m.get(path, &page); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, u := range page.Users {
		m.store(u)
	}
	if page.NextAfter == nil {
		m.complete = true
	} else {
		m.after = *page.NextAfter
	}
	return nil
}

// apply reads the user of an event, unless it knows the event's version, and stores it. If the user
// is gone, the event of its deletion follows.
func (m *mirror) apply(body []byte) error {
	e, err := parseEvent(body)
	if err != nil {
		return err
	}
	m.mu.Lock()
	known := e.Data.Version <= m.users[e.Data.UserID].Version
	m.handled++
	if known {
		m.dropped++
	}
	m.mu.Unlock()
	if known {
		return nil
	}
	u := mirrored{ID: e.Data.UserID, Version: e.Data.Version, deleted: true}
	if e.Type != env.EventDeleted {
		u = mirrored{}
		found, err := m.get(fmt.Sprint("/users/", e.Data.UserID), &u)
		if err != nil || !found {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.store(u)
	return nil
}

// store keeps the higher version of a user. The caller holds the lock.
func (m *mirror) store(u mirrored) {
	if u.Version > m.users[u.ID].Version {
		m.users[u.ID] = u
	}
}

// get reads from the API. It reports whether the path exists.
func (m *mirror) get(path string, into any) (found bool, err error) {
	response, err := m.client.Get(m.pick().URL + path)
	if err != nil {
		return false, err
	}
	defer response.Body.Close()
	switch response.StatusCode {
	case http.StatusOK:
		return true, json.NewDecoder(response.Body).Decode(into)
	case http.StatusNotFound:
		return false, nil
	}
	return false, fmt.Errorf("GET %s: %s", path, response.Status)
}

// compare waits until the consumer has the users of the table, and fails the test if it does not
// get there.
func (m *mirror) compare() {
	m.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	differences := m.differences()
	for ; len(differences) > 0 && time.Now().Before(deadline); differences = m.differences() {
		time.Sleep(200 * time.Millisecond)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.t.Logf("the consumer handled %d events, dropped %d, and has %d users and deleted users: "+
		"%d differences", m.handled, m.dropped, len(m.users), len(differences))
	if len(differences) > 0 {
		m.t.Errorf("%d users differ from the table, such as %v", len(differences),
			differences[:min(5, len(differences))])
	}
}

// differences describes the users that differ from the table.
func (m *mirror) differences() (found []string) {
	rows, _ := m.db.Query(m.t.Context(), "SELECT id, version, name, surname FROM users")
	m.mu.Lock()
	defer m.mu.Unlock()
	existing := make(map[int64]bool)
	var u mirrored
	_, err := pgx.ForEachRow(rows, []any{&u.ID, &u.Version, &u.Name, &u.Surname}, func() error {
		existing[u.ID] = true
		if has := m.users[u.ID]; has != u {
			found = append(found, fmt.Sprintf("%+v instead of %+v", has, u))
		}
		return nil
	})
	require(m.t, err)
	for id, has := range m.users {
		if !has.deleted && !existing[id] {
			found = append(found, fmt.Sprintf("%+v instead of none", has))
		}
	}
	return found
}
