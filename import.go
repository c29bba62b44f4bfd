package main

// This file owns the command import: users from JSON lines, and the users of the predecessor. Each
// batch is a transaction, so an import can be interrupted and repeated.

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

const (
	importBatch  = 1000    // users of a transaction
	importMemory = 1 << 20 // bytes of the lines of a transaction
)

// importUsers imports batches of users, each in a transaction, while the next ones are read. When
// ctx ends, it finishes the transaction that has begun. All of it can be repeated.
func (t *transfer) importUsers(ctx context.Context) error {
	in, total, err := t.open()
	if err != nil {
		return err
	}
	store, err := openPostgres(ctx, t.settings.databaseURL, t.settings.appName, t.log)
	if err != nil {
		return err
	}
	defer store.close()
	im := &importer{transfer: t, store: store, cost: t.machine.hash}
	read := func(emit func([]*importRecord) bool) error { return im.readLines(in, emit) }
	if t.predecessor {
		if total, err = im.preparePredecessor(ctx); err != nil {
			return fmt.Errorf(`reading the table "user": %w`, err)
		}
		read = func(emit func([]*importRecord) bool) error { return im.readPredecessor(ctx, emit) }
	}
	t.begin("Import", total)
	batches, ended := make(chan []*importRecord), make(chan error, 1)
	go func() { // may wait for input for ever
		ended <- read(func(records []*importRecord) bool {
			select {
			case batches <- records:
			case <-ctx.Done():
			}
			return ctx.Err() == nil
		})
	}()
	traced := withTraceID(ctx, newUUIDv4())
	for ctx.Err() == nil {
		select {
		case records := <-batches:
			if err := im.importBatch(traced, records); err != nil {
				return err
			}
		case <-ctx.Done():
		case err := <-ended:
			if t.written.Load() >= importBatch { // until then, or until autovacuum, searches are slow
				_, _ = store.pool.Exec(ctx, "VACUUM (ANALYZE) users")
			}
			return err
		}
	}
	return ctx.Err()
}

// importRecord is a user that an import creates or updates.
type importRecord struct {
	Number    int64      `json:"number"` // of the line
	ID        int64      `json:"id"`     // 0: none is given
	Key       string     `json:"key"`    // of a user without an id, in idempotency_keys
	Name      string     `json:"name"`
	Surname   string     `json:"surname"`
	Hash      string     `json:"hash"`
	Version   int64      `json:"version"` // 0: none is given
	CreatedAt *time.Time `json:"created_at"`
	UpdatedAt *time.Time `json:"updated_at"`
	Expected  int64      `json:"expected"` // the version of the user that is updated; 0: a new user
	password  string     // plain text, if it is known
}

// recordset is a FROM item that reads records from the first parameter.
const recordset = `json_to_recordset($1::json) AS record (number bigint, id bigint, key text,
	name text, surname text, hash text, version bigint, created_at timestamptz,
	updated_at timestamptz, expected bigint)`

// importer imports records.
type importer struct {
	*transfer
	store *postgres
	cost  argonCost
}

// query calls f for each row of a statement, which it scans into dest.
func (im *importer) query(ctx context.Context, sql string, args, dest []any, f func() error) error {
	return pgx.BeginTxFunc(ctx, im.store.pool, unlimited(pgx.ReadCommitted), func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, sql, args...)
		_, err := pgx.ForEachRow(rows, dest, f)
		return err
	})
}

// importBatch imports records. What is not written, because the user exists, is compared in the next
// round; at once, if a record lacks an id, or a hash, which takes longer to make than to compare.
func (im *importer) importBatch(ctx context.Context, records []*importRecord) (err error) {
	compare := slices.ContainsFunc(records, func(r *importRecord) bool {
		return r.ID == 0 || r.Hash == ""
	})
	for round := 0; err == nil && len(records) > 0; round++ {
		if !im.predecessor && (compare || round > 0) {
			records, err = im.skipStored(ctx, records)
		}
		if err == nil {
			err = im.hash(ctx, records)
		}
		if err == nil {
			records, err = im.write(context.WithoutCancel(ctx), records)
		}
		if err == nil && (im.predecessor || round == maxRetries) {
			for _, r := range records {
				im.refuse(r, "", "is not written: it is changing, or a trigger prevents it")
			}
			return nil
		}
	}
	return err
}

