package main

// This file owns the way to PostgreSQL: connections, the application of schema.sql, how a statement
// runs, and what its errors mean.

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
	"github.com/jackc/pgx/v5/pgxpool"
)

//go:embed schema.sql
var schema string

// poolConfig returns the configuration of a URL, with defaults for what it leaves out. It sets only
// the start-up parameters that every pooler accepts.
func poolConfig(databaseURL, appName string) (*pgxpool.Config, error) {
	config, err := pgxpool.ParseConfig(databaseURL)
	if err != nil {
		return nil, err
	}
	if !strings.Contains(databaseURL, "pool_max_conns=") {
		config.MaxConns = defaultPoolSize
	}
	config.MaxConns = min(max(config.MaxConns, minPoolSize), maxPoolSize)
	config.PingTimeout = time.Second

	c := config.ConnConfig
	preferPlain(&c.Config)
	timeout := connectBudget
	if hosts := countHosts(&c.Config); hosts > 1 {
		timeout = min(timeout, allHostsBudget/time.Duration(hosts))
		if c.ValidateConnect == nil { // only one of several hosts accepts writes
			c.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
		}
	}
	if c.ConnectTimeout == 0 || c.ConnectTimeout > timeout { // 0 means no timeout
		c.ConnectTimeout = timeout
	}
	maps.DeleteFunc(c.RuntimeParams, func(name, _ string) bool {
		return strings.EqualFold(name, "client_encoding") || strings.EqualFold(name, "datestyle")
	})
	defaults := map[string]string{"application_name": appName, "timezone": "UTC",
		"standard_conforming_strings": "on", "client_encoding": "UTF8", "datestyle": "ISO"}
	maps.Copy(defaults, c.RuntimeParams)
	c.RuntimeParams = defaults
	c.BuildContextWatcherHandler = func(conn *pgconn.PgConn) ctxwatch.Handler {
		return &pgconn.CancelRequestContextWatcherHandler{Conn: conn, DeadlineDelay: cancelBudget}
	}
	c.OnNotice = noteUnsynced
	return config, nil
}

// preferPlain reverses sslmode=prefer, the default, for hosts on this machine: TLS protects nothing
// there and costs a tenth of a read. A server that requires TLS still gets it.
func preferPlain(c *pgconn.Config) {
	ip := net.ParseIP(c.Host)
	loopback := c.Host == "localhost" || ip.IsLoopback()
	if loopback && c.TLSConfig != nil && len(c.Fallbacks) == 1 && c.Fallbacks[0].TLSConfig == nil {
		c.TLSConfig, c.Fallbacks[0].TLSConfig = nil, c.TLSConfig
	}
}

// countHosts returns the number of different hosts of a URL. pgx lists each host once per TLS mode.
func countHosts(c *pgconn.Config) int {
	type address struct {
		host string
		port uint16
	}
	hosts := map[address]bool{{c.Host, c.Port}: true}
	for _, f := range c.Fallbacks {
		hosts[address{f.Host, f.Port}] = true
	}
	return len(hosts)
}

const unsynced = "unsynced"

// noteUnsynced marks a connection whose commit was cancelled while it waited for the synchronous
// standbys. The server reports that as a warning, and success.
func noteUnsynced(conn *pgconn.PgConn, notice *pgconn.Notice) {
	if notice.Routine == "SyncRepWaitForLSN" {
		conn.CustomData()[unsynced] = true
	}
}

// errReadOnly reports that the database takes no writes.
var errReadOnly = errors.New("the database takes no writes; it may be a standby")

// errSchema reports that the server refused a step of schema.sql.
var errSchema = errors.New("the schema cannot be applied")

// isTemporary reports whether a step of schema.sql may succeed later: after a conflict, a lock, a
// shutdown or a lack of resources, on another host, or on a new connection.
func isTemporary(code string) bool {
	switch code[:min(2, len(code))] {
	case "", "08", "25", "40", "53", "55", "57", "58":
		return true
	}
	return false
}

