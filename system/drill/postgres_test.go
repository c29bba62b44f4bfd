package drill

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"user-service/system/env"
)

// terminateSessions ends the connections of the service.
const terminateSessions = `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
	WHERE usename = 'drill'`

func restartFast(r *trial)      { require(r.t, r.postgres.Restart(syscall.SIGINT)) }
func restartImmediate(r *trial) { require(r.t, r.postgres.Restart(syscall.SIGQUIT)) }

func terminateConnections(r *trial) {
	for range 5 {
		r.exec(terminateSessions)
		time.Sleep(time.Second)
	}
	r.exec(terminateSessions)
}

func makeReadOnly(r *trial) {
	require(r.t, r.postgres.SQL("ALTER SYSTEM SET default_transaction_read_only = on",
		"SELECT pg_reload_conf()", terminateSessions))
	time.Sleep(4 * time.Second)
	require(r.t, r.postgres.SQL("SET transaction_read_only = off",
		"ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()"))
	r.over = time.Now()
	r.exec(terminateSessions)
}

func freezePostgres(r *trial) {
	thaw, err := r.postgres.Freeze(r.t.Context(), r.db)
	require(r.t, err)
	time.Sleep(8 * time.Second)
	thaw()
}

// freezeSession freezes one session of the service again and again, and expects that changes go on
// over the others. The session is idle then, so that it holds no lock of the server.
func freezeSession(r *trial) {
	for range roundsOf(5, 2) {
		pid := r.freezeIdle()
		frozen := time.Now()
		time.Sleep(2 * time.Second)
		r.mu.Lock()
		changes := 0
		for _, a := range r.attempts {
			if a.outcome == outcomeOK && a.begun.Sub(frozen) > time.Second {
				changes++
			}
		}
		r.mu.Unlock()
		syscall.Kill(pid, syscall.SIGCONT)
		if changes < 10 {
			r.t.Errorf("%d changes in the last second of 2 s in which a session was frozen", changes)
		}
		time.Sleep(time.Second)
	}
}

// freezeIdle freezes the session that made the last change, which the service will use again first,
// and returns its process id.
func (r *trial) freezeIdle() int {
	r.t.Helper()
	for {
		var pid int
		err := r.db.QueryRow(r.t.Context(), `SELECT pid FROM pg_stat_activity
			WHERE usename = 'drill' AND state = 'idle' AND query LIKE '%UPDATE users%'
			ORDER BY state_change DESC LIMIT 1`).Scan(&pid)
		if errors.Is(err, pgx.ErrNoRows) {
			continue
		}
		require(r.t, err)
		require(r.t, syscall.Kill(pid, syscall.SIGSTOP))
		r.t.Cleanup(func() { syscall.Kill(pid, syscall.SIGCONT) })
		var idle bool
		require(r.t, r.db.QueryRow(r.t.Context(),
			"SELECT state = 'idle' FROM pg_stat_activity WHERE pid = $1", pid).Scan(&idle))
		if idle {
			return pid
		}
		syscall.Kill(pid, syscall.SIGCONT)
	}
}

func lockTable(r *trial) {
	r.exec("BEGIN; LOCK TABLE users; SELECT pg_sleep(8); COMMIT")
}

// fillConnections takes every connection that an ordinary role can have, those of the service
// first.
func fillConnections(r *trial) {
	ctx, cancel := context.WithTimeout(r.t.Context(), 5*time.Second)
	defer cancel()
	var fill sync.WaitGroup
	for range 60 {
		fill.Go(func() {
			for ; ctx.Err() == nil; sleep(ctx, 50*time.Millisecond) {
				conn, err := pgx.Connect(ctx, r.postgres.URL("filler", "postgres"))
				if err == nil {
					<-ctx.Done()
					conn.Close(context.Background())
				}
			}
		})
	}
	for range 10 {
		r.exec(terminateSessions)
		time.Sleep(100 * time.Millisecond)
	}
	fill.Wait()
}

