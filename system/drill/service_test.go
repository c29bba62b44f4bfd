package drill

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"user-service/system/env"
)

// killAgainAndAgain alternates between killing a random replica at a random moment, and killing the
// replica whose consumer is at work while it cannot write its log.
func killAgainAndAgain(r *trial) {
	duration := roundsOf(15*time.Second, 6*time.Second)
	for i, end := 0, time.Now().Add(duration); time.Now().Before(end); i++ {
		slot, unblock := rand.N(r.replicas), func() {}
		if i%2 == 0 {
			for other := range r.replicas {
				if r.at(other).LastEvent.Load() > r.at(slot).LastEvent.Load() {
					slot = other
				}
			}
			unblock = r.at(slot).BlockOutput()
			time.Sleep(300 * time.Millisecond)
		}
		time.Sleep(rand.N(500 * time.Millisecond))
		r.at(slot).Kill()
		unblock()
		<-r.at(slot).Ended
		time.Sleep(rand.N(200 * time.Millisecond))
		r.startReplica(slot)
	}
}

func restartRolling(r *trial) {
	for i := range roundsOf(3, 1) * r.replicas {
		slot := i % r.replicas
		r.terminate(slot)
		r.startReplica(slot)
		time.Sleep(300 * time.Millisecond)
	}
}

func killLeader(r *trial) {
	r.over = r.replaceLeader()
}

// replaceLeader kills the leader and starts another replica 5 s later. It returns when it killed.
func (r *trial) replaceLeader() (killed time.Time) {
	r.t.Helper()
	slot := r.leader()
	killed = time.Now()
	r.at(slot).Kill()
	r.eventsFlow(killed, 5*time.Second)
	time.Sleep(5 * time.Second)
	r.startReplica(slot)
	return killed
}

func freezeLeader(r *trial) {
	slot := r.leader()
	r.at(slot).Signal(syscall.SIGSTOP)
	r.eventsFlow(time.Now(), 5*time.Second)
	time.Sleep(30 * time.Second)
	r.at(slot).Signal(syscall.SIGCONT)
}

// delayCommits keeps transactions open after they have drawn the id of their outbox row, so that
// rows with higher ids are committed before them.
func delayCommits(r *trial) {
	duration := roundsOf(20*time.Second, 5*time.Second)
	stop := inBackground(r.t, func(ctx context.Context) {
		for ; ctx.Err() == nil; sleep(ctx, 100*time.Millisecond) {
			r.create()
		}
	})
	for end := time.Now().Add(duration); time.Now().Before(end); {
		r.exec(fmt.Sprintf(`BEGIN;
			INSERT INTO users (name, surname, password) VALUES ('%s', 'Doe', '');
			SELECT pg_sleep(0.4);
			COMMIT`, r.newName()))
		time.Sleep(200 * time.Millisecond)
	}
	stop()
}

// startPrevious starts the replicas as the previous release.
func startPrevious(r *trial) { r.previous = true }

// updateAndBack replaces the replicas one at a time by the current build, and then by the previous
// release again.
func updateAndBack(r *trial) {
	for _, previous := range []bool{false, true} {
		r.previous = previous
		for slot := range r.replicas {
			r.terminate(slot)
			r.startReplica(slot)
			time.Sleep(1500 * time.Millisecond)
		}
	}
}

// drainBacklog makes a backlog of events while RabbitMQ cannot be reached and an old snapshot keeps
// dead rows. SQL writes the backlog, because the API would hash a password for each user.
func drainBacklog(r *trial) {
	const backlog = 100_000
	ctx := r.t.Context()
	r.toRabbit.Cut(true)
	snapshot, err := r.db.Acquire(ctx)
	require(r.t, err)
	defer snapshot.Release()
	_, err = snapshot.Exec(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
	require(r.t, err)
	defer snapshot.Exec(context.Background(), "ROLLBACK")
	r.exec(fmt.Sprintf(`INSERT INTO users (name, surname, password)
		SELECT 'backlog ' || n, 'Doe', '' FROM generate_series(1, %d) AS n`, backlog))
	before := r.at(0).Metric(env.MetricMemory)
	time.Sleep(4 * time.Second)
	quiet := r.p99(time.Now().Add(-4*time.Second), time.Now())
	r.toRabbit.Cut(false)
	r.over = time.Now()
	eventually(r.t, "the backlog shrinks", func() bool { return r.ledger.received.Load() > 1000 })
	begin, first := time.Now(), r.ledger.received.Load()
	peak := 0.0
	for r.outbox.Load() > 500 {
		if time.Since(begin) > 120*time.Second {
			r.t.Fatalf("%d events are left", r.outbox.Load())
		}
		peak = max(peak, r.at(0).Metric(env.MetricMemory))
		time.Sleep(100 * time.Millisecond)
	}
	rate := float64(r.ledger.received.Load()-first) / time.Since(begin).Seconds()
	r.t.Logf("%.0f events/s; resident memory %.0f MB before, peak %.0f MB; "+
		"p99 of changes %v before, %v while the backlog drained",
		rate, before/1e6, peak/1e6, quiet, r.p99(begin, time.Now()))
	if rate < 1500 {
		r.t.Errorf("only %.0f events/s", rate)
	}
}

// vanish has 2,000 clients send a change, or only a part of it, and close the connection.
func vanish(r *trial) {
	id := r.create().id
	var most int
	stop := inBackground(r.t, func(ctx context.Context) {
		for ; ctx.Err() == nil; sleep(ctx, 10*time.Millisecond) {
			var n int
			if r.db.QueryRow(ctx, `SELECT count(*) FROM pg_stat_activity
				WHERE application_name = $1 AND datname = current_database()`,
				env.ApplicationName).Scan(&n) == nil {
				most = max(most, n)
			}
		}
	})
	var left atomic.Int64
	left.Store(2000)
	var vanishing sync.WaitGroup
	for range 100 {
		vanishing.Go(func() {
			for n := left.Add(-1); n >= 0; n = left.Add(-1) {
				r.vanishOnce(id, n)
			}
		})
	}
	vanishing.Wait()
	stop()
	r.t.Logf("at most %d connections", most)
	if most > 20 || most == 0 {
		r.t.Errorf("%d connections to the database", most)
	}
}

// vanishOnce leaves out the end of every second request.
func (r *trial) vanishOnce(id, n int64) {
	conn, err := net.Dial("tcp", strings.TrimPrefix(r.at(0).URL, "http://"))
	if err != nil {
		return
	}
	body := fmt.Sprintf(`{"name": "vanished %d"}`, n)
	request := fmt.Sprintf("PUT /users/%d HTTP/1.1\r\nHost: drill\r\n"+
		"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", id, len(body), body)
	io.WriteString(conn, request[:len(request)-int(n%2)*5])
	time.Sleep(rand.N(5 * time.Millisecond))
	conn.Close()
}
