package main

// This file owns the statements for users.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// coalescing limits concurrent batches. One read batch at a time is fastest. Of writes there are two,
// so that one forms while the other commits; with three they are smaller, and slower together. The
// benchmark does without.
var coalescing = struct{ readsAlone, reads, writesAlone, writes int }{4, 1, 2, 2}

// postgres is the store in PostgreSQL, and its outbox. Its statements say what to change: version,
// updated_at, event and total follow from the triggers of schema.sql.
type postgres struct {
	pool     *pgxpool.Pool
	explicit bool // each transaction asks for its isolation level
	log      *slog.Logger
	holder   string // names this replica in relay_lease
	wake     chan struct{}

	// The kinds of statements. Of the connections that requests share, one is left to reads, whatever
	// becomes of lists and writes, and one to changes of free users, whatever becomes of creations and
	// of changes of locked users: those have a third each.
	read, list, write, create, lockedWrite, relay, probe kind

	reads              *Group[int64, User] // by id
	updates, deletions changer
	changing           queues[int64] // of the changes of each user
}

func newPostgres(pool *pgxpool.Pool, explicit bool, log *slog.Logger) *postgres {
	shared := int(pool.Config().MaxConns) - reservedConns
	requests, most, lists := make(slots, shared), make(slots, shared-1), make(slots, shared-1)
	s := &postgres{
		pool: pool, explicit: explicit, log: log, holder: newUUIDv4(), wake: make(chan struct{}, 1),
		read:        kind{true, []slots{requests}},
		list:        kind{true, []slots{lists, requests}},
		write:       kind{false, []slots{most, requests}},
		create:      kind{false, []slots{make(slots, shared/3), most, requests}},
		lockedWrite: kind{false, []slots{make(slots, shared/3), most, requests}},
		relay:       kind{true, nil},
		probe:       kind{true, []slots{make(slots, 1)}},
		changing:    queues[int64]{keys: make(map[int64]*queue)},
	}
	s.reads = &Group[int64, User]{run: s.selectUsers, budget: statementBudget,
		alone: coalescing.readsAlone, limit: coalescing.reads}
	s.updates, s.deletions = s.newChanger(updateUsers), s.newChanger(deleteUsers)
	return s
}

// userColumns are the columns of a User. A time that JSON cannot show, which only a row older than
// the CHECK of schema.sql can have, becomes the nearest that it can.
const userColumns = `id, name, surname, version,
	least(greatest(created_at, '0001-01-01 00:00Z'), '9999-12-31 23:59:59.999999Z') AS created_at,
	least(greatest(updated_at, '0001-01-01 00:00Z'), '9999-12-31 23:59:59.999999Z') AS updated_at`

func (u *User) scanInto() []any {
	return []any{&u.ID, &u.Name, &u.Surname, &u.Version, &u.CreatedAt.Time, &u.UpdatedAt.Time}
}

