package main

// This file owns the statements for events, for the relay's lease, and for what runs in the
// background: checks of the database and the maintenance of tables.

import (
	"context"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// outbox holds the events of committed changes until they are removed. An event in it is pending.
type outbox interface {
	// next removes the events in done, which were delivered or never can be. Then it returns up to
	// limit events, oldest first, and those of each user in the order of versions. It leaves out the
	// users of the events in skip. If renew is true, it takes or renews the lease of this process,
	// and leads reports whether it holds the lease. Only events of such a call may be published:
	// after it, no failover of the database can lose them.
	next(ctx context.Context, done, skip []event, limit int, renew bool) (events []event,
		leads bool, err error)
	// resign gives up the lease, so that another process can take it at once.
	resign(ctx context.Context) error
	// size returns the number of pending events, and the age of the oldest.
	size(ctx context.Context) (pending int64, oldest time.Duration, err error)
	// changed returns a channel that receives soon after this process has committed a change.
	changed() <-chan struct{}
}

// changed implements outbox. Changes by other writers do not wake it; the relay polls for them.
func (s *postgres) changed() <-chan struct{} { return s.wake }

// size reads a snapshot, so it does not see changes that are being committed.
func (s *postgres) size(ctx context.Context) (pending int64, oldest time.Duration, err error) {
	var seconds float64
	err = s.row(ctx, "counting events", s.probe, []any{&pending, &seconds}, `
		SELECT count(*),
			coalesce(extract(epoch FROM clock_timestamp() - min(occurred_at)), 0)::float8
		FROM outbox`)
	return pending, time.Duration(seconds * float64(time.Second)), err
}

// These statements work on the outbox and on the lease.
//
// Events are read in the order of outbox ids, which for each user is the order of versions. A time
// outside the range of JSON becomes the nearest one inside. After a failover that lost changes,
// other events may have the outbox ids of published ones, so an event is removed by both of its ids.
//
// A replica takes or renews the lease unless another one holds it. After a restore, relay_lease may
// have several rows. The leader holds all of them: one valid row of another holder is enough to
// stop it. A row that ends too far in the future is not valid: the clock of the database was set
// back. The commit waits for the synchronous standbys, whatever the session's settings are. So
// every event that was read before is on each standby that may become the primary.
const (
	removeEvents = `
		DELETE FROM outbox USING unnest($1::bigint[], $2::text[]) AS done (outbox_id, event_id)
		WHERE outbox.id = done.outbox_id AND outbox.event_id = done.event_id::uuid`
	selectEvents = `
		SELECT id, event_id::text, event_type, user_id, version, trace_id,
			least(greatest(occurred_at, '0001-01-01 00:00Z'), '9999-12-31 23:59:59.999999Z'),
			actor, traceparent, tracestate
		FROM outbox WHERE user_id <> ALL ($2::bigint[]) ORDER BY id LIMIT $1`
	takeLease = `
		WITH lease AS (
			SELECT $1::text AS holder, clock_timestamp() + length AS until, length
			FROM make_interval(secs => $2) AS length
		), first AS (
			INSERT INTO relay_lease (holder, until)
			SELECT holder, until FROM lease WHERE NOT EXISTS (SELECT FROM relay_lease)
			RETURNING holder
		), next AS (
			UPDATE relay_lease SET holder = lease.holder, until = lease.until FROM lease
			WHERE ctid = ANY (ARRAY(
					SELECT ctid FROM relay_lease
					WHERE holder = $1
						OR until NOT BETWEEN clock_timestamp() AND lease.until + lease.length
					FOR UPDATE SKIP LOCKED))
				AND NOT EXISTS (
					SELECT FROM relay_lease
					WHERE holder <> $1
						AND until BETWEEN clock_timestamp() AND lease.until + lease.length)
			RETURNING relay_lease.holder
		)
		SELECT EXISTS (SELECT FROM first) OR EXISTS (SELECT FROM next)
		FROM set_config('synchronous_commit', 'on', true) AS waits,
			set_config('client_min_messages', 'warning', true) AS warns`
)

// next implements outbox in one transaction. Its statements share a round trip.
func (s *postgres) next(ctx context.Context, done, skip []event, limit int, renew bool) (
	events []event, leads bool, err error) {
	ids, eventIDs := make([]int64, len(done)), make([]string, len(done))
	for i, e := range done {
		ids[i], eventIDs[i] = e.outboxID, e.ID
	}
	users := make([]int64, len(skip))
	for i, e := range skip {
		users[i] = e.Data.UserID
	}
	once := s.relay
	once.idempotent = false // a commit that did not wait for the standbys is a failure
	err = s.do(ctx, "selecting events", once, func(ctx context.Context, db querier) error {
		batch := &pgx.Batch{}
		if len(ids) > 0 {
			batch.Queue(removeEvents, ids, eventIDs)
		}
		batch.Queue(selectEvents, limit, users).Query(func(rows pgx.Rows) error {
			events, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (e event, err error) {
				return e, row.Scan(&e.outboxID, &e.ID, &e.Type, &e.Data.UserID, &e.Data.Version,
					&e.TraceID, &e.OccurredAt.Time, &e.actor, &e.traceParent, &e.traceState)
			})
			return err
		})
		if renew {
			batch.Queue(takeLease, s.holder, leaseTime.Seconds()).QueryRow(func(row pgx.Row) error {
				return row.Scan(&leads)
			})
		}
		return db.SendBatch(ctx, batch).Close()
	})
	return events, leads && err == nil, err
}

