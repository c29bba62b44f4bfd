package main

// This file owns the statements for users.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// postgres is the store in PostgreSQL, and its outbox. Its statements say what to change; version,
// updated_at, event and total follow from the triggers of schema.sql.
type postgres struct {
	pool     *pgxpool.Pool
	explicit bool // each transaction sets its isolation level
	log      *slog.Logger
	holder   string // identifies this replica in relay_lease
	wake     chan struct{}
	state    atomic.Value     // of the database, a state
	left     []*pgconn.Notice // what schema.sql leaves to finishSchema
	reset    atomic.Int64     // when resetPool last replaced the connections, in ns since 1970

	read, list, write, create, lockedWrite, relay, probe kind

	reads              *Group[int64, User] // by id
	updates, deletions changer
	changing           *queues[int64]  // by id of the changed user
	listing            *queues[string] // by client
}

// newPostgres divides the connections that requests share. One is reserved for reads, so that lists
// and writes cannot delay them. Of the others, creations and changes of locked users get a third
// each, so that they cannot delay changes of free users. Clients take turns with lists.
func newPostgres(pool *pgxpool.Pool, explicit bool, log *slog.Logger) *postgres {
	shared := int(pool.Config().MaxConns) - reservedConns
	requests, writes := slots(shared), slots(shared-1)
	s := &postgres{
		pool: pool, explicit: explicit, log: log, holder: newUUIDv4(), wake: make(chan struct{}, 1),
		read:        kind{true, lane{requests}},
		list:        kind{true, lane{slots(shared - 1), requests}},
		write:       kind{false, lane{writes, requests}},
		create:      kind{false, lane{slots(shared / 3), writes, requests}},
		lockedWrite: kind{false, lane{slots(shared / 3), writes, requests}},
		relay:       kind{true, nil},
		probe:       kind{true, lane{slots(1)}},
		changing:    newQueues[int64](1, math.MaxInt),
		listing:     newQueues[string](shared-1, math.MaxInt),
	}
	s.state.Store(stateUp)
	s.reads = &Group[int64, User]{run: s.selectUsers, budget: statementBudget}
	s.updates, s.deletions = s.newChanger(updateUsers), s.newChanger(deleteUsers)
	return s
}

// userColumns are the columns of a User. A time outside the range of JSON, which only a row from
// before the CHECK of schema.sql can have, becomes the nearest one inside.
const userColumns = `id, name, surname, version,
	least(greatest(created_at, '0001-01-01 00:00Z'), '9999-12-31 23:59:59.999999Z') AS created_at,
	least(greatest(updated_at, '0001-01-01 00:00Z'), '9999-12-31 23:59:59.999999Z') AS updated_at`

// scanInto returns the destinations of userColumns.
func (u *User) scanInto() []any {
	return []any{&u.ID, &u.Name, &u.Surname, &u.Version, &u.CreatedAt.Time, &u.UpdatedAt.Time}
}

// row runs a statement that returns at most one row, and scans it into dest. It fails as do, and
// with errNotFound if there is no row.
func (s *postgres) row(ctx context.Context, what string, k kind, dest []any,
	sql string, args ...any) error {
	return s.do(ctx, what, k, func(ctx context.Context, db querier) error {
		return db.QueryRow(ctx, sql, args...).Scan(dest...)
	})
}

// exec runs a statement that returns nothing. It fails as do.
func (s *postgres) exec(ctx context.Context, what string, k kind, sql string, args ...any) error {
	return s.do(ctx, what, k, func(ctx context.Context, db querier) error {
		_, err := db.Exec(ctx, sql, args...)
		return err
	})
}

