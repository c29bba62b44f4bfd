package main

// This file owns the store of a service without a database, and the broker of one without RabbitMQ.

import (
	"cmp"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
)

// memory is the store of a service without a database, and its outbox. Everything is lost when the
// process ends. Its methods behave as those of postgres; their contract is in userStore and outbox.
type memory struct {
	mu     sync.RWMutex
	lastID int64
	users  []memoryUser // in the order of ids
	events []event      // pending, oldest first
	wake   chan struct{}

	byKey     map[string]memoryUser // the first version, by idempotency key
	keysByAge []string              // the keys of byKey, oldest first
}

// memoryUser is a user with the hash of the password.
type memoryUser struct {
	User
	password string
}

// newMemory returns an empty store.
func newMemory() *memory {
	return &memory{wake: make(chan struct{}, 1), byKey: make(map[string]memoryUser)}
}

// createUser implements userStore.
func (m *memory) createUser(ctx context.Context, actor string, in userInput, key string) (
	User, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forgetKeys()
	if _, used := m.byKey[key]; used {
		return User{}, errKeyUsed
	}
	m.lastID++
	now := nowAfter(timestamp{})
	u := User{ID: m.lastID, Name: *in.name, Surname: *in.surname, Version: 1,
		CreatedAt: now, UpdatedAt: now}
	m.users = append(m.users, memoryUser{u, *in.password})
	if key != "" {
		m.byKey[key] = memoryUser{u, *in.password}
		m.keysByAge = append(m.keysByAge, key)
	}
	m.record(ctx, actor, userCreated, u)
	return u, nil
}

// creationUnder implements userStore.
func (m *memory) creationUnder(_ context.Context, key string) (User, string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forgetKeys()
	u, ok := m.byKey[key]
	if !ok {
		return User{}, "", errNotFound
	}
	return u.User, u.password, nil
}

// forgetKeys drops expired keys. The caller holds the lock.
func (m *memory) forgetKeys() {
	for len(m.keysByAge) > 0 && time.Since(m.byKey[m.keysByAge[0]].CreatedAt.Time) >= keyLifetime {
		delete(m.byKey, m.keysByAge[0])
		m.keysByAge = m.keysByAge[1:]
	}
}

// getUser implements userStore.
func (m *memory) getUser(_ context.Context, id int64) (User, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	i, err := m.find(id, nil)
	if err != nil {
		return User{}, err
	}
	return m.users[i].User, nil
}

// passwordHash implements userStore.
func (m *memory) passwordHash(_ context.Context, id int64) (string, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	i, err := m.find(id, nil)
	if err != nil {
		return "", err
	}
	return m.users[i].password, nil
}

// rehashPassword implements userStore.
func (m *memory) rehashPassword(_ context.Context, id int64, old, hash string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if i, err := m.find(id, nil); err == nil && m.users[i].password == old {
		m.users[i].password = hash
	}
	return nil
}

// listUsers implements userStore. The users are sorted by id, so that a page is a slice of them.
func (m *memory) listUsers(_ context.Context, _, prefix string, after, offset, limit int64) (
	[]User, int64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if prefix != "" {
		users, total := m.findUsers(foldCase(prefix), after, offset, limit)
		return users, total, nil
	}
	first, found := m.search(after)
	if found {
		first++
	}
	first = min(first+int(offset), len(m.users))
	last := min(first+int(limit), len(m.users))
	users := make([]User, 0, last-first)
	for _, u := range m.users[first:last] {
		users = append(users, u.User)
	}
	return users, int64(len(m.users)), nil
}

// findUsers lists the users whose names begin with a folded prefix. It looks at every user, unlike
// postgres. The caller holds the lock.
func (m *memory) findUsers(prefix string, after, offset, limit int64) (users []User, total int64) {
	users = []User{}
	for _, u := range m.users {
		if !strings.HasPrefix(foldCase(u.Name), prefix) &&
			!strings.HasPrefix(foldCase(u.Surname), prefix) {
			continue
		}
		total++
		if u.ID <= after || int64(len(users)) == limit {
			continue
		}
		if offset--; offset < 0 {
			users = append(users, u.User)
		}
	}
	return users, min(total, maxMatches+1)
}

// foldCase maps each character to one that stands for all characters which Unicode's simple case
// folding considers equal, and İ to i. user_service_fold in schema.sql does the same. Accents
// count: neither removes them, composes characters or decomposes them.
func foldCase(text string) string {
	return strings.Map(func(r rune) rune {
		lowest := r
		for next := unicode.SimpleFold(r); next != r; next = unicode.SimpleFold(next) {
			lowest = min(lowest, next)
		}
		return unicode.ToLower(lowest)
	}, text)
}