// openPostgres returns the store when the database answers and has the schema. It waits for
// databaseWait at most, and does not wait for what can never work. The caller closes the store.
func openPostgres(ctx context.Context, databaseURL, appName string,
	log *slog.Logger) (*postgres, error) {
	config, err := poolConfig(databaseURL, appName)
	if err != nil {
		return nil, err
	}
	denials, explicit, said := 0, false, databaseFailure{}
	var left []*pgconn.Notice
	var saidAt time.Time
	for deadline := time.Now().Add(databaseWait); ; sleep(ctx, databaseRetry) {
		explicit, left, err = prepareDatabase(ctx, config, deadline, log)
		if err == nil {
			break
		}
		failure := explainFailure(err)
		if failure.denied {
			denials++
		}
		refused := errors.Is(err, errSchema) && !isTemporary(sqlState(err))
		hopeless := refused || denials == maxDenials
		if hopeless || ctx.Err() != nil || time.Now().Add(databaseRetry).After(deadline) {
			return nil, fmt.Errorf("opening the database: %w", failure)
		}
		if failure != said || time.Since(saidAt) >= databaseReport {
			failure.warn(log, time.Until(deadline), failure != said)
			said, saidAt = failure, time.Now()
		}
	}
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	s := newPostgres(pool, explicit, log)
	s.left = left
	ctx, cancel := context.WithTimeout(ctx, startUpkeep)
	defer cancel()
	_ = errors.Join(s.fold(ctx), s.vacuum(ctx)) // maintain will try again
	return s, nil
}

// prepareDatabase brings the schema up to date on a connection of its own, and adapts config to the
// server. A pooler may give the session to another client after each transaction. So behind a
// pooler, config gets a mode without prepared statements, no session is changed, and explicit
// reports whether each transaction must set its isolation level. left is for finishSchema.
func prepareDatabase(ctx context.Context, config *pgxpool.Config, deadline time.Time,
	log *slog.Logger) (explicit bool, left []*pgconn.Notice, err error) {
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	c := config.ConnConfig.Copy()
	c.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) {
		switch n.Code {
		case "US100":
			log.Warn("Database repaired", "what", n.Message)
		case "US101":
			log.Info("Database schema updated", "what", n.Message)
		case "US102", "US103":
			left = append(left, n)
		}
	}
	conn, err := pgx.ConnectConfig(ctx, c)
	if err != nil {
		return false, nil, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeWait)
		defer cancel()
		_ = conn.Close(ctx)
	}()
	var pooled bool // a pooler reports the id of another process
	err = conn.QueryRow(ctx, `SELECT pg_backend_pid() <> $1::bigint,
		current_setting('default_transaction_isolation') <> 'read committed'`,
		pgx.QueryExecModeExec, int64(conn.PgConn().PID())).Scan(&pooled, &explicit)
	if err != nil {
		return false, nil, err
	}
	config.AfterConnect = nil
	if !pooled {
		config.AfterConnect, explicit = openSession, false
	}
	switch mode := &config.ConnConfig.DefaultQueryExecMode; *mode {
	case pgx.QueryExecModeCacheStatement, pgx.QueryExecModeDescribeExec:
		if pooled {
			*mode = pgx.QueryExecModeCacheDescribe
		}
	}
	if pooled && !strings.Contains(c.ConnString(), "pool_max_conns=") {
		config.MaxConns = minPoolSize
	}
	err = applySchema(ctx, conn)
	if refusal, ok := errors.AsType[*pgconn.PgError](err); ok && refusal.Hint != "" {
		err = fmt.Errorf("%w; %s", err, refusal.Hint)
	}
	return explicit, left, err
}

// openSession prepares a new connection. By default PostgreSQL plans WHERE id = ANY ($1) at every
// call. Here it keeps the plans, and a plan that was made for an empty outbox must suit a full one,
// hence no sequential scans: every statement but the total's has an index. JIT would compile that
// one for longer than it runs.
func openSession(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, connectBudget)
	defer cancel()
	_, err := conn.Exec(ctx, `SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off;
		SET jit = off; SET default_transaction_isolation = 'read committed';
		SET client_min_messages = warning`) // see noteUnsynced
	return err
}