// resign ends the lease of this replica, if it holds it.
func (s *postgres) resign(ctx context.Context) error {
	return s.exec(ctx, "giving up the lease", s.relay,
		"UPDATE relay_lease SET until = '-infinity' WHERE holder = $1", s.holder)
}

// ready returns what watch saw last.
func (s *postgres) ready() state { return s.state.Load().(state) }

// watch checks until ctx ends whether the database can take a write, and logs when that changes.
func (s *postgres) watch(ctx context.Context) {
	for ; ctx.Err() == nil; sleep(ctx, readyInterval) {
		now, err := s.check(ctx)
		if last := s.ready(); now == last || ctx.Err() != nil {
			continue
		} else if now == stateUp {
			s.log.Info("Database connection restored")
		} else if last == stateUp {
			s.log.Warn("Database connection lost", "state", now, "error", err)
		}
		s.state.Store(now)
	}
}

// check asks the database for its state. err is the cause of stateDown.
func (s *postgres) check(ctx context.Context) (now state, err error) {
	ctx, cancel := context.WithTimeout(ctx, readyBudget)
	defer cancel()
	var readOnly bool
	err = s.row(ctx, "checking", kind{idempotent: true}, []any{&readOnly}, `
		SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::bool`)
	switch {
	case err != nil:
		return stateDown, err
	case readOnly:
		s.resetPool()
		return stateReadOnly, errReadOnly
	}
	return stateUp, nil
}

// maintain keeps the tables small until ctx ends. Every replica does so, with or without a broker;
// a task that one replica has done costs the next one little. It logs when a task starts to fail.
func (s *postgres) maintain(ctx context.Context) {
	failing := make(map[string]bool)
	attempt := func(task string, f func(context.Context) error) {
		err := f(ctx)
		if err != nil && !failing[task] && ctx.Err() == nil {
			s.log.Warn("Database maintenance failed", "task", task, "error", err)
		}
		failing[task] = err != nil
	}
	defer start(s.finishSchema)(closeWait)
	var swept, vacuumed time.Time
	for ctx.Err() == nil {
		attempt("folding the total", s.fold)
		if time.Since(vacuumed) > vacuumInterval {
			vacuumed = time.Now()
			attempt("vacuuming", s.vacuum)
		}
		if time.Since(swept) > keySweep {
			swept = time.Now()
			attempt("deleting idempotency keys", s.sweepKeys)
		}
		sleep(ctx, rand.N(2*upkeepInterval)) // #nosec G404 -- jitter, not a secret
	}
}