// createUser tries again where the sequence of the ids was behind, because somebody has inserted users
// with ids of their own, and where the key is one of more than keyLifetime ago.
func (s *postgres) createUser(ctx context.Context, in userInput, key string) (User, error) {
	for retries := 0; ; retries++ {
		u, err := s.insertUser(ctx, in, key)
		refusal, ok := errors.AsType[*pgconn.PgError](err)
		if !ok || refusal.Code != "23505" {
			return u, err
		}
		cleared, clearErr := false, error(nil)
		if refusal.TableName == "idempotency_keys" {
			err = errKeyUsed
			cleared, clearErr = s.succeeds(ctx, "deleting an old key", `
				WITH old AS (
					DELETE FROM idempotency_keys
					WHERE key = $1 AND created_at <= now() - make_interval(secs => $2)
					RETURNING key
				)
				SELECT EXISTS (SELECT FROM old)`, key, keyLifetime.Seconds())
		} else {
			cleared, clearErr = s.succeeds(ctx, "moving the sequence", `
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

// succeeds runs a statement that says whether it changed something.
func (s *postgres) succeeds(ctx context.Context, what, sql string, args ...any) (changed bool, err error) {
	err = s.do(ctx, what, s.create, func(ctx context.Context, db querier) error {
		return db.QueryRow(ctx, sql, args...).Scan(&changed)
	})
	return changed, err
}

func (s *postgres) insertUser(ctx context.Context, in userInput, key string) (User, error) {
	defer wake(s.wake)
	var u User
	err := s.do(ctx, "inserting a user", s.create, func(ctx context.Context, db querier) error {
		// A key waits here for a transaction that is just using it, and then is a duplicate.
		return db.QueryRow(ctx, `
			WITH created AS (
				INSERT INTO users (name, surname, password)
				SELECT $1, $2, $3 FROM set_config('user_service.trace_id', $4, true)
				RETURNING `+userColumns+`
			), kept AS (
				INSERT INTO idempotency_keys (key, user_id, name, surname, password)
				SELECT $5, id, name, surname, $3 FROM created WHERE $5 <> ''
			)
			SELECT * FROM created`,
			in.name, in.surname, in.password, traceID(ctx), key,
		).Scan(u.scanInto()...)
	})
	if errors.Is(err, errNotFound) {
		err = fmt.Errorf("inserting a user: a trigger prevents it: %w", errRefused)
	}
	return u, err
}

// creationUnder locks the row that it finds, so that its commit waits for the synchronous standbys: the
// creation may be visible before they have it.
func (s *postgres) creationUnder(ctx context.Context, key string) (User, string, error) {
	var u User
	var password string
	err := s.do(ctx, "selecting a creation", s.create, func(ctx context.Context, db querier) error {
		return db.QueryRow(ctx, `
			SELECT user_id, name, surname, 1, created_at, created_at, password
			FROM idempotency_keys
			WHERE key = $1 AND created_at > now() - make_interval(secs => $2)
			FOR NO KEY UPDATE`,
			key, keyLifetime.Seconds(),
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
	err := s.do(ctx, "selecting users", s.read, func(ctx context.Context, db querier) error {
		return collectUsers(ctx, db, users, `SELECT `+userColumns+` FROM users WHERE id = ANY ($1)`, ids)
	})
	return users, err
}

// collectUsers adds the rows of a query to users.
func collectUsers(ctx context.Context, db querier, users map[int64]User, sql string, args ...any) error {
	var u User
	rows, _ := db.Query(ctx, sql, args...) // an error of Query is one of its rows too
	_, err := pgx.ForEachRow(rows, u.scanInto(), func() error {
		users[u.ID] = u
		return nil
	})
	return err
}

func (s *postgres) passwordHash(ctx context.Context, id int64) (hash string, err error) {
	err = s.do(ctx, "selecting a password", s.read, func(ctx context.Context, db querier) error {
		return db.QueryRow(ctx, "SELECT password FROM users WHERE id = $1", id).Scan(&hash)
	})
	return hash, err
}

func (s *postgres) rehashPassword(ctx context.Context, id int64, old, hash string) error {
	return s.do(ctx, "rehashing a password", s.lockedWrite, func(ctx context.Context, db querier) error {
		_, err := db.Exec(ctx, `
			UPDATE users SET password = $3 FROM set_config('user_service.rehash', 'on', true)
			WHERE id = $1 AND password = $2`, id, old, hash)
		return err
	})
}

func (s *postgres) listUsers(ctx context.Context, after, offset, limit int64) (
	users []User, total int64, err error) {
	err = s.do(ctx, "selecting a page of users", s.list, func(ctx context.Context, db querier) error {
		// One statement sees one state. Its first row is the total, as the version of a
		// user of id 0.
		rows, _ := db.Query(ctx, `
			SELECT 0 AS id, '' AS name, '' AS surname, greatest(sum(n), 0)::bigint AS version,
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
	return s.change(ctx, s.updates, &userChange{
		id: id, name: in.name, surname: in.surname, password: in.password, match: match,
	})
}

func (s *postgres) deleteUser(ctx context.Context, id int64, match []int64) error {
	_, err := s.change(ctx, s.deletions, &userChange{id: id, match: match})
	return err
}

// userChange is an update or a deletion of a user. nil fields stay as they are; a nil match fits
// any version.
type userChange struct {
	id                      int64
	name, surname, password *string
	match                   []int64
	traceID                 string
}

// The statements make changes of different users. What they return was changed; a user who is not
// returned is missing, has another version, or, with SKIP LOCKED, is locked by somebody else.
const (
	changeUsers = `
		WITH change AS (
			SELECT * FROM unnest(
				set_config('user_service.ids', $1::bigint[]::text, true)::bigint[],
				set_config('user_service.trace_ids', $2::text[]::text, true)::text[],
				$3::text[], $4::text[], $5::text[], $6::text[]
			) AS change (user_id, trace_id, match, new_name, new_surname, new_password)
		), free AS (
			SELECT change.*
			FROM change, LATERAL (SELECT FROM users WHERE id = user_id FOR UPDATE SKIP LOCKED) AS users
		)`
	updateUsers = changeUsers + `
		UPDATE users SET
			name = coalesce(new_name, name),
			surname = coalesce(new_surname, surname),
			password = coalesce(new_password, password)
		FROM free
		WHERE id = user_id AND (match IS NULL OR version = ANY (match::bigint[]))
		RETURNING ` + userColumns
	deleteUsers = changeUsers + `
		DELETE FROM users USING free
		WHERE id = user_id AND (match IS NULL OR version = ANY (match::bigint[]))
		RETURNING ` + userColumns
)

// changer makes changes of one kind. First a change is tried together with others by a statement
// that waits for no lock. Where that did not make it, and the user is there in a version that fits,
// it is tried alone by a statement that waits. So a locked user and a change that PostgreSQL
// refuses are nobody's trouble but their callers'.
type changer struct {
	group   *Group[*userChange, User]
	waiting string // the statement that waits for locks
}

func (s *postgres) newChanger(sql string) changer {
	return changer{
		waiting: strings.Replace(sql, "SKIP LOCKED", "", 1),
		group: &Group[*userChange, User]{
			budget: batchBudget, alone: coalescing.writesAlone, limit: coalescing.writes,
			run: func(ctx context.Context, changes []*userChange) (map[*userChange]User, error) {
				return s.changeTogether(ctx, sql, changes)
			},
		},
	}
}

// change makes c after the changes of the same user that came before it to this replica: each
// statement has one change of a user at most, and a locked user holds one connection.
func (s *postgres) change(ctx context.Context, by changer, c *userChange) (User, error) {
	c.traceID = traceID(ctx)
	deadline := time.Now().Add(statementBudget)
	leave, err := s.changing.enter(ctx, c.id, deadline)
	defer leave()
	if err != nil {
		return User{}, fmt.Errorf("waiting for another change of the user: %w", err)
	}
	defer wake(s.wake)
	if time.Until(deadline) > batchBudget { // else its turn came late, and other changes with it
		u, done, err := by.group.Do(ctx, c)
		if done || err != nil {
			return u, err
		}
	}
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
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
		users, err = s.changeUsers(ctx, by.waiting, s.lockedWrite, []*userChange{c})
		if u, done := users[c.id]; done || err != nil {
			return u, err
		}
	}
	return User{}, fmt.Errorf("changing a user: a trigger prevents it: %w", errRefused)
}

// changeTogether makes those changes that can be made together. Where PostgreSQL refuses one, or one
// takes too long for a limit of the site, it makes none.
func (s *postgres) changeTogether(ctx context.Context, sql string, changes []*userChange) (
	map[*userChange]User, error) {
	users, err := s.changeUsers(ctx, sql, s.write, changes)
	timedOut := isTimeout(err) && ctx.Err() == nil
	if err != nil && (timedOut || !errors.Is(err, errUnavailable) && !errors.Is(err, errOutcomeUnknown)) {
		return nil, nil
	}
	results := make(map[*userChange]User, len(changes))
	for _, c := range changes {
		if u, done := users[c.id]; done {
			results[c] = u
		}
	}
	return results, err
}

// changeUsers runs one of the statements above and returns the changed users by id.
func (s *postgres) changeUsers(ctx context.Context, sql string, k kind, changes []*userChange) (
	map[int64]User, error) {
	var ids []int64
	var traceIDs []string
	var matches, names, surnames, passwords []*string
	for _, c := range changes {
		ids, traceIDs = append(ids, c.id), append(traceIDs, c.traceID)
		matches, names = append(matches, matchLiteral(c.match)), append(names, c.name)
		surnames, passwords = append(surnames, c.surname), append(passwords, c.password)
	}
	users := make(map[int64]User, len(changes))
	err := s.do(ctx, "changing users", k, func(ctx context.Context, db querier) error {
		return collectUsers(ctx, db, users, sql, ids, traceIDs, matches, names, surnames, passwords)
	})
	return users, err
}

// matchLiteral returns an array as PostgreSQL writes it. nil fits any version.
func matchLiteral(versions []int64) *string {
	if versions == nil {
		return nil
	}
	literal := strings.NewReplacer("[", "{", " ", ",", "]", "}").Replace(fmt.Sprint(versions))
	return &literal
}
