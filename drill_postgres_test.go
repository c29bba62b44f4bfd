package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// failOver kills a primary whose standby is 0.3 s behind, and promotes the standby.
func failOver(r *trial) {
	time.Sleep(2 * time.Second)
	r.pair.toPrimary.swallow(fromServer, true)
	time.Sleep(300 * time.Millisecond)
	r.takeOver()
}

// failOverBehind does the same after the standby received nothing for so long that clients were
// told that the outcome is unknown, and their changes became visible on the primary.
func failOverBehind(r *trial) {
	rounds := 1
	if *wholeDrill {
		rounds = 3
	}
	stop := inBackground(r.t, r.keepCreating, r.keepCreating)
	for round := range rounds {
		if round > 0 {
			r.pair.toPrimary.swallow(fromServer, false)
		}
		time.Sleep(2 * time.Second)
		r.pair.toPrimary.swallow(fromServer, true)
		time.Sleep(5 * time.Second)
		r.cancelWaits()
		time.Sleep(time.Second)
		r.checkPublished()
	}
	r.takeOver()
	stop()
	r.finally(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if !slices.ContainsFunc(r.attempts, func(a attempt) bool {
			return a.outcome == outcomeUnknown && a.done.Before(r.over)
		}) {
			r.t.Error("no change waited for the standby until its client was told so")
		}
	})
}

// keepCreating creates users. Where the outcome is unknown it asks again, under the same key.
func (r *trial) keepCreating(ctx context.Context) {
	for ; ctx.Err() == nil; sleep(ctx, 50*time.Millisecond) {
		r.create()
	}
}

// takeOver cuts the standby off, kills the primary, and promotes the standby.
func (r *trial) takeOver() {
	r.t.Helper()
	r.pair.toPrimary.cut(true)
	r.pair.primary.kill(r.t)
	time.Sleep(500 * time.Millisecond)
	r.pair.promote(r.t)
	r.over = time.Now()
}

// checkPublished expects a standby that is silent to have the change of each event so far.
func (r *trial) checkPublished() {
	r.t.Helper()
	type published struct{ highest, deletion int64 }
	events := make(map[int64]published)
	r.ledger.mu.Lock()
	for id, h := range r.ledger.users {
		events[id] = published{h.highest, h.deletion}
	}
	r.ledger.mu.Unlock()
	conn, err := pgx.Connect(r.t.Context(), r.pair.standby.url("postgres", "drill"))
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close(r.t.Context())
	// A deleted user has the version 0.
	rows, _ := conn.Query(r.t.Context(), `SELECT id, version FROM users
		UNION ALL SELECT user_id, 0 FROM outbox WHERE event_type = 'user.deleted'`)
	has := make(map[int64]int64)
	var id, version int64
	if _, err := pgx.ForEachRow(rows, []any{&id, &version}, func() error {
		has[id] = version
		return nil
	}); err != nil {
		r.t.Fatal(err)
	}
	ahead := 0
	for id, e := range events {
		version, found := has[id] // not found: deleted, and its event is out
		deleted := !found || version == 0
		replicated := found && (deleted || version >= e.highest)
		if e.deletion > 0 {
			replicated = deleted
		}
		if !replicated {
			ahead++
		}
	}
	if ahead > 0 {
		r.t.Errorf("%d users have an event whose change the standby does not have", ahead)
	}
}

// cancelWaits cancels the commits that wait for the standby, as an administrator might do. The
// server reports such a commit as a success, with a warning.
func (r *trial) cancelWaits() {
	r.t.Helper()
	r.exec("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
}

// silenceStandby stops what the standby receives for a while. Commits wait for it.
func silenceStandby(r *trial) {
	u := r.create()
	if u == nil {
		r.t.Fatal("a user could not be created before the fault")
	}
	stop := inBackground(r.t, r.keepCreating, r.keepCreating)
	time.Sleep(time.Second)
	r.pair.toPrimary.swallow(fromServer, true)
	silent := time.Now()
	ready := make(map[int]int) // by status
	for i := 0; time.Since(silent) < 8*time.Second; i++ {
		url := r.at(i % r.replicas).url
		r.expectAnswer(url+fmt.Sprint("/users/", u.id), http.StatusOK)
		r.expectAnswer(url+"/healthz", http.StatusOK)
		ready[r.expectAnswer(url+"/readyz", http.StatusOK, http.StatusServiceUnavailable)]++
		if i%20 == 19 {
			r.cancelWaits()
		}
		time.Sleep(100 * time.Millisecond)
	}
	r.checkPublished()
	r.over = time.Now()
	r.pair.toPrimary.swallow(fromServer, false)
	stop()
	r.finally(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		refused := 0
		for _, a := range r.attempts {
			if a.begun.Before(silent) || a.done.After(r.over) {
				continue
			}
			refused++
			if a.outcome == outcomeOK {
				what := "a change"
				if a.change.Version == 1 {
					what = "a creation"
				}
				r.problems[what+" was acknowledged that the standby did not have"]++
			}
		}
		r.t.Logf("%d changes were refused while the standby was silent; statuses of /readyz: %v",
			refused, ready)
		if refused == 0 {
			r.t.Error("no change was refused while the standby was silent")
		}
	})
}

