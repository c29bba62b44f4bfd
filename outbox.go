package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// relayLock is the key of the advisory lock of the replica that relays.
const relayLock = 7_301_951_002

const vacuumAfter = 20_000 // events

func (s *postgres) size(ctx context.Context) (pending int64, oldest time.Duration, err error) {
	err = s.read(ctx, "counting events", func(ctx context.Context, conn *pgxpool.Conn) error {
		return conn.QueryRow(ctx, `
			SELECT count(*), coalesce(clock_timestamp() - min(occurred_at), '0') FROM outbox`,
		).Scan(&pending, &oldest)
	})
	return pending, oldest, err
}

func (s *postgres) changed() <-chan struct{} { return s.poke }

// postgresBacklog has a connection of its own, not one of the pool's: a lock of the session
// holds the lead.
type postgresBacklog struct {
	conn    *pgx.Conn
	removed int       // since the last vacuum
	swept   time.Time // when idempotency keys were last looked through
}

func (s *postgres) open(ctx context.Context) (backlog, error) {
	config := s.pool.Config().ConnConfig
	// Whatever the URL says: a frozen replica loses the lead, and a lost DELETE only means
	// a message sent twice.
	config.RuntimeParams["idle_session_timeout"] = "15s"
	config.RuntimeParams["synchronous_commit"] = "off"
	config.RuntimeParams["tcp_keepalives_idle"] = "5"
	config.RuntimeParams["tcp_keepalives_interval"] = "2"
	config.RuntimeParams["tcp_keepalives_count"] = "3"
	conn, err := pgx.ConnectConfig(ctx, config)
	return &postgresBacklog{conn: conn}, err
}

// lead fails where the database is read-only: events could be published there, again and
// again, but not removed.
func (b *postgresBacklog) lead(ctx context.Context) (leads bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, statementBudget)
	defer cancel()
	var readOnly bool
	err = b.conn.QueryRow(ctx, `SELECT pg_try_advisory_lock($1),
		current_setting('transaction_read_only')::bool`, relayLock).Scan(&leads, &readOnly)
	if err == nil && readOnly {
		err = errors.New("the database is read-only")
	}
	return leads, err
}

func (b *postgresBacklog) pending(ctx context.Context, limit int) ([]event, error) {
	ctx, cancel := context.WithTimeout(ctx, statementBudget)
	defer cancel()
	b.sweep(ctx)
	rows, _ := b.conn.Query(ctx, `
		SELECT id, event_id, event_type, user_id, version, trace_id, occurred_at
		FROM outbox ORDER BY id LIMIT $1`, limit)
	events, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (e event, err error) {
		return e, row.Scan(&e.outboxID, &e.ID, &e.Type, &e.Data.UserID, &e.Data.Version,
			&e.TraceID, &e.OccurredAt.Time)
	})
	if err != nil {
		return nil, fmt.Errorf("selecting events: %w", err)
	}
	return events, nil
}

// sweep does what one replica should do now and then, and the one that leads is one:
// delete old idempotency keys, and vacuum the outbox, because each reading passes over the
// rows that died, and autovacuum looks only once a minute. It may fail: there is a next time.
func (b *postgresBacklog) sweep(ctx context.Context) {
	if time.Since(b.swept) >= time.Hour {
		b.swept = time.Now()
		_, _ = b.conn.Exec(ctx,
			"DELETE FROM idempotency_keys WHERE created_at <= now() - $1::interval", keyLifetime)
	}
	if b.removed >= vacuumAfter {
		b.removed = 0
		_, _ = b.conn.Exec(ctx, "VACUUM (TRUNCATE off) outbox")
	}
}

func (b *postgresBacklog) remove(ctx context.Context, events []event) error {
	ctx, cancel := context.WithTimeout(ctx, statementBudget)
	defer cancel()
	ids := make([]int64, len(events))
	for i, e := range events {
		ids[i] = e.outboxID
	}
	if _, err := b.conn.Exec(ctx, "DELETE FROM outbox WHERE id = ANY ($1)", ids); err != nil {
		return fmt.Errorf("deleting events: %w", err)
	}
	b.removed += len(events)
	return nil
}

// close gives the lead back.
func (b *postgresBacklog) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = b.conn.Close(ctx)
}
