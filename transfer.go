package main

// This file owns the commands import and export: users as JSON lines, and the users of the
// predecessor. An import can be interrupted and repeated.

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/schollz/progressbar/v3"
	"golang.org/x/sync/errgroup"
)

const transferUsage = "usage: import [--no-events] FILE, where - is standard input; " +
	"import [--no-events] --predecessor; export [--password-hashes]"

const (
	importBatch  = 1000     // users of a transaction
	importLine   = 64 << 10 // bytes
	importMemory = 1 << 20  // bytes of the lines of a batch
	progressTime = 10 * time.Second
)

// transferOptions are the arguments of import and export.
type transferOptions struct {
	export      bool
	file        string // "-" is standard input
	predecessor bool
	noEvents    bool
	hashes      bool
}

// parseTransfer returns the options, and whether the arguments are valid.
func parseTransfer(args []string) (o transferOptions, valid bool) {
	o.export = args[0] == "export"
	for _, arg := range args[1:] {
		switch {
		case o.export && arg == "--password-hashes":
			o.hashes = true
		case !o.export && arg == "--predecessor":
			o.predecessor = true
		case !o.export && arg == "--no-events":
			o.noEvents = true
		case o.export || o.file != "" || strings.HasPrefix(arg, "--"):
			return o, false
		default:
			o.file = arg
		}
	}
	return o, o.export || o.predecessor != (o.file != "")
}

// transfer runs import or export, and returns the exit code: 2 for wrong arguments, 1 for a failure
// or if users were refused.
func transfer(ctx context.Context, args []string, s settings, machine limits, std streams,
	log *slog.Logger) int {
	o, valid := parseTransfer(args)
	if !valid {
		log.Error("Invalid arguments", "error", transferUsage)
		return 2
	}
	if s.databaseURL == "" {
		log.Error("Invalid setting", "error", "DATABASE_URL must be set: "+args[0]+" needs a database")
		return 2
	}
	what, work := "Import", importUsers
	if o.export {
		what, work = "Export", exportUsers
	}
	p := &progress{w: std.err, log: log, what: what}
	err := work(ctx, o, s, machine, std, p)
	p.finish()
	counts := []any{"users", p.done.Load(), "unchanged", p.unchanged.Load(), "refused", p.refused.Load()}
	switch {
	case ctx.Err() != nil:
		log.Warn(what+" interrupted", append(counts, "remedy", "run the same command again")...)
		return 1
	case err != nil:
		log.Error(what+" failed", append(counts, "error", err)...)
		return 1
	}
	log.Info(what+" finished", counts...)
	return int(min(p.refused.Load(), 1))
}