// expectAnswer expects one of some statuses within a second, and returns the status.
func (r *trial) expectAnswer(url string, statuses ...int) int {
	begin := time.Now()
	client := &http.Client{Transport: r.client.Transport, Timeout: 5 * time.Second}
	response, err := client.Get(url)
	if err != nil {
		r.problem("no answer: %v", err)
		return 0
	}
	response.Body.Close()
	path := response.Request.URL.Path
	if took := time.Since(begin); took > r.limit(time.Second) {
		r.problem("an answer of %s took more than a second", path)
		r.t.Logf("GET %s: %d after %v", path, response.StatusCode, took)
	}
	r.problemIf(!slices.Contains(statuses, response.StatusCode),
		"GET %s: %d", path, response.StatusCode)
	return response.StatusCode
}

// switchOver stops the primary as an administrator does: it ends when the standby has all.
func switchOver(r *trial) {
	time.Sleep(2 * time.Second)
	begin := time.Now()
	r.pair.primary.end(syscall.SIGINT)
	took := time.Since(begin)
	r.t.Logf("the primary stopped in %v", took.Round(time.Millisecond))
	if took > 9*time.Second {
		r.t.Error("the primary did not stop by itself")
	}
	r.pair.promote(r.t)
	r.over = time.Now()
}

// disturbPooled kills the leader, restarts PgBouncer, and ends the connections behind it. When that
// is over, no event comes twice, and one replica leads.
func disturbPooled(r *trial) {
	const faults = 3
	slot := r.leader()
	killed := time.Now()
	r.at(slot).cmd.Process.Kill()
	r.eventsFlow(killed, 5*time.Second)
	time.Sleep(5 * time.Second)
	r.startReplica(slot)

	r.bouncer.end(syscall.SIGKILL)
	time.Sleep(500 * time.Millisecond)
	if err := r.bouncer.start(); err != nil {
		r.t.Fatal(err)
	}
	r.answersCome(time.Now(), 2*time.Second)
	time.Sleep(3 * time.Second)

	r.exec(othersConnections)
	r.over = time.Now()
	r.answersCome(r.over, 2*time.Second)
	r.eventsFlow(r.over, 5*time.Second)
	time.Sleep(5 * time.Second)
	quiet := time.Now()
	for time.Since(quiet) < 3*time.Second {
		if n := r.leaders(); n != 1 {
			r.problem("%d replicas lead in a time of quiet", n)
		}
		time.Sleep(200 * time.Millisecond)
	}
	r.finally(func() {
		for _, p := range r.started { // each while PgBouncer and PostgreSQL were there
			said := p.important.String()
			if i := strings.Index(said, "Waiting for the database"); i >= 0 {
				r.t.Errorf("a replica waited at its start: %.300s", said[i:])
			}
		}
		r.ledger.mu.Lock()
		defer r.ledger.mu.Unlock()
		late := 0
		for _, at := range r.ledger.repeated {
			if at.After(quiet) {
				late++
			}
		}
		if late > 0 {
			r.t.Errorf("%d events came again without a fault", late)
		}
		// A fault repeats at most what was in the outbox.
		most := faults * int(r.largest.Load())
		if n := len(r.ledger.repeated); n > most {
			r.t.Errorf("%d events came again; the faults explain at most %d", n, most)
		}
	})
}

// answersCome expects a 2xx soon after a time.
func (r *trial) answersCome(after time.Time, within time.Duration) {
	r.finally(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		first := never
		for _, a := range r.attempts {
			if a.outcome == outcomeOK && a.done.After(after) {
				first = min(first, a.done.Sub(after))
			}
		}
		if first > r.limit(within) {
			r.t.Errorf("the first 2xx came %v after the fault", first)
		}
	})
}

// startPrevious has the replicas start as the previous release.
func startPrevious(r *trial) { r.program = r.buildPrevious(r.t) }