// applySchema applies the steps of schema.sql, each in a transaction, and one replica at a time in
// this schema. The commits wait for a synchronous standby only if the schema is new, so that a
// replica can start while the standby is down.
func applySchema(ctx context.Context, conn *pgx.Conn) error {
	for _, step := range strings.Split(schema, "\n-- Step ")[1:] {
		options := pgx.TxOptions{IsoLevel: pgx.ReadCommitted}
		err := pgx.BeginTxFunc(ctx, conn, options, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, `
				SELECT
					set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true),
					set_config('client_min_messages', 'notice', true),
					set_config('statement_timeout', '0', true),
					set_config('lock_timeout', '0', true);
				SELECT pg_advisory_xact_lock(hashtext('user-service'), hashtext(current_schema()));
				SELECT set_config('lock_timeout', '200ms', true);
				SELECT set_config('synchronous_commit', 'local', true)
				WHERE to_regprocedure('user_service_schema()') IS NOT NULL`)
			if err != nil {
				return fmt.Errorf("locking the schema: %w", err)
			}
			number, _, _ := strings.Cut(step, ":")
			if _, err := tx.Exec(ctx, "-- "+step); err != nil {
				return fmt.Errorf("%w: step %s: %w", errSchema, number, err)
			}
			return nil
		})
		switch {
		case sqlState(err) == "US002":
			return nil
		case err != nil:
			return err
		}
	}
	return nil
}

// close closes the connections, and waits for closeWait at most: a frozen database does not answer.
func (s *postgres) close() {
	start(func(context.Context) { s.pool.Close() })(closeWait)
}

// resetPool replaces the connections, because new ones may reach the new primary after a failover.
// It does so once per resetInterval at most, so that failing requests do not make connection after
// connection.
func (s *postgres) resetPool() {
	now, last := time.Now().UnixNano(), s.reset.Load()
	if now-last > int64(resetInterval) && s.reset.CompareAndSwap(last, now) {
		s.pool.Reset()
	}
}

// querier is a connection or a transaction.
type querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
	SendBatch(ctx context.Context, batch *pgx.Batch) pgx.BatchResults
}

// statement makes one round trip.
type statement func(ctx context.Context, db querier) error

// kind says how do runs a statement.
type kind struct {
	idempotent bool // may be sent again although its outcome is unknown
	lane       lane // limits how many run at the same time
}

// do runs f on a connection; what names f in errors. It repeats f only if a change cannot be made
// twice: after a refusal by the server, nothing was changed; after a lost connection, only an
// idempotent statement is repeated, or one that was never sent.
//
// The deadline is that of ctx, as of a batch, or statementBudget from now. A caller who leaves ends
// the wait for a connection, but never a statement in progress: cancelling it would close the
// connection. The error wraps one of the sentinels of userStore if one applies.
func (s *postgres) do(ctx context.Context, what string, k kind, f statement) error {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(statementBudget)
	}
	budget, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	defer cancel()
	wait, stop := context.WithDeadline(ctx, deadline)
	err := k.lane.enter(wait)
	stop()
	if err != nil {
		return fmt.Errorf("%s: waiting: %w", what, waitError(err))
	}
	defer k.lane.leave()
	for retries := 0; ; retries++ {
		err, again := s.try(budget, k, f)
		if err == nil {
			return nil
		}
		limit := maxRetries
		if isStale(err) { // as every connection of the pool may be
			limit = maxPoolSize
		}
		if !again || retries >= limit || budget.Err() != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
}

// waitError returns errUnavailable for a wait that ended with its deadline, and err if the caller
// left.
func waitError(err error) error {
	if errors.Is(err, context.Canceled) {
		return err
	}
	return errUnavailable
}