// createUser tries again in two cases of a duplicate: if the sequence of ids is behind, because
// somebody inserted users with explicit ids, and if the idempotency key has expired.
func (s *postgres) createUser(ctx context.Context, actor string, in userInput, key string) (
	User, error) {
	for retries := 0; ; retries++ {
		u, err := s.insertUser(ctx, actor, in, key)
		refusal, ok := errors.AsType[*pgconn.PgError](err)
		if !ok || refusal.Code != "23505" {
			return u, err
		}
		var cleared bool
		var clearErr error
		if refusal.TableName == "idempotency_keys" {
			err = errKeyUsed
			clearErr = s.row(ctx, "deleting an expired key", s.create, []any{&cleared}, `
				WITH old AS (
					DELETE FROM idempotency_keys
					WHERE key = $1 AND created_at <= now() - make_interval(secs => $2)
					RETURNING key
				)
				SELECT EXISTS (SELECT FROM old)`, key, keyLifetime.Seconds())
		} else {
			clearErr = s.row(ctx, "moving the sequence", s.create, []any{&cleared}, `
				SELECT count(setval(sequence::regclass, highest)) > 0
				FROM pg_get_serial_sequence('users', 'id') AS sequence,
					(SELECT max(id) AS highest FROM users WHERE id < 9223372036854775807) AS users,
					nextval(sequence::regclass) AS next
				WHERE highest >= next`)
		}
		if clearErr != nil || !cleared || retries == maxRetries {
			return User{}, cmp.Or(clearErr, err)
		}
	}
}

// insertUser creates a user, and remembers it under key unless that is "". A duplicate is an error
// with SQLSTATE 23505.
func (s *postgres) insertUser(ctx context.Context, actor string, in userInput, key string) (
	User, error) {
	defer wake(s.wake)
	var u User
	// If another transaction is inserting the same key, this one waits for it.
	err := s.row(ctx, "inserting a user", s.create, u.scanInto(), `
		WITH created AS (
			INSERT INTO users (name, surname, password)
			SELECT $1, $2, $3 FROM set_config('user_service.origin', $4, true)
			RETURNING `+userColumns+`
		), kept AS (
			INSERT INTO idempotency_keys (key, user_id, name, surname, password)
			SELECT $5, id, name, surname, $3 FROM created WHERE $5 <> ''
		)
		SELECT * FROM created`,
		in.name, in.surname, in.password, origin(ctx, actor), key)
	if errors.Is(err, errNotFound) {
		err = fmt.Errorf("inserting a user: a trigger prevents it: %w", errRefused)
	}
	return u, err
}

// creationUnder locks the row, so that its commit waits for the synchronous standbys: a creation
// may be visible before they have it.
func (s *postgres) creationUnder(ctx context.Context, key string) (User, string, error) {
	var u User
	var password string
	err := s.row(ctx, "selecting a creation", s.create, append(u.scanInto(), &password), `
		SELECT user_id, name, surname, 1, created_at, created_at, password
		FROM idempotency_keys
		WHERE key = $1 AND created_at > now() - make_interval(secs => $2)
		FOR NO KEY UPDATE`, key, keyLifetime.Seconds())
	return u, password, err
}

// getUser shares a statement with concurrent calls.
func (s *postgres) getUser(ctx context.Context, id int64) (User, error) {
	u, ok, err := s.reads.Do(ctx, id)
	if err == nil && !ok {
		err = errNotFound
	}
	return u, err
}

// selectUsers returns the users with ids, by id.
func (s *postgres) selectUsers(ctx context.Context, ids []int64) (users map[int64]User, err error) {
	err = s.do(ctx, "selecting users", s.read, func(ctx context.Context, db querier) error {
		users, err = collectUsers(db.Query(ctx, `
			SELECT `+userColumns+` FROM users WHERE id = ANY ($1)`, ids))
		return err
	})
	return users, err
}

// collectUsers returns the users of a result, by id. It takes what Query returns.
func collectUsers(rows pgx.Rows, _ error) (map[int64]User, error) { // rows has the error too
	users := make(map[int64]User)
	var u User
	_, err := pgx.ForEachRow(rows, u.scanInto(), func() error {
		users[u.ID] = u
		return nil
	})
	return users, err
}

// passwordHash reads the hash, which no other statement returns to a handler.
func (s *postgres) passwordHash(ctx context.Context, id int64) (hash string, err error) {
	err = s.row(ctx, "selecting a password", s.read, []any{&hash},
		"SELECT password FROM users WHERE id = $1", id)
	return hash, err
}

// rehashPassword sets user_service.rehash, which tells the triggers that the user does not change.
func (s *postgres) rehashPassword(ctx context.Context, id int64, old, hash string) error {
	return s.exec(ctx, "rehashing a password", s.lockedWrite, `
		UPDATE users SET password = $3 FROM set_config('user_service.rehash', 'on', true)
		WHERE id = $1 AND password = $2`, id, old, hash)
}