// skipStored returns the records whose users do not exist, and refuses those whose users differ.
//
// The user of a record without an id is found under a digest of its line, which writeRecords keeps
// as if that were an idempotency key. The password is not a part of the digest, which would not
// protect it. If such a user was deleted, skipStored deletes the key, and the user gets a new id.
func (im *importer) skipStored(ctx context.Context, records []*importRecord) (
	missing []*importRecord, err error) {
	for _, r := range records {
		if r.ID == 0 && r.Key == "" {
			content, _ := json.Marshal(r)
			r.Key = fmt.Sprintf("\timport\t%x", sha256.Sum256(content))
		}
	}
	parameter, _ := json.Marshal(records)
	var id int64
	var stored *string
	var same bool
	err = im.query(context.WithoutCancel(ctx), `
		WITH record AS (SELECT * FROM `+recordset+`), deleted AS (
			DELETE FROM idempotency_keys AS kept
			WHERE kept.key = ANY (ARRAY(SELECT record.key FROM record WHERE record.id = 0))
				AND NOT EXISTS (SELECT FROM users WHERE users.id = kept.user_id OFFSET 0)
		)
		SELECT coalesce(kept.user_id, record.id), stored.password, coalesce(stored.same, false)
		FROM record LEFT JOIN LATERAL (
			SELECT keys.user_id FROM idempotency_keys AS keys WHERE keys.key = record.key LIMIT 1
		) AS kept ON true LEFT JOIN LATERAL (
			SELECT users.password, (users.name, users.surname, users.version)
					= (record.name, record.surname, greatest(record.version, 1))
				AND coalesce(users.created_at = record.created_at, true)
				AND coalesce(users.updated_at = record.updated_at, true) AS same
			FROM users WHERE users.id = coalesce(kept.user_id, record.id) LIMIT 1
		) AS stored ON true
		ORDER BY record.number`, []any{string(parameter)}, []any{&id, &stored, &same}, func() error {
		r := records[0]
		records = records[1:]
		if stored == nil {
			missing = append(missing, r)
		} else if same && im.hasPassword(r, *stored) {
			im.count(&im.unchanged)
		} else {
			im.refuse(r, "id", fmt.Sprintf("the user with id %d exists and has other content", id))
		}
		return nil
	})
	return missing, err
}

// hasPassword reports whether a stored hash is that of a record. A verification may have replaced
// the hash of another system.
func (im *importer) hasPassword(r *importRecord, stored string) bool {
	if r.password == "" {
		h := hasher{cost: im.cost}
		return r.Hash == stored || h.needsRehash(r.Hash) && !h.needsRehash(stored)
	}
	check, err := parseHash(stored)
	return err == nil && check.matches(r.password)
}

// hash hashes the passwords of records on all cores. It fails if ctx ends before.
func (im *importer) hash(ctx context.Context, records []*importRecord) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(im.machine.cores)
	for _, r := range records {
		if r.Hash == "" {
			group.Go(func() error {
				if ctx.Err() == nil {
					r.Hash = im.cost.hash(r.password)
				}
				return ctx.Err()
			})
		}
	}
	return group.Wait()
}

// write creates or updates the users of records, and returns the records for which it did not. If
// the database refuses one of them, it tries each half.
func (im *importer) write(ctx context.Context, records []*importRecord) (rest []*importRecord,
	err error) {
	if len(records) == 0 {
		return nil, nil
	}
	written, err := im.transaction(ctx, records)
	err = sentinel(err, false, true)
	refused := errors.Is(err, errRefused) || errors.Is(err, errReferenced) ||
		errors.Is(err, errInvalidValue)
	if half := len(records) / 2; refused && half > 0 {
		rest, err = im.write(ctx, records[:half])
		if err == nil {
			records, err = im.write(ctx, records[half:])
		}
		return append(rest, records...), err
	}
	if refused {
		im.refuse(records[0], "", err.Error())
		return nil, nil
	}
	for _, r := range records {
		if slices.Contains(written, r.Number) {
			im.count(&im.written)
		} else {
			rest = append(rest, r)
		}
	}
	return rest, err
}

