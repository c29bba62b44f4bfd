package main

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
	"github.com/jackc/pgx/v5/pgxpool"
)

//go:embed schema.sql
var schema string

const (
	databaseWait     = 60 * time.Second // at start, for a database that does not answer
	databaseRetry    = time.Second
	connectWait      = 2 * time.Second
	statementBudget  = 4 * time.Second // for a connection and an answer
	statementTimeout = "3500ms"        // on the server, so that it gives up first
	readyBudget      = 2 * time.Second
	closeWait        = 500 * time.Millisecond
	defaultPoolSize  = 8
	maxPoolSize      = 16 // and one for the relay: a replica may hold 20
	maxPages         = 4  // lists at the same time: a flood of them leaves connections to the rest
	maxRetries       = 2
)

// coalescing says how many calls may run alone, and how many batches: of reads one is best,
// but a change would wait for the commit of a stranger's. The benchmark does without.
var coalescing = struct{ readsAlone, reads, writesAlone, writes int }{4, 1, 3, 3}

// schemaLock is the key of the advisory lock of the replica that applies the schema.
const schemaLock = 7_301_951_001

// postgres is the store in PostgreSQL, and its outbox.
type postgres struct {
	pool *pgxpool.Pool
	poke chan struct{}

	reads              *Group[int64, User] // by id
	updates, deletions changer
	pages              chan struct{} // holds one token for each list under way
}

// parseDatabaseURL returns text without a driver suffix, such as postgresql+asyncpg.
func parseDatabaseURL(text string) (string, error) {
	scheme, rest, _ := strings.Cut(text, ":")
	scheme, _, _ = strings.Cut(scheme, "+")
	text = scheme + ":" + rest
	if err := checkURL(text, "postgres", "postgresql"); err != nil {
		return "", err
	}
	_, err := poolConfig(text, "")
	return text, err
}

// poolConfig is what the URL says, and our defaults for what it does not.
func poolConfig(databaseURL, appName string) (*pgxpool.Config, error) {
	config, err := pgxpool.ParseConfig(databaseURL)
	if err != nil {
		return nil, err
	}
	if !strings.Contains(databaseURL, "pool_max_conns=") {
		config.MaxConns = defaultPoolSize
	}
	config.MaxConns = min(config.MaxConns, maxPoolSize)
	preferPlain(&config.ConnConfig.Config)
	config.PingTimeout = time.Second
	if t := &config.ConnConfig.ConnectTimeout; *t == 0 || *t > connectWait { // 0 is without end
		*t = connectWait
	}
	for name, value := range map[string]string{
		"application_name":  appName,
		"statement_timeout": statementTimeout,
		"plan_cache_mode":   "force_generic_plan", // else a list is planned at each call
		"timezone":          "UTC",
	} {
		if _, ok := config.ConnConfig.RuntimeParams[name]; !ok {
			config.ConnConfig.RuntimeParams[name] = value
		}
	}
	return config, nil
}

// preferPlain turns around sslmode=prefer, the default, on this machine: there TLS keeps no
// secret from anybody, and costs a tenth of what a read does. A server that wants TLS gets it.
func preferPlain(c *pgconn.Config) {
	ip := net.ParseIP(c.Host)
	loopback := c.Host == "localhost" || ip.IsLoopback()
	if loopback && c.TLSConfig != nil && len(c.Fallbacks) == 1 && c.Fallbacks[0].TLSConfig == nil {
		c.TLSConfig, c.Fallbacks[0].TLSConfig = nil, c.TLSConfig
	}
}

// openPostgres waits until the database answers and has the schema, for a minute at most.
func openPostgres(ctx context.Context, databaseURL, appName string,
	log *slog.Logger) (*postgres, error) {
	config, err := poolConfig(databaseURL, appName)
	if err != nil {
		return nil, err
	}
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	s := &postgres{pool: pool, poke: make(chan struct{}, 1), pages: make(chan struct{}, maxPages)}
	s.reads = &Group[int64, User]{run: s.selectUsers, budget: statementBudget,
		alone: coalescing.readsAlone, limit: coalescing.reads}
	s.updates, s.deletions = s.newChanger(updateUsers), s.newChanger(deleteUsers)
	for deadline := time.Now().Add(databaseWait); ; sleep(ctx, databaseRetry) {
		if err := s.applySchema(ctx, deadline); err == nil {
			return s, nil
		} else if ctx.Err() != nil || time.Now().Add(databaseRetry).After(deadline) {
			pool.Close()
			return nil, fmt.Errorf("opening the database: %w", err)
		} else {
			log.Warn("Waiting for the database", "error", err)
		}
	}
}