// try runs f once. again reports whether do may run f again after the error.
func (s *postgres) try(ctx context.Context, k kind, f statement) (err error, again bool) {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", errUnavailable, err), false
	}
	defer conn.Release()
	notes := conn.Conn().PgConn().CustomData()
	delete(notes, unsynced)
	if s.explicit {
		options := pgx.TxOptions{IsoLevel: pgx.ReadCommitted}
		err = pgx.BeginTxFunc(ctx, conn, options, func(tx pgx.Tx) error { return f(ctx, tx) })
	} else {
		err = f(ctx, conn)
	}
	switch {
	case err == nil && notes[unsynced] != nil && !k.idempotent:
		return fmt.Errorf("%w: the commit did not wait for the standby", errOutcomeUnknown), false
	case err == nil:
		return nil, false
	}
	if sqlState(err) == alteredType { // every later statement of the session would fail
		_ = conn.Conn().Close(ctx)
	}
	lost := conn.Conn().IsClosed()
	// After a failover, new connections may reach the new primary.
	if lost || sqlState(err) == "25006" {
		s.resetPool()
	}
	harmless := k.idempotent || changedNothing(err, lost)
	return sentinel(err, lost, harmless), harmless && (lost || isPassing(err))
}

// changedNothing reports whether the server refused the statement, or never received it.
func changedNothing(err error, lost bool) bool {
	code := sqlState(err)
	return code != "" && !lost || code == alteredType || pgconn.SafeToRetry(err)
}

// isPassing reports whether the next attempt may succeed: after a conflict, or a cancel request
// that was meant for an earlier statement.
func isPassing(err error) bool {
	return isConflict(err) || isStale(err) || sqlState(err) == "57014"
}

// isConflict reports whether err is a serialization failure or a deadlock.
func isConflict(err error) bool {
	code := sqlState(err)
	return code == "40001" || code == "40P01"
}

// isStale reports whether a prepared statement has become invalid, because a table was altered or a
// pooler changed the session. The next attempt prepares it again.
func isStale(err error) bool {
	code := sqlState(err)
	return code == "0A000" || code == "26000" || code == "42P05" || code == alteredType
}

// alteredType is the SQLSTATE of a trigger whose session still knows an earlier type of a column.
const alteredType = "42804"

// isTimeout reports whether a statement was cancelled, or waited too long for a lock.
func isTimeout(err error) bool {
	code := sqlState(err)
	return code == "57014" || code == "55P03"
}

// sqlState returns "" if err did not come from the server.
func sqlState(err error) string {
	if refusal, ok := errors.AsType[*pgconn.PgError](err); ok {
		return refusal.Code
	}
	return ""
}

// isSiteRule reports whether row security or a function of the site refused a change, with any
// SQLSTATE. The service never makes a function of schema.sql raise.
func isSiteRule(err error) bool {
	refusal, ok := errors.AsType[*pgconn.PgError](err)
	return ok && slices.Contains([]string{"exec_stmt_raise", "exec_stmt_assert",
		"ExecWithCheckOptions"}, refusal.Routine)
}

// sentinel wraps err in the sentinel of userStore that applies, by its SQLSTATE. lost means that
// the connection is closed; harmless, that nothing was changed, or that the statement is
// idempotent.
func sentinel(err error, lost, harmless bool) error {
	code := sqlState(err)
	class := code[:min(2, len(code))]
	switch {
	case err == nil:
		return nil
	case errors.Is(err, pgx.ErrNoRows):
		return errNotFound
	case !harmless:
		return fmt.Errorf("%w: %w", errOutcomeUnknown, err)
	case lost, errors.Is(err, context.DeadlineExceeded), isConflict(err), isTimeout(err),
		class == "53",   // no resources
		code == "25006": // read-only
		return fmt.Errorf("%w: %w", errUnavailable, err)
	case code == "22021", code == "22P02", code == "22P05", code == "22003":
		return fmt.Errorf("%w: %w", errInvalidValue, err)
	case code == "23503":
		return fmt.Errorf("%w: %w", errReferenced, err)
	case class == "23", // a constraint
		code == "P0001", code == "22001", code == "44000", // RAISE, a length, a view's check
		code == "2200H", // no id is left
		isSiteRule(err):
		return fmt.Errorf("%w: %w", errRefused, err)
	}
	return err
}