// exportUsers writes the users of one snapshot, in the order of ids.
func exportUsers(ctx context.Context, o transferOptions, s settings, _ limits, std streams,
	p *progress) error {
	config, err := poolConfig(s.databaseURL, s.appName)
	if err != nil {
		return err
	}
	conn, err := pgx.ConnectConfig(ctx, config.ConnConfig)
	if err != nil {
		return explainFailure(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	out := bufio.NewWriterSize(std.out, importLine)
	options := pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}
	err = pgx.BeginTxFunc(ctx, conn, options, func(tx pgx.Tx) error {
		var total int64
		err := tx.QueryRow(ctx, `
			SELECT greatest(sum(n), 0)::bigint
			FROM user_counts, set_config('statement_timeout', '0', true)`).Scan(&total)
		if err != nil {
			return err
		}
		p.begin(total)
		rows, _ := tx.Query(ctx, "SELECT "+userColumns+", password FROM users ORDER BY id",
			pgx.QueryExecModeDescribeExec)
		var u memoryUser
		var line []byte
		_, err = pgx.ForEachRow(rows, append(u.scanInto(), &u.password), func() error {
			line = u.appendJSON(line[:0])
			if o.hashes {
				line = append(line[:len(line)-1], `,"password_hash":`...)
				line = append(appendJSONString(line, u.password), '}')
			}
			p.add(&p.done)
			_, err := out.Write(append(line, '\n'))
			return err
		})
		return err
	})
	return cmp.Or(err, out.Flush())
}

// importRecord is a user that an import creates or updates.
type importRecord struct {
	number               int64 // of the line, or the id in the table of the predecessor
	id                   int64 // 0 if none is given
	name, surname        string
	password, hash       string // one of them may be empty
	version              int64  // 0 if none is given
	createdAt, updatedAt *time.Time
	expected             int64  // version of the user that is updated, 0 for a new user
	verdict              string // of predecessorPage
}

// chunk is a part of an import.
type chunk struct {
	records func() []*importRecord // parses them
	err     error                  // the rest cannot be read
}

// importer imports users. Its methods may be called at the same time.
type importer struct {
	*progress
	store    *postgres
	options  transferOptions
	password fieldRule
	hasher   *hasher
	cores    lane
}

// importUsers imports batches at the same time, because hashes need all cores and statements wait.
// When ctx ends, it finishes the transactions that have begun.
func importUsers(ctx context.Context, o transferOptions, s settings, machine limits, std streams,
	p *progress) error {
	in, total, err := openImport(o.file, std.in)
	if err != nil {
		return err
	}
	store, err := openPostgres(ctx, s.databaseURL, s.appName, p.log)
	if err != nil {
		return err
	}
	defer store.close()
	im := &importer{p, store, o, newPasswordRule(s.passwordMinLength, s.passwordBlocklist),
		&hasher{cost: machine.hash}, lane{slots(machine.cores)}}
	source := im.lines(in)
	if o.predecessor {
		if total, err = im.preparePredecessor(ctx); err != nil {
			return err
		}
		source = im.predecessorPages(ctx)
	}
	p.begin(total)
	err = im.run(withTraceID(ctx, newUUIDv4()), source, 2*machine.cores)
	if err == nil && o.predecessor {
		err = im.reportDeleted(ctx)
	}
	if err == nil && p.done.Load() >= importBatch { // searches are slow before
		_, err = store.pool.Exec(ctx, "VACUUM (ANALYZE) users")
	}
	return err
}

// openImport returns the input, and its number of lines if that is known, else -1.
func openImport(name string, stdin io.Reader) (in io.Reader, lines int64, err error) {
	if name == "" || name == "-" {
		return stdin, -1, nil
	}
	file, err := os.Open(name) // #nosec G304 -- an argument
	if err != nil {
		return nil, 0, err
	}
	info, err := file.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return file, -1, err
	}
	buffer := make([]byte, importMemory)
	for err == nil {
		var n int
		n, err = file.Read(buffer)
		lines += int64(bytes.Count(buffer[:n], []byte{'\n'}))
	}
	if errors.Is(err, io.EOF) {
		_, err = file.Seek(0, io.SeekStart)
	}
	return file, lines, err
}