func (s *postgres) applySchema(ctx context.Context, deadline time.Time) error {
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	connect, cancel := context.WithTimeout(ctx, statementBudget)
	defer cancel()
	conn, err := s.pool.Acquire(connect)
	if err != nil {
		return err
	}
	defer conn.Release()
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		// Another replica's schema, and ours on a large table, may take longer.
		if _, err := tx.Exec(ctx, "SET LOCAL statement_timeout = 0"); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1)", schemaLock); err != nil {
			return fmt.Errorf("locking the schema: %w", err)
		}
		_, err := tx.Exec(ctx, schema)
		return err
	})
}

// close does not wait for long: a database that is frozen says no goodbye.
func (s *postgres) close() {
	start(func(context.Context) { s.pool.Close() })(closeWait)
}

// ready says whether the database can take a write: "up", or "read-only" or "down".
func (s *postgres) ready(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readyBudget)
	defer cancel()
	var readOnly bool
	err := s.pool.QueryRow(ctx, `SELECT pg_is_in_recovery()
		OR current_setting('transaction_read_only')::bool`).Scan(&readOnly)
	switch {
	case err != nil:
		return "down"
	case readOnly:
		s.pool.Reset() // new connections may reach the new primary
		return "read-only"
	}
	return "up"
}

const userColumns = "id, name, surname, version, created_at, updated_at"

func (u *User) scanInto() []any {
	return []any{&u.ID, &u.Name, &u.Surname, &u.Version, &u.CreatedAt.Time, &u.UpdatedAt.Time}
}

func (s *postgres) createUser(ctx context.Context, in userInput, key string) (User, error) {
	var u User
	err := s.write(ctx, "inserting a user", func(ctx context.Context, conn *pgxpool.Conn) error {
		// A key waits here for a transaction that is just using it, and then claims nothing.
		return conn.QueryRow(ctx, `
			WITH claimed AS (
				INSERT INTO idempotency_keys AS k (key, user_id, name, surname, password)
				SELECT $6::text, nextval('users_id_seq'), $1, $2, $3 WHERE $6 <> ''
				ON CONFLICT (key) DO UPDATE SET user_id = excluded.user_id, name = excluded.name,
					surname = excluded.surname, password = excluded.password, created_at = now()
				WHERE k.created_at <= now() - $7::interval
				RETURNING user_id
			), created AS (
				INSERT INTO users (id, name, surname, password)
				SELECT coalesce((SELECT user_id FROM claimed), nextval('users_id_seq')), $1, $2, $3
				WHERE $6 = '' OR EXISTS (SELECT FROM claimed)
				RETURNING `+userColumns+`
			), event AS (
				INSERT INTO outbox (event_id, event_type, user_id, version, trace_id, occurred_at)
				SELECT $4, 'user.created', id, version, $5, updated_at FROM created
			)
			SELECT `+userColumns+` FROM created`,
			in.name, in.surname, in.password, newUUIDv7(), traceID(ctx), key, keyLifetime,
		).Scan(u.scanInto()...)
	})
	if errors.Is(err, errNotFound) {
		err = errKeyUsed
	}
	return u, err
}

func (s *postgres) creationUnder(ctx context.Context, key string) (User, string, error) {
	var u User
	var password string
	err := s.read(ctx, "selecting a creation", func(ctx context.Context, conn *pgxpool.Conn) error {
		return conn.QueryRow(ctx, `
			SELECT user_id, name, surname, 1, created_at, created_at, password
			FROM idempotency_keys
			WHERE key = $1 AND created_at > now() - $2::interval`, key, keyLifetime,
		).Scan(append(u.scanInto(), &password)...)
	})
	return u, password, err
}