// fold replaces many rows of user_counts by their sum. It skips rows that another replica is
// folding. A snapshot contains either the many rows or the one.
func (s *postgres) fold(ctx context.Context) error {
	for folded := foldMost; folded == foldMost; {
		err := s.row(ctx, "folding", s.create, []any{&folded}, `
			WITH many AS (
				DELETE FROM user_counts WHERE ctid = ANY (ARRAY(
					SELECT ctid FROM user_counts
					WHERE $1 <= (SELECT count(*) FROM (SELECT FROM user_counts LIMIT $1) AS n)
						OR pg_relation_size('user_counts') > $3
					LIMIT $2 FOR UPDATE SKIP LOCKED))
				RETURNING n
			), one AS (
				INSERT INTO user_counts (n) SELECT sum(n) FROM many HAVING count(*) > 0
			)
			SELECT count(*) FROM many`, foldFrom, foldMost, foldBytes)
		if err != nil {
			return err
		}
	}
	return nil
}

// sweepKeys deletes expired idempotency keys, some pages of the table at a time.
func (s *postgres) sweepKeys(ctx context.Context) error {
	for page, pages := 0, 1; page < pages; page += keyPages {
		err := s.row(ctx, "deleting keys", s.create, []any{&pages}, `
			WITH old AS (
				DELETE FROM idempotency_keys
				WHERE ctid >= format('(%s,0)', $1::int)::tid
					AND ctid < format('(%s,0)', $2::int)::tid
					AND created_at <= now() - make_interval(secs => $3)
			)
			SELECT pg_relation_size('idempotency_keys') / current_setting('block_size')::int`,
			page, page+keyPages, keyLifetime.Seconds())
		if err != nil {
			return err
		}
	}
	return nil
}

// finishSchema builds the indexes that schema.sql leaves to it, without locking users. PostgreSQL
// waits for all older transactions, which may take hours.
func (s *postgres) finishSchema(ctx context.Context) {
	for len(s.left) > 0 && ctx.Err() == nil {
		next := s.left[0]
		name, _, _ := strings.Cut(next.Message, " ")
		if next.Code == "US103" {
			s.log.Warn("Predecessor's users not imported", "what", next.Message,
				"remedy", "run: user-service import --predecessor")
		} else if err := s.buildIndex(ctx, next.SchemaName, name, next.Message); err != nil {
			if ctx.Err() == nil {
				s.log.Warn("Building a search index failed", "index", name, "error", err)
			}
			sleep(ctx, indexPause)
			continue
		} else if ctx.Err() == nil {
			s.log.Info("Search index built", "index", name)
		}
		s.left = s.left[1:]
	}
}

// buildIndex returns when an index is valid, or ctx ends. Another replica may build it: two at once
// run into a deadlock, which PostgreSQL ends. buildIndex replaces what a failed attempt has left. It
// uses a connection of its own.
func (s *postgres) buildIndex(ctx context.Context, schema, name, definition string) error {
	config := s.pool.Config()
	conn, err := pgx.ConnectConfig(ctx, config.ConnConfig)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	if config.AfterConnect != nil { // else the session is a pooler's
		_, err = conn.Exec(ctx, "SET statement_timeout = 0; SET lock_timeout = 0")
	}
	name = pgx.Identifier{schema, name}.Sanitize()
	for ; err == nil; sleep(ctx, indexPause/60+rand.N(indexPause/60)) { // #nosec G404 -- jitter
		var valid, building bool
		err = conn.QueryRow(ctx, `
			SELECT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass($1) AND indisvalid),
				EXISTS (SELECT FROM pg_stat_progress_create_index WHERE relid = 'users'::regclass)`,
			pgx.QueryExecModeExec, name).Scan(&valid, &building)
		if valid {
			return nil
		}
		for _, sql := range []string{"DROP INDEX CONCURRENTLY IF EXISTS " + name,
			"CREATE INDEX CONCURRENTLY IF NOT EXISTS " + definition} {
			if err == nil && !building {
				_, err = conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol)
			}
		}
		if isConflict(err) {
			err = nil
		}
	}
	return err
}

// vacuum removes dead rows, which slow down reading the outbox and the total; autovacuum looks once
// a minute only. It runs outside a transaction, and skips a locked table.
func (s *postgres) vacuum(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, vacuumBudget)
	defer cancel()
	if err := s.read.lane.enter(ctx); err != nil {
		return err
	}
	defer s.read.lane.leave()
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	_, err = conn.Exec(ctx, "VACUUM (SKIP_LOCKED) outbox, user_counts")
	return err
}