// run imports the batches of a source, several at the same time.
func (im *importer) run(ctx context.Context, source iter.Seq[chunk], atOnce int) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	batches := make(chan chunk)
	go func() { // may block in a read for ever
		defer close(batches)
		for b := range source {
			select {
			case batches <- b:
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		select {
		case b, more := <-batches:
			if !more {
				return group.Wait()
			}
			group.Go(func() error {
				if b.err != nil {
					return b.err
				}
				return im.importBatch(ctx, b.records())
			})
		case <-ctx.Done():
			return cmp.Or(group.Wait(), ctx.Err())
		}
	}
}

// importBatch imports records. A user that somebody else creates at the same time is compared in
// the next round.
func (im *importer) importBatch(ctx context.Context, records []*importRecord) error {
	err := im.assignIDs(ctx, records)
	for err == nil && len(records) > 0 {
		if !im.options.predecessor {
			records, err = im.skipStored(ctx, records)
		}
		if err == nil {
			err = im.hash(ctx, records)
		}
		if err == nil {
			records, err = im.write(ctx, records)
		}
		for im.options.predecessor && len(records) > 0 {
			im.refuse(records[0], "", "was changed during the import; run it again")
			records = records[1:]
		}
	}
	return err
}

// assignIDs gives an id to each line without one. It remembers the id under a digest of the line as
// if that were an idempotency key, so that a repeated import gives it the same id again.
func (im *importer) assignIDs(ctx context.Context, records []*importRecord) error {
	byKey := make(map[string]*importRecord)
	var keys []string
	for _, r := range records {
		if r.id == 0 {
			content, _ := json.Marshal([]any{r.number, r.name, r.surname, r.hash, r.version,
				r.createdAt, r.updatedAt}) // not the password, which a digest would not protect
			key := fmt.Sprintf("\timport\t%x", sha256.Sum256(content))
			byKey[key], keys = r, append(keys, key)
		}
	}
	if len(keys) == 0 {
		return nil
	}
	rows, _ := im.store.pool.Query(context.WithoutCancel(ctx), `
		INSERT INTO idempotency_keys AS kept (key, user_id, name, surname, password, created_at)
		SELECT key, nextval(sequence), '', '', '', now() + make_interval(days => 30)
		FROM unnest($1::text[]) AS key,
			(SELECT pg_get_serial_sequence('users', 'id')::regclass AS sequence) AS users
		ORDER BY key
		ON CONFLICT (key) DO UPDATE SET user_id = CASE
			WHEN EXISTS (SELECT FROM users WHERE id = kept.user_id) THEN kept.user_id
			ELSE excluded.user_id END
		RETURNING key, user_id`, keys)
	var key string
	var id int64
	_, err := pgx.ForEachRow(rows, []any{&key, &id}, func() error {
		byKey[key].id = id
		return nil
	})
	return err
}

// skipStored returns the records whose users do not exist. It refuses those whose users differ.
func (im *importer) skipStored(ctx context.Context, records []*importRecord) (missing []*importRecord, err error) {
	ids := make([]int64, len(records))
	for i, r := range records {
		ids[i] = r.id
	}
	stored := make(map[int64]memoryUser)
	rows, _ := im.store.pool.Query(context.WithoutCancel(ctx),
		"SELECT "+userColumns+", password FROM users WHERE id = ANY ($1)", ids)
	var u memoryUser
	_, err = pgx.ForEachRow(rows, append(u.scanInto(), &u.password), func() error {
		stored[u.ID] = u
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, r := range records {
		if u, exists := stored[r.id]; !exists {
			missing = append(missing, r)
		} else if im.isSame(r, u) {
			im.add(&im.unchanged)
		} else {
			im.refuse(r, "id", fmt.Sprintf("the user with id %d exists and has other content", r.id))
		}
	}
	return missing, nil
}

// isSame reports whether a user has the content of a record. The hash of another system may have
// been replaced by a verification.
func (im *importer) isSame(r *importRecord, u memoryUser) bool {
	sameTime := func(given *time.Time, stored timestamp) bool {
		return given == nil || given.Equal(stored.Time)
	}
	if r.name != u.Name || r.surname != u.Surname || max(r.version, 1) != u.Version ||
		!sameTime(r.createdAt, u.CreatedAt) || !sameTime(r.updatedAt, u.UpdatedAt) {
		return false
	}
	if r.hash != "" {
		return r.hash == u.password || im.hasher.needsRehash(r.hash) && !im.hasher.needsRehash(u.password)
	}
	check, err := parseHash(u.password)
	return err == nil && check.matches(r.password)
}

// hash hashes the passwords of records on all cores. It fails if ctx ends before.
func (im *importer) hash(ctx context.Context, records []*importRecord) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, r := range records {
		if r.hash != "" {
			continue
		}
		if err := im.cores.enter(ctx); err != nil {
			return cmp.Or(group.Wait(), err)
		}
		group.Go(func() error {
			defer im.cores.leave()
			r.hash = im.hasher.cost.hash(r.password)
			return nil
		})
	}
	return group.Wait()
}

// write creates the users of records, or updates those of the predecessor that exist, and returns
// the records for which it did not. If the database refuses one of them, it tries each half.
func (im *importer) write(ctx context.Context, records []*importRecord) (rest []*importRecord, err error) {
	if len(records) == 0 {
		return nil, nil
	}
	written, err := im.transaction(context.WithoutCancel(ctx), records)
	if err = sentinel(err, false, true); errors.Is(err, errRefused) || errors.Is(err, errInvalidValue) {
		if len(records) > 1 {
			half := len(records) / 2
			rest, err = im.write(ctx, records[:half])
			if err == nil {
				records, err = im.write(ctx, records[half:])
			}
			return append(rest, records...), err
		}
		im.refuse(records[0], "", "the database refuses the user: "+err.Error())
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, r := range records {
		if written[r.id] {
			delete(written, r.id) // another record may have the same id
			im.add(&im.done)
		} else {
			rest = append(rest, r)
		}
	}
	return rest, nil
}

// transaction makes one attempt of write, and returns the ids of the users that it wrote. Triggers
// write the events; without events, it deletes them before the commit.
func (im *importer) transaction(ctx context.Context, records []*importRecord) (written map[int64]bool,
	err error) {
	var ids, versions, expected []int64
	var names, surnames, hashes []string
	var createdAt, updatedAt []*time.Time
	for _, r := range records {
		ids, versions, expected = append(ids, r.id), append(versions, r.version), append(expected, r.expected)
		names, surnames, hashes = append(names, r.name), append(surnames, r.surname), append(hashes, r.hash)
		createdAt, updatedAt = append(createdAt, r.createdAt), append(updatedAt, r.updatedAt)
	}
	attempt := func(tx pgx.Tx) error {
		var lastEvent int64
		err := tx.QueryRow(ctx, `
			SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('outbox', 'id')::regclass), 0)
			FROM set_config('user_service.trace_id', $1, true) AS traced,
				set_config('user_service.import', 'on', true) AS dated`,
			traceID(ctx)).Scan(&lastEvent)
		if err != nil {
			return err
		}
		rows, _ := tx.Query(ctx, writeRecords,
			ids, names, surnames, hashes, versions, expected, createdAt, updatedAt)
		var id int64
		written = make(map[int64]bool)
		_, err = pgx.ForEachRow(rows, []any{&id}, func() error {
			written[id] = true
			return nil
		})
		if err == nil && im.options.predecessor {
			_, err = tx.Exec(ctx, rememberImports, ids, updatedAt, slices.Collect(maps.Keys(written)))
		}
		if err == nil && im.options.noEvents {
			_, err = tx.Exec(ctx, "DELETE FROM outbox WHERE id > $1 AND trace_id = $2",
				lastEvent, traceID(ctx))
		}
		return err
	}
	for range maxRetries + 1 {
		options := pgx.TxOptions{IsoLevel: pgx.ReadCommitted}
		if err = pgx.BeginTxFunc(ctx, im.store.pool, options, attempt); !isConflict(err) {
			break
		}
	}
	return written, err
}

// writeRecords updates the users that are expected in a version, and creates the others. The order
// of ids prevents deadlocks of imports.
const writeRecords = `
	WITH record AS (
		SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::bigint[],
			$6::bigint[], $7::timestamptz[], $8::timestamptz[]) WITH ORDINALITY
			AS record (id, name, surname, password, version, expected, created_at, updated_at, position)
	), updated AS (
		UPDATE users SET name = record.name, surname = record.surname, password = record.password,
			updated_at = coalesce(record.updated_at, users.updated_at)
		FROM record
		WHERE users.id = record.id AND users.version = record.expected
		RETURNING users.id
	), created AS (
		INSERT INTO users (id, name, surname, password, version, created_at, updated_at)
		SELECT id, name, surname, password, greatest(version, 1),
			coalesce(created_at, updated_at, now()), coalesce(updated_at, created_at, now())
		FROM record WHERE expected = 0 ORDER BY id, position
		ON CONFLICT (id) DO NOTHING
		RETURNING id
	)
	SELECT id FROM updated UNION ALL SELECT id FROM created`

// lines returns the batches of a file of JSON lines. Empty lines are skipped.
func (im *importer) lines(in io.Reader) iter.Seq[chunk] {
	return func(yield func(chunk) bool) {
		reader := bufio.NewReaderSize(in, importLine)
		for number := int64(1); ; {
			first, lines, size, err := number, [][]byte(nil), 0, error(nil)
			for ; err == nil && len(lines) < importBatch && size < importMemory; number++ {
				var line []byte
				line, err = reader.ReadSlice('\n')
				size += len(line)
				lines = append(lines, bytes.Clone(line))
				for errors.Is(err, bufio.ErrBufferFull) { // nil stands for a line that is too long
					lines[len(lines)-1] = nil
					_, err = reader.ReadSlice('\n')
				}
			}
			more := yield(chunk{records: func() []*importRecord { return im.parseLines(first, lines) }})
			if err != nil && !errors.Is(err, io.EOF) {
				yield(chunk{err: err})
			}
			if err != nil || !more {
				return
			}
		}
	}
}

// parseLines returns the records of lines, the first of which has the given number. It refuses lines
// that are not valid.
func (im *importer) parseLines(number int64, lines [][]byte) (records []*importRecord) {
	for i, line := range lines {
		if i == 0 && number == 1 {
			line = bytes.TrimPrefix(line, []byte("\ufeff"))
		}
		r := &importRecord{number: number + int64(i)}
		if line == nil {
			im.refuse(r, "", fmt.Sprintf("must not be longer than %d bytes", importLine))
		} else if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		} else if field, err := r.parse(line, im.password); err != nil {
			im.refuse(r, field, strings.TrimPrefix(err.Error(), "The body "))
		} else {
			records = append(records, r)
		}
	}
	return records
}

// parse reads a line. If it is not valid, parse returns the field that is wrong, if it is one, and
// what it must be.
func (r *importRecord) parse(line []byte, password fieldRule) (field string, err error) {
	members, err := parseObject(line)
	given := make(map[string]bool)
	for _, m := range members {
		if err != nil {
			return field, err
		}
		field = cut(m.name, maxEchoed)
		if err = r.set(m, password); given[m.name] {
			err = errors.New("must be given once")
		}
		given[m.name] = true
	}
	switch {
	case err != nil:
		return field, err
	case !given["name"]:
		return "name", errors.New("is required")
	case !given["surname"]:
		return "surname", errors.New("is required")
	case given["password"] == given["password_hash"]:
		return "password", errors.New("is required, or password_hash instead")
	}
	return "", nil
}

// importFields are the members that a line may have.
var importFields = []string{"id", "name", "surname", "password", "password_hash", "version",
	"created_at", "updated_at"}

// set sets the field that a member gives.
func (r *importRecord) set(m member, password fieldRule) (err error) {
	if !slices.Contains(importFields, m.name) {
		return errors.New("is unknown; the fields are " + strings.Join(importFields, ", "))
	}
	var text string
	if m.name != "id" && m.name != "version" {
		if text, err = parseString(m.value); err != nil {
			return err
		}
	}
	switch m.name {
	case "id":
		r.id, err = parsePositive(m.value)
	case "version":
		r.version, err = parsePositive(m.value)
	case "name":
		r.name, err = checkName(text)
	case "surname":
		r.surname, err = checkName(text)
	case "password":
		r.password, err = password(text)
	case "password_hash":
		r.hash = text
		if _, err = parseHash(text); err != nil {
			err = errors.New("must be a hash of argon2id, bcrypt or PBKDF2 within the bounds of " +
				"docs/takeover.md")
		}
	case "created_at":
		r.createdAt, err = parseTime(text)
	case "updated_at":
		r.updatedAt, err = parseTime(text)
	}
	return err
}

// parsePositive parses an id or a version.
func parsePositive(value json.RawMessage) (int64, error) {
	n, err := strconv.ParseInt(string(value), 10, 64)
	if err != nil || n < 1 || n == math.MaxInt64 {
		return 0, fmt.Errorf("must be an integer from 1 to %d", math.MaxInt64-1)
	}
	return n, nil
}

// parseTime parses a time in the format of RFC 3339, and cuts it to microseconds.
func parseTime(text string) (*time.Time, error) {
	t, err := time.Parse(time.RFC3339Nano, text)
	if t = t.UTC().Truncate(time.Microsecond); err != nil || t.Year() < 1 || t.Year() > 9999 {
		return nil, errors.New("must be a time such as 2026-01-01T12:00:00.123456Z")
	}
	return &t, nil
}

// refuse reports a record that is not imported.
func (im *importer) refuse(r *importRecord, field, reason string) {
	line := importRefusal{Line: r.number, Field: field, Reason: reason}
	if im.options.predecessor {
		line.Line, line.ID = 0, r.number
	}
	encoded, _ := json.Marshal(line)
	im.add(&im.refused)
	im.print(encoded)
}

// importRefusal is a line on standard error. It names a line of the input, or an id of the predecessor.
type importRefusal struct {
	Line   int64  `json:"line,omitempty"`
	ID     int64  `json:"id,omitempty"`
	Field  string `json:"field,omitempty"`
	Reason string `json:"reason"`
}

// preparePredecessor creates the table that remembers which users were imported, so that a repeated
// import can tell on which side a user has changed. It moves the sequence of ids behind those of the
// predecessor, and returns how many users that has.
func (im *importer) preparePredecessor(ctx context.Context) (total int64, err error) {
	_, err = im.store.pool.Exec(ctx, `CREATE TABLE IF NOT EXISTS predecessor_imports (
		id bigint PRIMARY KEY, version bigint NOT NULL, updated_at timestamptz)`)
	if err == nil {
		err = im.store.pool.QueryRow(ctx, `
			SELECT total, CASE WHEN highest > coalesce(pg_sequence_last_value(sequence), 0)
				THEN setval(sequence, highest) END
			FROM (SELECT pg_get_serial_sequence('users', 'id')::regclass AS sequence) AS users, (
				SELECT count(*) AS total, max(id) FILTER (WHERE id < 9223372036854775807) AS highest
				FROM "user") AS old`).Scan(&total, nil)
	}
	if err != nil {
		err = fmt.Errorf(`reading the table "user": %w`, err)
	}
	return total, err
}

// predecessorPage says of each user of a page what to do: nothing if that is "done", to write the
// user if it is "", and otherwise to refuse the user for that reason.
const predecessorPage = `
	SELECT old.id, coalesce(name, ''), coalesce(surname, ''), coalesce(password, ''),
		CASE WHEN old.created_at BETWEEN first AND last THEN old.created_at END,
		CASE WHEN old.updated_at BETWEEN first AND last THEN old.updated_at END,
		coalesce(imported.version, 0), CASE
		WHEN old.id < 1 THEN 'must have an id of 1 or more'
		WHEN old.created_at NOT BETWEEN first AND last OR old.updated_at NOT BETWEEN first AND last
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
		FROM "user" WHERE id > $1 ORDER BY id LIMIT $2
	) AS old
	LEFT JOIN predecessor_imports AS imported USING (id)
	LEFT JOIN (SELECT id, version, created_at, updated_at FROM users) AS here USING (id)
	ORDER BY id`

// rememberImports takes the ids and times of a batch, and the ids of those that were written.
const rememberImports = `
	INSERT INTO predecessor_imports AS imported (id, version, updated_at)
	SELECT id, version, old.updated_at
	FROM unnest($1::bigint[], $2::timestamptz[]) AS old (id, updated_at) JOIN users USING (id)
	WHERE id = ANY ($3::bigint[])
	ON CONFLICT (id) DO UPDATE SET version = excluded.version, updated_at = excluded.updated_at`

// predecessorPages returns the users of the predecessor as batches.
func (im *importer) predecessorPages(ctx context.Context) iter.Seq[chunk] {
	return func(yield func(chunk) bool) {
		for after := int64(math.MinInt64); ; {
			rows, _ := im.store.pool.Query(ctx, predecessorPage, after, importBatch)
			page, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (*importRecord, error) {
				r := &importRecord{}
				return r, row.Scan(&r.id, &r.name, &r.surname, &r.password, &r.createdAt,
					&r.updatedAt, &r.expected, &r.verdict)
			})
			if len(page) > 0 {
				after = page[len(page)-1].id
			}
			records := func() []*importRecord { return slices.DeleteFunc(page, im.skipsPredecessor) }
			if !yield(chunk{records, err}) || err != nil || len(page) < importBatch {
				return
			}
		}
	}
}

// skipsPredecessor trims the names of a user of the predecessor, and reports whether the user is not
// imported: because nothing has changed, or because the user is refused.
func (im *importer) skipsPredecessor(r *importRecord) bool {
	r.number = r.id
	if r.verdict == "done" {
		im.add(&im.unchanged)
		return true
	}
	field, err := "", error(nil)
	if r.verdict != "" {
		err = errors.New(r.verdict)
	}
	for _, f := range []struct {
		name string
		text *string
		rule fieldRule
	}{{"name", &r.name, checkName}, {"surname", &r.surname, checkName}, {"password", &r.password,
		anyPassword["password"]}} {
		if err == nil {
			field = f.name
			*f.text, err = f.rule(*f.text)
		}
	}
	if err != nil {
		im.refuse(r, field, err.Error())
	}
	return err != nil
}

// reportDeleted refuses the imported users who were deleted on the predecessor's side only.
func (im *importer) reportDeleted(ctx context.Context) error {
	rows, _ := im.store.pool.Query(ctx, `
		SELECT id FROM predecessor_imports JOIN users USING (id)
		WHERE NOT EXISTS (SELECT FROM "user" WHERE "user".id = users.id)`)
	var id int64
	_, err := pgx.ForEachRow(rows, []any{&id}, func() error {
		im.refuse(&importRecord{number: id}, "", `is deleted in the table "user", but not here`)
		return nil
	})
	return err
}

// progress shows how far a command is: as a bar on a terminal, otherwise by a line in the log every
// ten seconds. Its methods may be called at the same time.
type progress struct {
	w    io.Writer // standard error
	log  *slog.Logger
	what string
	stop func(time.Duration)
	bar  *progressbar.ProgressBar // nil if standard error is no terminal

	done, unchanged, refused atomic.Int64 // users
}

// begin starts to show the progress. The total may be -1, which means unknown.
func (p *progress) begin(total int64) {
	if file, ok := p.w.(*os.File); ok {
		if info, err := file.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			p.bar = progressbar.NewOptions64(total, progressbar.OptionSetWriter(p.w),
				progressbar.OptionSetDescription(p.what), progressbar.OptionShowCount(),
				progressbar.OptionShowIts(), progressbar.OptionSetItsString("users"),
				progressbar.OptionThrottle(100*time.Millisecond))
			return
		}
	}
	begun := time.Now()
	p.stop = start(func(ctx context.Context) {
		for sleep(ctx, progressTime); ctx.Err() == nil; sleep(ctx, progressTime) {
			n := p.done.Load() + p.unchanged.Load() + p.refused.Load()
			rate := float64(n) / time.Since(begun).Seconds()
			attrs := []any{"users", n, "users_per_second", math.Round(rate)}
			if total >= n && n > 0 {
				attrs = append(attrs, "total", total,
					"seconds_left", math.Ceil(float64(total-n)/rate))
			}
			p.log.Info(p.what+" in progress", attrs...)
		}
	})
}

// add counts a user.
func (p *progress) add(counter *atomic.Int64) {
	counter.Add(1)
	if p.bar != nil {
		_ = p.bar.Add(1)
	}
}

// print writes a line to standard error.
func (p *progress) print(line []byte) {
	if p.bar != nil {
		_ = p.bar.Clear()
	}
	_, _ = p.w.Write(append(line, '\n'))
}

// finish stops what begin has started.
func (p *progress) finish() {
	switch {
	case p.bar != nil:
		_ = p.bar.Exit()
		_, _ = p.w.Write([]byte{'\n'})
	case p.stop != nil:
		p.stop(closeWait)
	}
}