// updateUser implements userStore.
func (m *memory) updateUser(ctx context.Context, actor string, id int64, in userInput,
	match []int64) (User, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	i, err := m.find(id, match)
	if err != nil {
		return User{}, err
	}
	u := m.users[i]
	if in.name != nil {
		u.Name = *in.name
	}
	if in.surname != nil {
		u.Surname = *in.surname
	}
	if in.password != nil {
		u.password = *in.password
	}
	if u == m.users[i] {
		return u.User, nil
	}
	u.Version++
	u.UpdatedAt = nowAfter(u.UpdatedAt)
	m.users[i] = u
	m.record(ctx, actor, userUpdated, u.User)
	return u.User, nil
}

// deleteUser implements userStore.
func (m *memory) deleteUser(ctx context.Context, actor string, id int64, match []int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	i, err := m.find(id, match)
	if err != nil {
		return err
	}
	u := m.users[i].User
	m.users = slices.Delete(m.users, i, i+1)
	u.Version++
	u.UpdatedAt = nowAfter(u.UpdatedAt)
	m.record(ctx, actor, userDeleted, u)
	return nil
}

// find returns the index of a user whose version is in match. The caller holds the lock.
func (m *memory) find(id int64, match []int64) (int, error) {
	i, found := m.search(id)
	if !found {
		return 0, errNotFound
	}
	if match != nil && !slices.Contains(match, m.users[i].Version) {
		return 0, errVersionMismatch
	}
	return i, nil
}

// search returns the index of a user, or where the user would be. The caller holds the lock.
func (m *memory) search(id int64) (int, bool) {
	return slices.BinarySearchFunc(m.users, id, func(u memoryUser, id int64) int {
		return cmp.Compare(u.ID, id)
	})
}

// record adds the event of the change that led to u. The caller holds the lock.
func (m *memory) record(ctx context.Context, actor, eventType string, u User) {
	t := traceOf(ctx)
	m.events = append(m.events, event{
		ID:         newUUIDv7(),
		Type:       eventType,
		Data:       eventData{UserID: u.ID, Version: u.Version},
		TraceID:    t.id,
		OccurredAt: u.UpdatedAt,

		actor: actor, traceParent: t.parent, traceState: t.state,
	})
	wake(m.wake)
}

func (m *memory) ready() state { return stateMemory }

func (m *memory) watch(context.Context) {}

func (m *memory) close() {}

func (m *memory) maintain(context.Context) {}

func (m *memory) writeMetrics(io.Writer) {}

// size implements outbox.
func (m *memory) size(context.Context) (int64, time.Duration, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if len(m.events) == 0 {
		return 0, 0, nil
	}
	return int64(len(m.events)), time.Since(m.events[0].OccurredAt.Time), nil
}

func (m *memory) changed() <-chan struct{} { return m.wake }

func (m *memory) resign(context.Context) error { return nil }

// next implements outbox. It always leads: there is no other replica.
func (m *memory) next(_ context.Context, done, skip []event, limit int, _ bool) (
	events []event, leads bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	removed, skipped := make(map[string]bool, len(done)), make(map[int64]bool, len(skip))
	for _, e := range done {
		removed[e.ID] = true
	}
	for _, e := range skip {
		skipped[e.Data.UserID] = true
	}
	m.events = slices.DeleteFunc(m.events, func(e event) bool { return removed[e.ID] })
	for _, e := range m.events {
		if len(events) < limit && !skipped[e.Data.UserID] {
			events = append(events, e)
		}
	}
	return events, true, nil
}

// inProcess is the broker of a service without RabbitMQ. It passes events directly to the handler.
// Those that the handler cannot read are logged and count as published.
type inProcess struct {
	handler messageHandler
	log     *slog.Logger
}

func (b inProcess) publisher(context.Context) (publisher, error) { return b, nil }

// publish calls the handler in the caller's goroutine. On an error, no event counts as published.
func (b inProcess) publish(ctx context.Context, events []event) (int, error) {
	messages := make([]message, len(events))
	for i, e := range events {
		body, _ := json.Marshal(e) // without a body it is unreadable
		messages[i] = message{body, e.actor}
	}
	unreadable, err := b.handler.handle(ctx, messages)
	if err != nil {
		return 0, err
	}
	for _, i := range unreadable {
		err = cmp.Or(err, logSetAside(ctx, b.log, events[i], errUnreadable))
	}
	if len(unreadable) > 0 {
		err = cmp.Or(err, flushLog(b.log))
	}
	if err != nil {
		return 0, err
	}
	return len(events), nil
}

// consume only waits: publish passes the events on.
func (b inProcess) consume(ctx context.Context, onReady func(), _ messageHandler) error {
	onReady()
	<-ctx.Done()
	return nil
}

func (b inProcess) closed() bool { return false }

func (b inProcess) close() {}

func (b inProcess) state() state { return stateInProcess }