// listUsers implements userStore. For a prefix, see user_service_find.
func (s *postgres) listUsers(ctx context.Context, client, prefix string, after, offset,
	limit int64) ([]User, int64, error) {
	ctx, cancel := context.WithTimeout(ctx, statementBudget)
	defer cancel()
	leave, err := s.listing.enter(ctx, client)
	defer leave()
	if err != nil {
		return nil, 0, fmt.Errorf("waiting for other lists of the client: %w", waitError(err))
	}
	if prefix == "" {
		return s.page(ctx, "SELECT greatest(sum(n), 0)::bigint AS total FROM user_counts",
			"id > $1 ORDER BY id OFFSET $2 LIMIT $3", after, offset, limit)
	}
	last := strings.Repeat(string(unicode.MaxRune), maxNameLength)
	return s.page(ctx, "SELECT * FROM user_service_find($1, $2, $3, $4, $5)",
		"id = ANY ((SELECT ids FROM found)::bigint[])", prefix, last, after, offset, limit)
}

// page reads a total and the users of a page, in one statement, so that they agree.
func (s *postgres) page(ctx context.Context, total, condition string, args ...any) (
	users []User, count int64, err error) {
	err = s.do(ctx, "selecting a page", s.list, func(ctx context.Context, db querier) error {
		// The row with the total comes first: NULLs sort last.
		rows, _ := db.Query(ctx, `
			WITH found AS MATERIALIZED (`+total+`)
			SELECT total, 0 AS id, '' AS name, '' AS surname, 0 AS version, now() AS created_at,
				now() AS updated_at
			FROM found
			UNION ALL (SELECT NULL, `+userColumns+` FROM users WHERE `+condition+`)
			ORDER BY total, id`, args...)
		users = []User{}
		var first *int64
		var u User
		_, err := pgx.ForEachRow(rows, append([]any{&first}, u.scanInto()...), func() error {
			if first != nil {
				count = *first
			} else {
				users = append(users, u)
			}
			return nil
		})
		return err
	})
	return users, count, err
}

// updateUser implements userStore with a change that may share its statement.
func (s *postgres) updateUser(ctx context.Context, actor string, id int64, in userInput,
	match []int64) (User, error) {
	return s.change(ctx, s.updates, &userChange{id: id, name: in.name, surname: in.surname,
		password: in.password, match: match, origin: origin(ctx, actor)})
}

// deleteUser implements userStore with a change that may share its statement.
func (s *postgres) deleteUser(ctx context.Context, actor string, id int64, match []int64) error {
	_, err := s.change(ctx, s.deletions,
		&userChange{id: id, match: match, origin: origin(ctx, actor)})
	return err
}

// userChange is an update or a deletion of a user. nil fields stay unchanged; a nil match accepts
// any version.
type userChange struct {
	id                      int64
	name, surname, password *string
	match                   []int64
	origin                  string
}

// origin returns what the triggers of schema.sql store with the event of a change: the parts of a
// trace and the actor, none of which has a line feed.
func origin(ctx context.Context, actor string) string {
	t := traceOf(ctx)
	return t.id + "\n" + actor + "\n" + t.parent + "\n" + t.state
}

// These statements make changes of different users, and return the changed users. A user that is
// not returned is missing, has another version, or, with SKIP LOCKED, is locked by somebody else.
// Columns are qualified, because a site may add columns of any name to users.
const (
	changeUsers = `
		WITH change AS (
			SELECT * FROM unnest(
				set_config('user_service.ids', $1::bigint[]::text, true)::bigint[],
				set_config('user_service.origins', $2::text[]::text, true)::text[],
				$3::text[], $4::text[], $5::text[], $6::text[]
			) AS change (user_id, origin, match, new_name, new_surname, new_password)
		), free AS (
			SELECT change.*
			FROM change,
				LATERAL (SELECT FROM users WHERE users.id = change.user_id
					FOR UPDATE SKIP LOCKED) AS users
		)`
	updateUsers = changeUsers + `
		UPDATE users SET
			name = coalesce(free.new_name, users.name),
			surname = coalesce(free.new_surname, users.surname),
			password = coalesce(free.new_password, users.password)
		FROM free
		WHERE users.id = free.user_id
			AND (free.match IS NULL OR users.version = ANY (free.match::bigint[]))
		RETURNING ` + userColumns
	deleteUsers = changeUsers + `
		DELETE FROM users USING free
		WHERE users.id = free.user_id
			AND (free.match IS NULL OR users.version = ANY (free.match::bigint[]))
		RETURNING ` + userColumns
)

