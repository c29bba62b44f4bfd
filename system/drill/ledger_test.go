package drill

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"user-service/system/env"
)

// ledger holds what happened according to the recorder, to the service's consumer and to writers
// that do not use the API.
type ledger struct {
	received atomic.Int64 // events that were delivered for the first time

	mu         sync.Mutex
	users      map[int64]*history
	heard      map[change]bool // events that the service's consumer logged
	deletions  map[int64]int64 // versions of user.deleted that it logged
	removed    map[int64]bool  // users whose deletion a client requested
	written    []change        // committed by other writers
	repeated   []time.Time     // of the duplicates
	unreadable int             // messages to the recorder that are not events
}

// history is what the recorder received of a user, in the order of the first deliveries.
type history struct {
	arrivals   []arrival
	highest    int64
	deletion   int64 // the version of user.deleted, or 0
	duplicated int
	conflicts  int // deliveries of a version that were another event of that version
}

type arrival struct {
	version int64
	id      string
	at      time.Time
}

func newLedger() *ledger {
	return &ledger{users: make(map[int64]*history), heard: make(map[change]bool),
		deletions: make(map[int64]int64), removed: make(map[int64]bool)}
}

// find returns the first delivery of a version, or nil. h may be nil.
func (h *history) find(version int64) *arrival {
	if h != nil && version <= h.highest {
		for i := len(h.arrivals) - 1; i >= 0; i-- {
			if h.arrivals[i].version == version {
				return &h.arrivals[i]
			}
		}
	}
	return nil
}

// logged adds an event that the service's consumer logged. A line without a type does not count.
func (l *ledger) logged(eventType string, userID, version int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.heard[change{userID, version}] = eventType != ""
	if eventType == env.EventDeleted {
		l.deletions[userID] = version
	}
}

func (l *ledger) setRemoved(userID int64, removed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if removed {
		l.removed[userID] = true
	} else {
		delete(l.removed, userID)
	}
}

// record reads the recorder's queue until ctx ends. A message that was delivered, but not
// acknowledged when the recorder's connection broke, is delivered again with a mark.
func (r *trial) record(ctx context.Context) {
	for ; ctx.Err() == nil; sleep(ctx, 100*time.Millisecond) {
		conn, err := r.broker.Dial()
		if err != nil {
			continue
		}
		closeConn := func() { conn.CloseDeadline(time.Now().Add(time.Second)) }
		stop := context.AfterFunc(ctx, closeConn)
		if deliveries, err := subscribe(conn); err == nil {
			for d := range deliveries {
				r.ledger.add(d)
				d.Ack(false)
			}
		}
		stop()
		closeConn()
	}
}

func subscribe(conn *amqp.Connection) (<-chan amqp.Delivery, error) {
	ch, err := conn.Channel()
	if err != nil {
		return nil, err
	}
	if err := ch.Qos(1000, 0, false); err != nil {
		return nil, err
	}
	return ch.Consume(recorderQueue, "", false, false, false, false, nil)
}

// event is a message of the service.
type event struct {
	ID   string `json:"event_id"`
	Type string `json:"event_type"`
	Data struct {
		UserID  int64 `json:"user_id"`
		Version int64 `json:"version"`
	} `json:"data"`
}

func parseEvent(body []byte) (event, error) {
	var e event
	if len(body) > 64<<10 {
		return e, errors.New("more than 64 KiB")
	}
	if err := json.Unmarshal(body, &e); err != nil {
		return e, err
	}
	switch e.Type {
	case env.EventCreated, env.EventUpdated, env.EventDeleted:
	default:
		return e, fmt.Errorf("unknown event_type %q", e.Type)
	}
	if e.ID == "" || e.Data.UserID < 1 || e.Data.Version < 1 {
		return e, fmt.Errorf("event_id, user_id or version is missing: %s", body)
	}
	return e, nil
}

// add adds a delivery to the recorder.
func (l *ledger) add(d amqp.Delivery) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e, err := parseEvent(d.Body)
	if err != nil {
		l.unreadable++
		return
	}
	h := l.users[e.Data.UserID]
	if h == nil {
		h = &history{}
		l.users[e.Data.UserID] = h
	}
	first := h.find(e.Data.Version)
	switch {
	case first == nil:
		l.received.Add(1)
		h.arrivals = append(h.arrivals, arrival{e.Data.Version, e.ID, time.Now()})
		h.highest = max(h.highest, e.Data.Version)
	case first.id != e.ID:
		h.conflicts++
	default:
		if !d.Redelivered {
			h.duplicated++
			l.repeated = append(l.repeated, time.Now())
		}
		return
	}
	if e.Type == env.EventDeleted {
		h.deletion = e.Data.Version
	}
}