// transaction writes records, and returns the numbers of those that it wrote. Triggers write the
// events; if there should be none, they are deleted before the commit.
func (im *importer) transaction(ctx context.Context, records []*importRecord) (
	written []int64, err error) {
	parameter, _ := json.Marshal(records)
	attempt := func(tx pgx.Tx) error {
		var lastEvent int64
		err := tx.QueryRow(ctx, `
			SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('outbox', 'id')::regclass), 0)
			FROM set_config('user_service.trace_id', $1, true) AS traced,
				set_config('user_service.import', 'on', true) AS dated,
				set_config('enable_hashjoin', 'off', true) AS h, -- a plan for an empty table
				set_config('enable_mergejoin', 'off', true) AS m -- would read all of a full one`,
			traceID(ctx)).Scan(&lastEvent)
		if err != nil {
			return err
		}
		rows, _ := tx.Query(ctx, writeRecords, string(parameter))
		written, err = pgx.CollectRows(rows, pgx.RowTo[int64])
		if err == nil && im.predecessor {
			_, err = tx.Exec(ctx, rememberImports, string(parameter), written)
		}
		if err == nil && im.noEvents {
			_, err = tx.Exec(ctx, "DELETE FROM outbox WHERE id > $1 AND trace_id = $2",
				lastEvent, traceID(ctx))
		}
		return err
	}
	for range maxRetries + 1 {
		err = pgx.BeginTxFunc(ctx, im.store.pool, unlimited(pgx.ReadCommitted), attempt)
		if !isConflict(err) {
			break
		}
	}
	return written, err
}

// writeRecords updates the users that are expected in a version, creates the others, and returns
// the numbers of their records. Of records with the same id, the first one counts.
//
// A record without an id gets one, which is kept under its key in the same transaction as the user.
// If another import keeps that key, the insertion waits for it, and then does nothing: the user is
// that of the other import. A table may have columns of any name besides ours, so every column is
// qualified.
const writeRecords = `
	WITH record AS (
		SELECT given.*, CASE given.id WHEN 0 THEN nextval(users.sequence) ELSE given.id END AS user_id
		FROM (SELECT * FROM ` + recordset + `) AS given,
			(SELECT pg_get_serial_sequence('users', 'id')::regclass AS sequence) AS users
	), kept AS (
		INSERT INTO idempotency_keys (key, user_id, name, surname, password, created_at)
		SELECT record.key, record.user_id, '', '', '', now() + make_interval(days => 30)
		FROM record WHERE record.id = 0
		ON CONFLICT (key) DO NOTHING
		RETURNING idempotency_keys.user_id
	), updated AS (
		UPDATE users SET name = record.name, surname = record.surname, password = record.hash,
			updated_at = coalesce(record.updated_at, users.updated_at)
		FROM record
		WHERE users.id = record.id AND users.version = record.expected
		RETURNING users.id
	), created AS (
		INSERT INTO users (id, name, surname, password, version, created_at, updated_at)
		SELECT record.user_id, record.name, record.surname, record.hash, greatest(record.version, 1),
			coalesce(record.created_at, record.updated_at, now()),
			coalesce(record.updated_at, record.created_at, now())
		FROM record
		WHERE record.expected = 0
			AND (record.id <> 0 OR record.user_id IN (SELECT kept.user_id FROM kept))
		ORDER BY record.user_id, record.number
		ON CONFLICT (id) DO NOTHING
		RETURNING users.id
	)
	SELECT min(record.number) FROM record
	WHERE record.user_id IN (SELECT updated.id FROM updated UNION ALL SELECT created.id FROM created)
	GROUP BY record.user_id`

// preparePredecessor moves the sequence of ids behind those of the predecessor, and returns how many
// users that has. It creates the table that remembers which users were imported, so that a repeated
// import can tell on which side a user has changed.
func (im *importer) preparePredecessor(ctx context.Context) (total int64, err error) {
	err = im.query(ctx, `
		SELECT old.total, CASE WHEN old.highest > coalesce(pg_sequence_last_value(users.sequence), 0)
			THEN setval(users.sequence, old.highest) END
		FROM (SELECT pg_get_serial_sequence('users', 'id')::regclass AS sequence) AS users, (
			SELECT count(*) AS total,
				max(id::bigint) FILTER (WHERE id::bigint < 9223372036854775807) AS highest
			FROM "user") AS old`, nil, []any{&total, nil}, func() error { return nil })
	if err == nil {
		err = im.query(ctx, `CREATE TABLE IF NOT EXISTS predecessor_imports (
			id bigint PRIMARY KEY, version bigint NOT NULL, updated_at timestamptz)`, nil, nil, nil)
	}
	return total, err
}