// getUser shares its statement with the calls that come while another one runs: what a
// read costs is the statement, hardly the row.
func (s *postgres) getUser(ctx context.Context, id int64) (User, error) {
	u, ok, err := s.reads.Do(ctx, id)
	if err == nil && !ok {
		err = errNotFound
	}
	return u, err
}

func (s *postgres) selectUsers(ctx context.Context, ids []int64) (map[int64]User, error) {
	users := make(map[int64]User, len(ids))
	err := s.read(ctx, "selecting users", func(ctx context.Context, conn *pgxpool.Conn) error {
		var u User
		// An error of Query is one of its rows too.
		rows, _ := conn.Query(ctx, `SELECT `+userColumns+` FROM users WHERE id = ANY ($1)`, ids)
		_, err := pgx.ForEachRow(rows, u.scanInto(), func() error {
			users[u.ID] = u
			return nil
		})
		return err
	})
	return users, err
}

func (s *postgres) passwordHash(ctx context.Context, id int64) (hash string, err error) {
	err = s.read(ctx, "selecting a password", func(ctx context.Context, conn *pgxpool.Conn) error {
		return conn.QueryRow(ctx, "SELECT password FROM users WHERE id = $1", id).Scan(&hash)
	})
	return hash, err
}

func (s *postgres) rehashPassword(ctx context.Context, id int64, old, hash string) error {
	return s.write(ctx, "rehashing a password", func(ctx context.Context, conn *pgxpool.Conn) error {
		_, err := conn.Exec(ctx,
			"UPDATE users SET password = $3 WHERE id = $1 AND password = $2", id, old, hash)
		return err
	})
}