// result is a row of the table. See introduction for the columns.
type result struct {
	name                                 string
	attempts, ok, failed, unknown        int
	lost, phantom, reordered, duplicated int
	missing, withoutChange               int
	longestGap, recovery                 time.Duration
	largestOutbox                        int64

	// Not in the table.
	slowest  time.Duration // answer
	unlogged int           // events that the service's consumer did not log
	pending  int64         // events that stay in the outbox
	twice    int           // users that were created twice
	dead     int           // messages in the dead letter queue
	gaps     []string      // describe what counts as reordered
}

// settle waits up to 40 s until every event has arrived, and returns the counts.
func (r *trial) settle() result {
	deadline := time.Now().Add(40 * time.Second)
	for row := r.count(); row.lost+row.unlogged > 0 || row.pending > 0; row = r.count() {
		if time.Now().After(deadline) {
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	time.Sleep(200 * time.Millisecond) // for events that should not arrive
	row := r.count()
	queue, err := r.rabbitChannel().QueueDeclarePassive(env.DeadLetterQueue,
		true, false, false, false, nil)
	if err != nil {
		r.t.Error(err)
	}
	row.dead = queue.Messages
	return row
}

// count compares the recorded events with the table and with what was acknowledged.
func (r *trial) count() result {
	row := result{name: r.name, recovery: r.eventAfter(r.over), largestOutbox: r.largest.Load()}
	existing := r.query(&row)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ledger.mu.Lock()
	defer r.ledger.mu.Unlock()
	acknowledged := r.acknowledged(&row)
	users := make(map[int64]bool)
	for id := range existing {
		users[id] = true
	}
	for id := range acknowledged {
		users[id] = true
	}
	for id := range r.ledger.users {
		users[id] = true
	}
	for id := range users {
		last, exists := existing[id]
		r.countUser(&row, id, last, exists, acknowledged[id])
	}
	if !r.lossy {
		row.phantom = row.withoutChange
	}
	return row
}

// query sets what the database knows, and returns the versions of the existing users.
func (r *trial) query(row *result) map[int64]int64 {
	existing := make(map[int64]int64)
	rows, _ := r.db.Query(r.t.Context(), "SELECT id, version FROM users")
	var id, version int64
	_, err := pgx.ForEachRow(rows, []any{&id, &version}, func() error {
		existing[id] = version
		return nil
	})
	require(r.t, err)
	err = r.db.QueryRow(r.t.Context(), "SELECT count(*) FROM outbox").Scan(&row.pending)
	require(r.t, err)
	// Every attempt uses a name of its own, so a name in two rows was created twice.
	require(r.t, r.db.QueryRow(r.t.Context(), `SELECT count(*) FROM
		(SELECT FROM users GROUP BY name HAVING count(*) > 1) AS twice`).Scan(&row.twice))
	return existing
}

// acknowledged counts the attempts by outcome, and returns the versions of each user that a client
// or a writer knows to be made; 0 stands for a deletion.
func (r *trial) acknowledged(row *result) map[int64]map[int64]bool {
	versions := make(map[int64]map[int64]bool)
	acknowledge := func(c change) {
		if versions[c.userID] == nil {
			versions[c.userID] = make(map[int64]bool)
		}
		versions[c.userID][c.version] = true
	}
	for _, a := range r.attempts {
		row.attempts++
		switch a.outcome {
		case outcomeFailed:
			row.failed++
		case outcomeUnknown:
			row.unknown++
		case outcomeOK:
			row.ok++
			acknowledge(a.change)
		}
	}
	for _, c := range r.ledger.written {
		acknowledge(c)
	}
	return versions
}

// fate is what must have happened to a user.
type fate struct {
	last    int64 // version
	highest int64 // version that was received or acknowledged
	exists  bool  // in the table
	lost    bool  // not in the table, although nobody deleted it
}

// countUser adds what happened to one user to row. last is its version in the table, if it exists.
func (r *trial) countUser(row *result, id, last int64, exists bool, acknowledged map[int64]bool) {
	h := r.ledger.users[id]
	if h == nil {
		h = &history{}
	}
	f := fate{last: last, highest: h.highest, exists: exists}
	for version := range acknowledged {
		f.highest = max(f.highest, version)
	}
	deletion := h.deletion
	if r.bindingLost {
		deletion = max(deletion, r.ledger.deletions[id])
	}
	switch {
	case exists && deletion > 0:
		row.withoutChange++
	case exists:
	case deletion > 0:
		f.last = deletion
	case r.ledger.removed[id]: // the event of its deletion is lost
		f.last = f.highest + 1
	default:
		f.lost = true
	}
	for version := range acknowledged {
		if f.lost || version > f.last || version == 0 && exists {
			row.missing++
		}
	}
	row.withoutChange += h.conflicts
	row.duplicated += h.duplicated
	r.countArrivals(row, id, h, f)
	r.countLost(row, id, h, f, acknowledged)
}

// elsewhere reports whether an event counts as received because the service's consumer logged it.
func (r *trial) elsewhere(id, version int64) bool {
	return r.bindingLost && r.ledger.heard[change{id, version}]
}

func (r *trial) countArrivals(row *result, id int64, h *history, f fate) {
	expected := int64(1)
	for i, a := range h.arrivals {
		for expected < a.version && r.elsewhere(id, expected) {
			expected++
		}
		if a.version != expected {
			row.reordered++
			before := h.arrivals[max(i-1, 0)]
			row.gaps = append(row.gaps, fmt.Sprintf("user %d: version %d came %v after version %d",
				id, a.version, a.at.Sub(before.at), before.version))
		}
		expected = max(expected, a.version+1)
		if a.version > f.last {
			row.withoutChange++
		}
		if !r.queueLost && !r.bindingLost && !r.ledger.heard[change{id, a.version}] {
			row.unlogged++
		}
	}
}

func (r *trial) countLost(row *result, id int64, h *history, f fate, acknowledged map[int64]bool) {
	got := make(map[int64]bool, len(h.arrivals))
	for _, a := range h.arrivals {
		got[a.version] = true
	}
	for version := int64(1); version <= f.highest || version <= f.last; version++ {
		if !got[version] && !r.elsewhere(id, version) &&
			(version <= f.last || acknowledged[version] && !r.lossy) {
			row.lost++
		}
	}
}

// judge fails the test if a rule is broken.
func (r *trial) judge(row *result) {
	r.t.Helper()
	for _, s := range r.started {
		for _, line := range s.Unexpected() {
			r.problem("in the log: %s", line)
		}
	}
	for problem, n := range r.problems {
		r.t.Errorf("%d times: %s", n, problem)
	}
	r.judgeEvents(row)
	if r.onlyRabbit && row.failed+row.unknown > 0 {
		r.t.Errorf("%d attempts failed, and %d have an unknown outcome", row.failed, row.unknown)
	}
	if !r.database {
		return
	}
	if row.slowest > r.limit(6*time.Second) {
		r.t.Errorf("an answer took %v", row.slowest)
	}
	if first := r.firstOK(r.over); first > r.limit(2*time.Second) {
		r.t.Errorf("the first 2xx came %v after the fault", first)
	}
}

func (r *trial) judgeEvents(row *result) {
	r.t.Helper()
	if row.lost+row.phantom+row.reordered > 0 {
		r.t.Errorf("%d lost, %d phantom, %d reordered: %s", row.lost, row.phantom, row.reordered,
			strings.Join(row.gaps, "; "))
	}
	if !r.lossy && row.missing+row.withoutChange > 0 {
		r.t.Errorf("%d acknowledged changes are missing, %d events are without their change",
			row.missing, row.withoutChange)
	}
	if row.pending > 0 || r.ledger.unreadable > 0 {
		r.t.Errorf("%d events stay in the outbox; the recorder received %d other messages",
			row.pending, r.ledger.unreadable)
	}
	if row.twice > 0 {
		r.t.Errorf("%d users were created twice, in spite of the Idempotency-Key", row.twice)
	}
	if row.dead > 0 {
		r.t.Errorf("%d messages are in the dead letter queue", row.dead)
	}
	if row.unlogged > 0 {
		r.t.Errorf("the service's consumer did not log %d events", row.unlogged)
	}
	if row.recovery == never {
		r.t.Error("no event arrived after the fault")
	}
}