// predecessorPage says of each user of a page what to do: nothing if that is "done", to write the
// user if it is "", and otherwise to refuse the user for that reason.
const predecessorPage = `
	SELECT old.id, coalesce(old.name, ''), coalesce(old.surname, ''), coalesce(old.password, ''),
		CASE WHEN old.created_at BETWEEN old.first AND old.last THEN old.created_at END,
		CASE WHEN old.updated_at BETWEEN old.first AND old.last THEN old.updated_at END,
		coalesce(imported.version, 0), CASE
		WHEN old.id < 1 THEN 'must have an id of 1 or more'
		WHEN old.created_at NOT BETWEEN old.first AND old.last
			OR old.updated_at NOT BETWEEN old.first AND old.last
			THEN 'must have times in the years 1 to 9999'
		WHEN imported.id IS NULL AND here.id IS NULL THEN ''
		WHEN imported.id IS NULL AND here.version = 1 AND here.created_at = old.created_at
			AND here.updated_at = old.updated_at THEN 'done'
		WHEN imported.id IS NULL THEN 'has the id of another user here'
		WHEN imported.updated_at IS NOT DISTINCT FROM old.updated_at THEN 'done'
		WHEN imported.version = here.version THEN ''
		ELSE 'was changed on both sides since the last import' END
	FROM (
		SELECT id::bigint, name::text, surname::text, password::text, created_at::timestamptz,
			updated_at::timestamptz, timestamptz '0001-01-01 00:00Z' AS first,
			timestamptz '9999-12-31 23:59:59.999999Z' AS last
		FROM "user" WHERE "user".id >= $1::bigint ORDER BY "user".id LIMIT $2
	) AS old
	LEFT JOIN LATERAL (
		SELECT * FROM predecessor_imports AS imports WHERE imports.id = old.id LIMIT 1
	) AS imported ON true
	LEFT JOIN LATERAL (
		SELECT users.id, users.version, users.created_at, users.updated_at
		FROM users WHERE users.id = old.id LIMIT 1
	) AS here ON true
	ORDER BY old.id`

// rememberImports takes the records of a batch, and the ids of those that were written.
const rememberImports = `
	INSERT INTO predecessor_imports AS imported (id, version, updated_at)
	SELECT users.id, users.version, record.updated_at
	FROM ` + recordset + ` JOIN users ON users.id = record.id
	WHERE users.id = ANY ($2::bigint[])
	ON CONFLICT (id) DO UPDATE SET version = excluded.version, updated_at = excluded.updated_at`

// readPredecessor passes the users of the predecessor that have changed to emit, by pages of ids. At
// last it refuses those who were deleted on that side only.
func (im *importer) readPredecessor(ctx context.Context, emit func([]*importRecord) bool) error {
	for next, more := int64(math.MinInt64), true; more; {
		var records []*importRecord
		var verdict string
		var r importRecord
		size := 0
		err := im.query(ctx, predecessorPage, []any{next, importBatch}, []any{&r.ID, &r.Name, &r.Surname,
			&r.password, &r.CreatedAt, &r.UpdatedAt, &r.Expected, &verdict}, func() error {
			r.Number, next = r.ID, r.ID+1
			size++
			if field, reason := r.check(verdict); verdict == "done" {
				im.count(&im.unchanged)
			} else if reason != "" {
				im.refuse(&r, field, reason)
			} else {
				changed := r
				records = append(records, &changed)
			}
			return nil
		})
		if err != nil || !emit(records) {
			return err
		}
		more = size == importBatch && next > math.MinInt64 // else it has overflowed
	}
	var id int64
	return im.query(ctx, `
		SELECT users.id FROM predecessor_imports AS imports JOIN users ON users.id = imports.id
		WHERE NOT EXISTS (SELECT FROM "user" WHERE "user".id = users.id)`, nil, []any{&id}, func() error {
		im.refuse(&importRecord{Number: id}, "", `is deleted in the table "user", but not here`)
		return nil
	})
}

// check trims the names of a user of the predecessor. If the user is refused, it returns the field
// that is wrong, if it is one, and the reason.
func (r *importRecord) check(verdict string) (field, reason string) {
	if verdict != "" {
		return "", verdict
	}
	var errs [3]error
	r.Name, errs[0] = checkName(r.Name)
	r.Surname, errs[1] = checkName(r.Surname)
	_, errs[2] = newPasswordRule(1, false)(r.password)
	for i, field := range []string{"name", "surname", "password"} {
		if errs[i] != nil {
			return field, errs[i].Error()
		}
	}
	return "", ""
}

// refuse reports a record that is not imported, as a line on standard error.
func (im *importer) refuse(r *importRecord, field, reason string) {
	number := "line"
	if im.predecessor {
		number = "id"
	}
	line := fmt.Appendf(nil, `{"%s":%d`, number, r.Number)
	if field != "" {
		line = appendJSONString(append(line, `,"field":`...), field)
	}
	line = append(appendJSONString(append(line, `,"reason":`...), reason), '}')
	im.count(&im.refused)
	im.print(line)
}