func (s *postgres) listUsers(ctx context.Context, after, offset, limit int64) ([]User, int64, error) {
	budget, cancel := context.WithTimeout(context.WithoutCancel(ctx), statementBudget)
	defer cancel()
	select {
	case s.pages <- struct{}{}:
		defer func() { <-s.pages }()
	case <-budget.Done():
		return nil, 0, fmt.Errorf("waiting to select a page of users: %w", errUnavailable)
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
	var users []User
	err := s.read(budget, "selecting a page of users", func(ctx context.Context, conn *pgxpool.Conn) error {
		// One statement sees one state. Its first row is the total, as the version of a
		// user of id 0.
		rows, _ := conn.Query(ctx, `
			SELECT 0 AS id, '' AS name, '' AS surname, sum(n)::bigint AS version,
				now() AS created_at, now() AS updated_at
			FROM user_counts
			UNION ALL (
				SELECT `+userColumns+` FROM users WHERE id > $1 ORDER BY id LIMIT $3 OFFSET $2
			)
			ORDER BY id`, after, offset, limit)
		var err error
		users, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (u User, err error) {
			return u, row.Scan(u.scanInto()...)
		})
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	return users[1:], users[0].Version, nil
}

func (s *postgres) updateUser(ctx context.Context, id int64, in userInput, match []int64) (User, error) {
	u, _, err := s.change(ctx, s.updates, userChange{
		ID: id, Name: in.name, Surname: in.surname, Password: in.password, Match: match,
	})
	return u, err
}

func (s *postgres) deleteUser(ctx context.Context, id int64, match []int64) error {
	_, deleted, err := s.change(ctx, s.deletions, userChange{ID: id, Match: match})
	if err == nil && !deleted {
		err = errVersionMismatch
	}
	return err
}

// userChange is a change of a user, and what its event has to say.
type userChange struct {
	ID       int64   `json:"user_id"`
	Name     *string `json:"new_name"`
	Surname  *string `json:"new_surname"`
	Password *string `json:"new_password"`
	Match    []int64 `json:"match"`
	EventID  string  `json:"event_id"`
	TraceID  string  `json:"trace_id"`
}

// changed is the user after its change, or, not done, as it is. Without an id it is a user
// that does not exist.
type changed struct {
	user User
	done bool
}

// The statements take the changes of different users, and lock each user before anything
// else: what is compared is what is changed. The lock waits, or, for several, passes over
// a user that somebody else is changing.
const (
	changedUsers = `
		WITH change AS (
			SELECT * FROM json_to_recordset($1) AS change (user_id bigint, new_name text,
				new_surname text, new_password text, match bigint[], event_id uuid, trace_id text)
		), current AS (
			SELECT *, match IS NULL OR version = ANY (match) AS matches
			FROM change, LATERAL (SELECT * FROM users WHERE id = user_id FOR UPDATE /* of several */) users
		), `
	updateUsers = changedUsers + `
		changed AS (
			UPDATE users SET
				name = coalesce(new_name, c.name),
				surname = coalesce(new_surname, c.surname),
				password = coalesce(new_password, c.password),
				version = c.version + 1,
				updated_at = greatest(clock_timestamp(), c.updated_at + interval '1 microsecond')
			FROM current c
			WHERE users.id = c.id AND matches
				AND (new_password IS NOT NULL OR new_name <> c.name OR new_surname <> c.surname)
			RETURNING users.*, event_id, trace_id
		), event AS (
			INSERT INTO outbox (event_id, event_type, user_id, version, trace_id, occurred_at)
			SELECT event_id, 'user.updated', id, version, trace_id, updated_at FROM changed
		)
		SELECT ` + userColumns + `, true FROM changed
		UNION ALL
		SELECT ` + userColumns + `, false FROM current WHERE id NOT IN (SELECT id FROM changed)`
	deleteUsers = changedUsers + `
		changed AS (
			DELETE FROM users USING current c WHERE users.id = c.id AND matches RETURNING c.*
		), event AS (
			INSERT INTO outbox (event_id, event_type, user_id, version, trace_id, occurred_at)
			SELECT event_id, 'user.deleted', id, version + 1, trace_id,
				greatest(clock_timestamp(), updated_at + interval '1 microsecond')
			FROM changed
		)
		SELECT ` + userColumns + `, true FROM changed
		UNION ALL
		SELECT ` + userColumns + `, false FROM current WHERE NOT matches`
)

// changer makes changes of one kind.
type changer struct {
	sql   string
	group *Group[*userChange, changed]
}

func (s *postgres) newChanger(sql string) changer {
	return changer{sql, &Group[*userChange, changed]{
		run: s.changeTogether(sql), budget: statementBudget,
		alone: coalescing.writesAlone, limit: coalescing.writes,
	}}
}

// change makes c together with the changes that came while others were made. It says
// whether the user is another one now.
func (s *postgres) change(ctx context.Context, by changer, c userChange) (User, bool, error) {
	deadline := time.Now().Add(statementBudget)
	c.EventID, c.TraceID = newUUIDv7(), traceID(ctx)
	result, ok, err := by.group.Do(ctx, &c)
	if err == nil && !ok {
		ctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
		defer cancel()
		result, err = s.changeOne(ctx, by.sql, &c)
	}
	switch {
	case err != nil:
	case result.user.ID == 0:
		err = errNotFound
	case !result.done && c.Match != nil && !slices.Contains(c.Match, result.user.Version):
		err = errVersionMismatch
	}
	return result.user, result.done, err
}

// changeTogether makes changes in one transaction. It leaves out what has to be made alone:
// the second change of a user, that of a user who is locked or missing, and all of them
// where PostgreSQL refused one.
func (s *postgres) changeTogether(sql string) func(context.Context, []*userChange) (
	map[*userChange]changed, error) {
	together := strings.Replace(sql, "/* of several */", "SKIP LOCKED", 1)
	return func(ctx context.Context, changes []*userChange) (map[*userChange]changed, error) {
		results := make(map[*userChange]changed, len(changes))
		if len(changes) == 1 {
			result, err := s.changeOne(ctx, sql, changes[0])
			results[changes[0]] = result
			return results, err
		}
		firsts := make(map[int64]*userChange, len(changes))
		for _, c := range changes {
			if firsts[c.ID] == nil {
				firsts[c.ID] = c
			}
		}
		all, err := s.changeUsers(ctx, together, slices.Collect(maps.Values(firsts)))
		for _, result := range all {
			results[firsts[result.user.ID]] = result
		}
		if err != nil && !errors.Is(err, errUnavailable) && !errors.Is(err, errOutcomeUnknown) {
			return nil, nil
		}
		return results, err
	}
}

func (s *postgres) changeOne(ctx context.Context, sql string, c *userChange) (changed, error) {
	all, err := s.changeUsers(ctx, sql, []*userChange{c})
	if err != nil || len(all) == 0 {
		return changed{}, err
	}
	return all[0], nil
}

func (s *postgres) changeUsers(ctx context.Context, sql string, changes []*userChange) (
	all []changed, err error) {
	err = s.write(ctx, "changing users", func(ctx context.Context, conn *pgxpool.Conn) error {
		rows, _ := conn.Query(ctx, sql, changes)
		all, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (c changed, err error) {
			return c, row.Scan(append(c.user.scanInto(), &c.done)...)
		})
		return err
	})
	return all, err
}

// statement does one round trip.
type statement func(ctx context.Context, conn *pgxpool.Conn) error

// read runs f, which changes nothing. What says in an error what f was about.
func (s *postgres) read(ctx context.Context, what string, f statement) error {
	return s.do(ctx, what, f, true)
}

// write runs f once at most, and then tells the relay that there may be an event.
func (s *postgres) write(ctx context.Context, what string, f statement) error {
	defer poke(s.poke)
	return s.do(ctx, what, f, false)
}

// do runs f, and again where that cannot change anything twice. The budget is that of ctx
// where it has one, as a batch has; a caller who leaves ends the wait for a connection, but
// never cuts a statement off, which would cost the connection.
func (s *postgres) do(ctx context.Context, what string, f statement, readOnly bool) error {
	budget, cancel := ctx, func() {}
	if _, ok := ctx.Deadline(); !ok {
		budget, cancel = context.WithTimeout(context.WithoutCancel(ctx), statementBudget)
	}
	defer cancel()
	for retries := 0; ; retries++ {
		conn, err := s.acquire(ctx, budget)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		err = f(budget, conn)
		lost := conn.Conn().IsClosed()
		conn.Release()
		if err == nil {
			return nil
		}
		if lost {
			s.pool.Reset() // the others are as old
		}
		harmless := readOnly || pgconn.SafeToRetry(err)
		again := lost && harmless || isConflict(err)
		if !again || retries == maxRetries || budget.Err() != nil {
			return fmt.Errorf("%s: %w", what, s.sentinel(err, lost, harmless))
		}
	}
}

// acquire waits for a connection until the budget ends or the caller of ctx leaves, then
// with its error.
func (s *postgres) acquire(ctx, budget context.Context) (*pgxpool.Conn, error) {
	wait := budget
	if ctx != budget {
		var cancel context.CancelFunc
		wait, cancel = context.WithCancel(budget)
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
	}
	conn, err := s.pool.Acquire(wait)
	if err != nil {
		if errors.Is(ctx.Err(), context.Canceled) {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("%w: %w", errUnavailable, err)
	}
	return conn, nil
}

// isConflict tells a serialization failure or a deadlock: nothing was changed.
func isConflict(err error) bool {
	code := sqlState(err)
	return code == "40001" || code == "40P01"
}

// sqlState is "" where err is not what the server said.
func sqlState(err error) string {
	if refusal, ok := errors.AsType[*pgconn.PgError](err); ok {
		return refusal.Code
	}
	return ""
}

// sentinel wraps err in what the handlers know. Of the server's words only the SQLSTATE
// counts.
func (s *postgres) sentinel(err error, lost, harmless bool) error {
	code := sqlState(err)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return errNotFound
	case lost && !harmless:
		return fmt.Errorf("%w: %w", errOutcomeUnknown, err)
	case lost, errors.Is(err, context.DeadlineExceeded),
		strings.HasPrefix(code, "53"),    // no resources
		code == "57014", code == "55P03", // timeouts of a statement and of a lock
		isConflict(err):
		return fmt.Errorf("%w: %w", errUnavailable, err)
	case code == "25006": // read-only: new connections may reach the new primary
		s.pool.Reset()
		return fmt.Errorf("%w: %w", errUnavailable, err)
	case code == "22021", code == "22P02", code == "22P05", code == "22003":
		return fmt.Errorf("%w: %w", errInvalidValue, err)
	}
	return err
}