// updateAndBack replaces the replicas one at a time by the present build, and back.
func updateAndBack(r *trial) {
	for _, program := range []string{"", r.buildPrevious(r.t)} {
		r.program = program
		for slot := range r.replicas {
			r.terminate(slot)
			r.startReplica(slot)
			time.Sleep(1500 * time.Millisecond)
		}
	}
}

// importSlowly inserts users in a transaction that stays open, while the API creates others.
func importSlowly(r *trial) {
	stop := inBackground(r.t, r.keepCreating, r.keepCreating, r.keepCreating)
	r.exec(`BEGIN;
		INSERT INTO users (name, surname, password)
		SELECT 'imported ' || n, 'Doe', '' FROM generate_series(1, 2000) AS n;
		SELECT pg_sleep(10);
		COMMIT`)
	stop()
}

// writeBeside writes to the table with SQL while the API does, as a role that has rights on that
// table only, and an empty search_path.
func writeBeside(r *trial) {
	duration := 6 * time.Second
	if *wholeDrill {
		duration = 20 * time.Second
	}
	r.exec("GRANT SELECT, INSERT, UPDATE, DELETE ON users TO writer")
	db, err := pgxpool.New(r.t.Context(),
		r.databaseURL("writer", r.db.Config().ConnConfig.Database)+"?pool_max_conns=12")
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(db.Close)
	w := &writer{trial: r, db: db}
	stop := inBackground(r.t, w.again(w.insertOne), w.again(w.insertMany), w.again(w.copyIn),
		w.again(w.updateMany), w.again(w.updateMany), w.again(w.deleteMany), w.again(w.upsert),
		w.again(w.rollBack), w.again(w.keepOpen), w.createByAPI)
	time.Sleep(duration)
	stop()
}

// writer changes users with SQL and tells the ledger what it committed.
type writer struct {
	*trial
	db *pgxpool.Pool
}

// errUndone makes a writer roll its transaction back.
var errUndone = errors.New("rolled back on purpose")

// writing is a transaction of a writer, with the changes that it made.
type writing struct {
	pgx.Tx
	changes []eventData // of a deletion without version
}

// again returns a function that runs one transaction after another. A deadlock is no failure: it
// changed nothing.
func (w *writer) again(write func(context.Context, *writing) error) func(context.Context) {
	return func(ctx context.Context) {
		for ; ctx.Err() == nil; sleep(ctx, 20*time.Millisecond) {
			// The end of the scenario does not cancel it, because its outcome has to be known.
			work, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
			tx, err := w.db.Begin(work)
			if err == nil {
				t := &writing{Tx: tx}
				if err = write(work, t); err == nil {
					err = w.commit(work, t)
				}
				tx.Rollback(work)
			}
			cancel()
			refusal, ok := errors.AsType[*pgconn.PgError](err)
			deadlock := ok && refusal.Code == "40P01"
			if err != nil && !deadlock && !errors.Is(err, errUndone) {
				w.problem("a writer failed: %v", err)
			}
		}
	}
}

func (w *writer) commit(ctx context.Context, t *writing) error {
	err := t.Commit(ctx)
	if err == nil {
		w.ledger.mu.Lock()
		defer w.ledger.mu.Unlock()
		w.ledger.written = append(w.ledger.written, t.changes...)
		for _, change := range t.changes {
			if change.Version == 0 {
				w.ledger.removed[change.UserID] = true
			}
		}
	}
	return err
}

// do runs a statement that returns the id and the version of each user it changed.
func (t *writing) do(ctx context.Context, sql string, args ...any) ([]int64, error) {
	var ids []int64
	var change eventData
	rows, _ := t.Query(ctx, sql, args...)
	_, err := pgx.ForEachRow(rows, []any{&change.UserID, &change.Version}, func() error {
		ids = append(ids, change.UserID)
		t.changes = append(t.changes, change)
		return nil
	})
	return ids, err
}

const insertWritten = `INSERT INTO public.users (name, surname, password)
	SELECT $1 || '.' || n, 'Doe', '' FROM generate_series(1, $2::int) AS n RETURNING id, version`

func (w *writer) name() string { return "written " + w.newName() }

func (w *writer) insertOne(ctx context.Context, t *writing) error {
	_, err := t.do(ctx, `INSERT INTO public.users (name, surname, password)
		VALUES ($1, 'Doe', '') RETURNING id, version`, w.name())
	return err
}