func loseAnswers(r *trial) {
	for range 5 {
		swallow(r.toPostgres, env.FromServer, 500*time.Millisecond)
		time.Sleep(time.Second)
	}
}

func useAsynchronousPair(r *trial) { r.usePair("async") }

func useSynchronousPair(r *trial) { r.usePair("sync") }

// usePair starts a primary and a standby, which the replicas and the checks of this row use. state
// is what the primary calls its standby in pg_stat_replication.
func (r *trial) usePair(state string) {
	r.t.Helper()
	pair, err := r.StartPair(postgresSettings...)
	require(r.t, err)
	r.t.Cleanup(pair.Remove)
	require(r.t, pair.Primary.SQL("CREATE ROLE drill LOGIN", "CREATE DATABASE drill OWNER drill"))
	if state == "sync" {
		require(r.t, pair.RequireStandby())
	}
	r.pair, r.dbName, r.serviceURL = pair, "drill", pair.URL("drill", "drill")
	r.openDB(pair.URL("postgres", "drill"))
	eventually(r.t, "the standby is "+state, func() bool {
		var got string
		err := r.db.QueryRow(r.t.Context(), `SELECT sync_state FROM pg_stat_replication
			WHERE application_name = 'standby' AND state = 'streaming'`).Scan(&got)
		return err == nil && got == state
	})
}

// failOver kills a primary whose standby is 0.3 s behind, and promotes the standby.
func failOver(r *trial) {
	time.Sleep(2 * time.Second)
	r.pair.ToPrimary.Hold(env.FromServer)
	time.Sleep(300 * time.Millisecond)
	r.takeOver()
}

// failOverBehind does the same after the standby received nothing for so long that clients were
// told that the outcome is unknown, and their changes became visible on the primary.
func failOverBehind(r *trial) {
	stop := inBackground(r.t, r.keepCreating, r.keepCreating)
	for range roundsOf(3, 1) {
		r.pair.ToPrimary.Release(env.FromServer)
		time.Sleep(2 * time.Second)
		r.pair.ToPrimary.Hold(env.FromServer)
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
			r.t.Error("no client was told that the outcome of its change is unknown")
		}
	})
}

// takeOver disconnects the standby, kills the primary, and promotes the standby.
func (r *trial) takeOver() {
	r.t.Helper()
	r.pair.ToPrimary.Cut(true)
	require(r.t, r.pair.Primary.Kill(r.t.Context()))
	time.Sleep(500 * time.Millisecond)
	require(r.t, r.pair.Promote())
	r.over = time.Now()
}

