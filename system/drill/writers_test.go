package drill

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

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

// writeBeside writes to the table users with SQL, while clients use the API. Its role has
// privileges on that table only, and an empty search_path.
func writeBeside(r *trial) {
	r.exec("GRANT SELECT, INSERT, UPDATE, DELETE ON users TO writer")
	url := r.postgres.URL("writer", r.dbName) + "?pool_max_conns=12"
	db, err := pgxpool.New(r.t.Context(), url)
	require(r.t, err)
	r.t.Cleanup(db.Close)
	w := &writer{trial: r, db: db}
	stop := inBackground(r.t, w.again(w.insertOne), w.again(w.insertMany), w.again(w.copyIn),
		w.again(w.updateMany), w.again(w.updateMany), w.again(w.deleteMany), w.again(w.upsert),
		w.again(w.rollBack), w.again(w.keepOpen), w.createByAPI)
	time.Sleep(roundsOf(20*time.Second, 6*time.Second))
	stop()
}

// writer changes users with SQL and tells the ledger what it committed.
type writer struct {
	*trial
	db *pgxpool.Pool
}

// errUndone makes a writer roll its transaction back.
var errUndone = errors.New("rolled back on purpose")

// writing is a transaction of a writer and the changes that it made.
type writing struct {
	pgx.Tx
	changes []change // with version 0 for a deletion
}

// again returns a function that runs one transaction after another. A deadlock is not a failure,
// because it changed nothing.
func (w *writer) again(write func(context.Context, *writing) error) func(context.Context) {
	return func(ctx context.Context) {
		for ; ctx.Err() == nil; sleep(ctx, 20*time.Millisecond) {
			// The end of the row does not cancel it, because its outcome has to be known.
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
		for _, c := range t.changes {
			if c.version == 0 {
				w.ledger.removed[c.userID] = true
			}
		}
	}
	return err
}

// do runs a statement that returns the id and the version of each user it changed.
func (t *writing) do(ctx context.Context, sql string, args ...any) ([]int64, error) {
	var ids []int64
	var c change
	rows, _ := t.Query(ctx, sql, args...)
	_, err := pgx.ForEachRow(rows, []any{&c.userID, &c.version}, func() error {
		ids = append(ids, c.userID)
		t.changes = append(t.changes, c)
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

// updateMany changes any users, also those of the clients.
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

// rollBack rolls changes back to a savepoint, and sometimes the whole transaction. These changes
// must not have events.
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