func (w *writer) insertMany(ctx context.Context, t *writing) error {
	_, err := t.do(ctx, insertWritten, w.name(), 20)
	return err
}

func (w *writer) copyIn(ctx context.Context, t *writing) error {
	defer sleep(ctx, 100*time.Millisecond)
	_, err := t.CopyFrom(ctx, pgx.Identifier{"public", "users"},
		[]string{"name", "surname", "password"},
		pgx.CopyFromSlice(50, func(int) ([]any, error) { return []any{w.name(), "Doe", ""}, nil }))
	return err
}

// updateMany changes users of all kinds, those of the clients too.
func (w *writer) updateMany(ctx context.Context, t *writing) error {
	_, err := t.do(ctx, `UPDATE public.users SET surname = $1 WHERE id IN (
			SELECT id FROM public.users WHERE id % 11 = $2 ORDER BY id LIMIT 50 FOR UPDATE)
		RETURNING id, version`, w.newName(), rand.N(11))
	return err
}

func (w *writer) deleteMany(ctx context.Context, t *writing) error {
	defer sleep(ctx, 50*time.Millisecond)
	_, err := t.do(ctx, `DELETE FROM public.users WHERE id IN (
			SELECT id FROM public.users WHERE name LIKE 'written %' ORDER BY id LIMIT 10 FOR UPDATE)
		RETURNING id, 0`)
	return err
}

// upsert inserts users and inserts them again. Two of its statements change nothing.
func (w *writer) upsert(ctx context.Context, t *writing) error {
	ids, err := t.do(ctx, insertWritten, w.name(), 2)
	if err != nil {
		return err
	}
	for _, surname := range []string{"'Doe'", "'Roe'", "'Roe'"} {
		_, err = t.do(ctx, `INSERT INTO public.users (id, name, surname, password)
			SELECT id, name, surname, password FROM public.users WHERE id = ANY ($1)
			ON CONFLICT (id) DO UPDATE SET surname = `+surname+` RETURNING id, version`, ids)
		if err != nil {
			return err
		}
	}
	return nil
}

// rollBack undoes changes, by a savepoint and sometimes by the whole transaction. They must not
// have events.
func (w *writer) rollBack(ctx context.Context, t *writing) error {
	undone, err := t.Begin(ctx)
	if err != nil {
		return err
	}
	_, err = undone.Exec(ctx, insertWritten, w.name(), 10)
	if err == nil {
		_, err = undone.Exec(ctx, `UPDATE public.users SET surname = $1 WHERE id IN (
			SELECT id FROM public.users WHERE id % 10 = $2 ORDER BY id LIMIT 10 FOR UPDATE)`,
			w.newName(), rand.N(10))
	}
	if err == nil {
		_, err = undone.Exec(ctx, `DELETE FROM public.users WHERE id IN (
			SELECT id FROM public.users WHERE name LIKE 'written %'
			ORDER BY id LIMIT 5 FOR UPDATE)`)
	}
	if err == nil {
		err = undone.Rollback(ctx)
	}
	if err != nil {
		return err
	}
	if rand.N(2) == 0 {
		return errUndone
	}
	return w.insertOne(ctx, t)
}

// keepOpen changes users several times in one transaction, and commits a second or two later.
func (w *writer) keepOpen(ctx context.Context, t *writing) error {
	ids, err := t.do(ctx, insertWritten, w.name(), 5)
	if err != nil {
		return err
	}
	shared, err := t.do(ctx, `UPDATE public.users SET surname = $1 WHERE id IN (
			SELECT id FROM public.users WHERE name NOT LIKE 'written %' AND id % 10 = $2
			ORDER BY id LIMIT 2 FOR UPDATE)
		RETURNING id, version`, w.newName(), rand.N(10))
	for range 3 {
		if err == nil {
			_, err = t.do(ctx, `UPDATE public.users SET surname = $1 WHERE id = ANY ($2)
				RETURNING id, version`, w.newName(), append(ids, shared...))
		}
	}
	if err == nil {
		_, err = t.do(ctx, "DELETE FROM public.users WHERE id = $1 RETURNING id, 0", ids[0])
	}
	sleep(ctx, time.Second+rand.N(time.Second))
	return err
}

// createByAPI creates users, changes them, and deletes every second one.
func (w *writer) createByAPI(ctx context.Context) {
	for i := 0; ctx.Err() == nil; i++ {
		if u := w.create(); u != nil {
			w.update(u)
			if i%2 == 0 {
				w.remove(u)
			}
		}
		sleep(ctx, 100*time.Millisecond)
	}
}