// changer makes changes of one kind. Changes share statements, but must not suffer from each other:
// one whose user is locked would delay the others, and one that PostgreSQL refuses would undo them.
// So a change is first tried together with others, by a statement that skips locked users. If that
// does not make it, it is tried alone, by a statement that waits for the lock. Both have at most
// one change per user, because a statement changes a row only once.
type changer struct {
	group   *Group[*userChange, User]
	waiting string // the statement that waits for locks
}

// newChanger returns a changer for one of the statements above.
func (s *postgres) newChanger(sql string) changer {
	return changer{
		waiting: strings.Replace(sql, "SKIP LOCKED", "", 1),
		group: &Group[*userChange, User]{
			budget: batchBudget,
			run: func(ctx context.Context, changes []*userChange) (map[*userChange]User, error) {
				done, err := s.changeBatch(ctx, sql, s.write, changes)
				if isRefused(ctx, err) {
					return nil, nil // each change is tried alone
				}
				return done, err
			},
		},
	}
}

// isRefused reports whether PostgreSQL refused a shared statement, or a limit of the site on
// statements or locks ended it. Then nothing was changed.
func isRefused(ctx context.Context, err error) bool {
	return isTimeout(err) && ctx.Err() == nil ||
		err != nil && !errors.Is(err, errUnavailable) && !errors.Is(err, errOutcomeUnknown)
}

// change makes c after all earlier changes of the same user by this replica. So a locked user
// occupies one connection, however many changes wait.
func (s *postgres) change(ctx context.Context, by changer, c *userChange) (User, error) {
	ctx, cancel := context.WithTimeout(ctx, statementBudget)
	defer cancel()
	deadline, _ := ctx.Deadline()
	leave, err := s.changing.enter(ctx, c.id)
	defer leave()
	if err != nil {
		return User{}, fmt.Errorf("waiting for another change of the user: %w", waitError(err))
	}
	defer wake(s.wake)
	if time.Until(deadline) > batchBudget { // else no time would remain after a slow batch
		u, done, err := by.group.Do(ctx, c)
		if errors.Is(err, context.DeadlineExceeded) { // the batch may still succeed
			err = fmt.Errorf("%w: %w", errOutcomeUnknown, err)
		}
		if done || err != nil {
			return u, err
		}
	}
	for range maxRetries {
		users, err := s.selectUsers(ctx, []int64{c.id})
		if err != nil {
			return User{}, err
		}
		u, exists := users[c.id]
		if !exists {
			return User{}, errNotFound
		}
		if c.match != nil && !slices.Contains(c.match, u.Version) {
			return User{}, errVersionMismatch
		}
		done, err := s.changeBatch(ctx, by.waiting, s.lockedWrite, []*userChange{c})
		if u, ok := done[c]; ok || err != nil {
			return u, err
		}
	}
	return User{}, fmt.Errorf("changing a user: a trigger prevents it: %w", errRefused)
}

// changeBatch runs one of the statements above, and returns the changed users.
func (s *postgres) changeBatch(ctx context.Context, sql string, k kind, changes []*userChange) (
	map[*userChange]User, error) {
	var ids []int64
	var origins []string
	var matches, names, surnames, passwords []*string
	for _, c := range changes {
		ids, origins = append(ids, c.id), append(origins, c.origin)
		matches, names = append(matches, matchLiteral(c.match)), append(names, c.name)
		surnames, passwords = append(surnames, c.surname), append(passwords, c.password)
	}
	var users map[int64]User
	err := s.do(ctx, "changing users", k, func(ctx context.Context, db querier) (err error) {
		users, err = collectUsers(db.Query(ctx, sql,
			ids, origins, matches, names, surnames, passwords))
		return err
	})
	done := make(map[*userChange]User, len(changes))
	for _, c := range changes {
		if u, ok := users[c.id]; ok {
			done[c] = u
		}
	}
	return done, err
}

// matchLiteral returns an array in PostgreSQL's syntax, or nil if any version matches.
func matchLiteral(versions []int64) *string {
	if versions == nil {
		return nil
	}
	literal := strings.NewReplacer("[", "{", " ", ",", "]", "}").Replace(fmt.Sprint(versions))
	return &literal
}