// checkPublished expects a standby that receives nothing to have the change of each event so far.
func (r *trial) checkPublished() {
	r.t.Helper()
	type published struct{ highest, deletion int64 }
	events := make(map[int64]published)
	r.ledger.mu.Lock()
	for id, h := range r.ledger.users {
		events[id] = published{h.highest, h.deletion}
	}
	r.ledger.mu.Unlock()
	conn, err := pgx.Connect(r.t.Context(), r.pair.Standby.URL("postgres", r.dbName))
	require(r.t, err)
	defer conn.Close(r.t.Context())
	// A deleted user has the version 0.
	rows, _ := conn.Query(r.t.Context(), `SELECT id, version FROM users
		UNION ALL SELECT user_id, 0 FROM outbox WHERE event_type = 'user.deleted'`)
	replicated := make(map[int64]int64)
	var id, version int64
	_, err = pgx.ForEachRow(rows, []any{&id, &version}, func() error {
		replicated[id] = version
		return nil
	})
	require(r.t, err)
	ahead := 0
	for id, e := range events {
		version, found := replicated[id] // not found: deleted, and the event was published
		deleted := !found || version == 0
		complete := found && (deleted || version >= e.highest)
		if e.deletion > 0 {
			complete = deleted
		}
		if !complete {
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

// silenceStandby holds back what the standby receives, for 8 s. Commits wait for it; reads do not.
func silenceStandby(r *trial) {
	u := r.create()
	if u == nil {
		r.t.Fatal("a user could not be created before the fault")
	}
	stop := inBackground(r.t, r.keepCreating, r.keepCreating)
	time.Sleep(time.Second)
	r.pair.ToPrimary.Hold(env.FromServer)
	silent := time.Now()
	ready := make(map[int]int) // number of answers by status
	for i := 0; time.Since(silent) < 8*time.Second; i++ {
		url := r.at(i % r.replicas).URL
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
	r.pair.ToPrimary.Release(env.FromServer)
	stop()
	r.finally(func() {
		refused := r.checkRefused(silent)
		r.t.Logf("%d changes were refused while the standby was silent; statuses of /readyz: %v",
			refused, ready)
		if refused == 0 {
			r.t.Error("no change was refused while the standby was silent")
		}
	})
}

// checkRefused returns the number of attempts from silent to the end of the fault, and expects that
// none of them was acknowledged.
func (r *trial) checkRefused(silent time.Time) (refused int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.attempts {
		if a.begun.Before(silent) || a.done.After(r.over) {
			continue
		}
		refused++
		if a.outcome == outcomeOK {
			what := "a change"
			if a.change.version == 1 {
				what = "a creation"
			}
			r.problems[what+" was acknowledged that the standby did not have"]++
		}
	}
	return refused
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

// switchOver stops the primary in order, so that it ends when the standby has received everything,
// and promotes the standby.
func switchOver(r *trial) {
	time.Sleep(2 * time.Second)
	begin := time.Now()
	r.pair.Primary.End(syscall.SIGINT)
	took := time.Since(begin)
	r.t.Logf("the primary stopped in %v", took.Round(time.Millisecond))
	if took > 9*time.Second {
		r.t.Error("the primary had to be killed")
	}
	require(r.t, r.pair.Promote())
	r.over = time.Now()
}

// useBouncer puts a PgBouncer between the replicas and PostgreSQL.
func (r *trial) useBouncer(mode string) {
	r.t.Helper()
	var err error
	r.bouncer, err = r.StartPgBouncer(r.postgres, mode, "drill", r.dbName)
	require(r.t, err)
	r.t.Cleanup(func() { r.bouncer.End(syscall.SIGKILL) })
	r.serviceURL = r.bouncer.URL(r.dbName)
}

// disturbPooled kills the leader, restarts PgBouncer, and ends the connections behind it. After
// that, no event is delivered again, and one replica leads.
func disturbPooled(r *trial) {
	r.replaceLeader()

	r.bouncer.End(syscall.SIGKILL)
	time.Sleep(500 * time.Millisecond)
	require(r.t, r.bouncer.Start())
	r.answersCome(time.Now(), 2*time.Second)
	time.Sleep(3 * time.Second)

	r.exec(terminateSessions)
	r.over = time.Now()
	r.answersCome(r.over, 2*time.Second)
	r.eventsFlow(r.over, 5*time.Second)
	time.Sleep(5 * time.Second)
	quiet := time.Now()
	for time.Since(quiet) < 3*time.Second {
		if n := r.leaders(); n != 1 {
			r.problem("%d replicas lead without a fault", n)
		}
		time.Sleep(200 * time.Millisecond)
	}
	r.finally(func() { r.checkPooled(quiet) })
}

func (r *trial) checkPooled(quiet time.Time) {
	const faults = 3
	for _, s := range r.started { // each at a time when PgBouncer and PostgreSQL ran
		said := s.Notable()
		if i := strings.Index(said, env.LogWaiting); i >= 0 {
			r.t.Errorf("a replica waited during its start: %.300s", said[i:])
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
		r.t.Errorf("%d events were delivered again without a fault", late)
	}
	// A fault repeats at most what was in the outbox.
	most := faults * int(r.largest.Load())
	if n := len(r.ledger.repeated); n > most {
		r.t.Errorf("%d events were delivered again; the faults explain at most %d", n, most)
	}
}
