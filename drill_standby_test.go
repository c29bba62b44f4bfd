package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// pair is a primary and its streaming standby. A trial that has one does not use the PostgreSQL
// of the other trials.
type pair struct {
	primary, standby *postgresServer
	toPrimary        *wire // the standby receives over it
}

const readWriteOnly = "target_session_attrs=read-write"

// url names both servers; only the one that takes writes will do.
func (p *pair) url(role string) string {
	return fmt.Sprintf("postgres://%s@127.0.0.1:%s,127.0.0.1:%s/drill?%s",
		role, p.primary.port, p.standby.port, readWriteOnly)
}

func useAsynchronousPair(r *trial) { r.usePair(false) }
func useSynchronousPair(r *trial)  { r.usePair(true) }

// usePair starts a pair, which the replicas and the drill use from then on.
func (r *trial) usePair(synchronous bool) {
	r.t.Helper()
	p, err := r.startPair(r.t)
	if err == nil && synchronous {
		err = trySQLAt(p.primary.url("postgres", "postgres"),
			"ALTER SYSTEM SET synchronous_standby_names = 'standby'", "SELECT pg_reload_conf()")
	}
	if err != nil {
		r.t.Fatal(err)
	}
	db, err := pgxpool.New(r.t.Context(), p.url("postgres"))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(db.Close)
	r.pair, r.db, r.serviceURL = p, db, p.url("drill")
	state := "async"
	if synchronous {
		state = "sync"
	}
	eventually(r.t, "a standby that is "+state, func() bool {
		var got string
		err := db.QueryRow(r.t.Context(), `SELECT sync_state FROM pg_stat_replication
			WHERE application_name = 'standby' AND state = 'streaming'`).Scan(&got)
		return err == nil && got == state
	})
}

func (s *servers) startPair(t *testing.T) (*pair, error) {
	t.Helper()
	s.databases++
	primary, err := s.newPostgres(fmt.Sprintf("primary_%d", s.databases), freePort())
	if err != nil {
		return nil, err
	}
	standby, err := s.newPostgres(fmt.Sprintf("standby_%d", s.databases), freePort())
	if err != nil {
		return nil, err
	}
	initdb, err := s.initdb(primary)
	if err != nil {
		return nil, err
	}
	if output, err := initdb.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w\n%s", err, output)
	}
	for _, p := range []*postgresServer{primary, standby} {
		s.atEnd(t, func() {
			p.remove()
			os.RemoveAll(p.data)
		})
	}
	if err := primary.start(); err != nil {
		return nil, err
	}
	if err := trySQLAt(primary.url("postgres", "postgres"),
		"CREATE ROLE drill LOGIN", "CREATE DATABASE drill OWNER drill"); err != nil {
		return nil, err
	}
	p := &pair{primary, standby, newWire(t, primary.url("postgres", "postgres"))}
	path, err := findProgram("pg_basebackup", debianPostgres)
	if err != nil {
		return nil, err
	}
	host, port, _ := net.SplitHostPort(p.toPrimary.listener.Addr().String())
	backup := s.unprivileged(standby.data, path, "--pgdata", standby.data, "--write-recovery-conf",
		"--checkpoint", "fast", "--no-sync", "--dbname",
		fmt.Sprintf("host=%s port=%s user=postgres application_name=standby", host, port))
	if output, err := backup.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("pg_basebackup: %w\n%s", err, output)
	}
	return p, standby.start()
}

// kill ends every process of the server at the same moment, as a power failure does.
func (p *postgresServer) kill(t *testing.T) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), p.url("postgres", "postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	p.signal(syscall.SIGSTOP) // from here on there is no new process
	rows, _ := conn.Query(t.Context(), "SELECT pid FROM pg_stat_activity")
	pids, err := pgx.CollectRows(rows, pgx.RowTo[int])
	for _, signal := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGKILL} {
		for _, pid := range pids {
			syscall.Kill(pid, signal)
		}
	}
	p.signal(syscall.SIGKILL)
	p.end(syscall.SIGKILL)
	p.killed = true
	if err != nil {
		t.Fatal(err)
	}
}

// remove ends the server. One that was killed left shared memory behind: it removes that when
// it starts again and ends well.
func (p *postgresServer) remove() {
	if p.killed {
		p.start()
	}
	p.end(syscall.SIGQUIT)
}

// promote makes the standby the primary.
func (p *pair) promote(t *testing.T) {
	t.Helper()
	err := trySQLAt(p.standby.url("postgres", "postgres"), "SELECT pg_promote(true, 20)")
	if err == nil {
		err = trySQLAt(p.url("postgres"), "SELECT 1")
	}
	if err != nil {
		t.Fatal(err)
	}
}

// useBouncer puts a PgBouncer between the replicas and PostgreSQL. Its settings are its own
// defaults, but for where it listens and that it asks for no password.
func (r *trial) useBouncer(mode string) {
	r.t.Helper()
	path, err := findProgram("pgbouncer", "/usr/sbin")
	if err != nil {
		missing(r.t, "PgBouncer", err)
	}
	r.databases++
	name := fmt.Sprintf("bouncer_%d", r.databases)
	dir, err := r.unprivilegedDir(name)
	if err != nil {
		r.t.Fatal(err)
	}
	port := freePort()
	users, settings := filepath.Join(dir, "users"), filepath.Join(dir, "ini")
	err = errors.Join(r.unprivilegedFile(users, `"drill" ""`+"\n"),
		r.unprivilegedFile(settings, fmt.Sprintf(`[databases]
* = host=127.0.0.1 port=%s
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %s
unix_socket_dir =
auth_type = trust
auth_file = %s
pool_mode = %s
`, r.postgresPort, port, users, mode)))
	if err != nil {
		r.t.Fatal(err)
	}
	r.serviceURL = fmt.Sprintf("postgres://drill@127.0.0.1:%s/%s",
		port, r.db.Config().ConnConfig.Database)
	r.bouncer = &daemon{
		command: func() *exec.Cmd {
			cmd := r.unprivileged(dir, path, settings)
			cmd.Stderr = r.log(name + ".log")
			return cmd
		},
		answers: func() error { return trySQLAt(r.serviceURL) },
	}
	r.atEnd(r.t, func() { r.bouncer.end(syscall.SIGKILL) })
	if err := r.bouncer.start(); err != nil {
		r.t.Fatalf("%v\n%s", err, r.tail(name+".log"))
	}
}

// bouncerVersion returns such as "PgBouncer 1.18.0".
func bouncerVersion() string {
	path, err := findProgram("pgbouncer", "/usr/sbin")
	if err != nil {
		return "no PgBouncer"
	}
	output, _ := exec.Command(path, "--version").Output()
	version, _, _ := strings.Cut(string(output), "\n")
	return version
}

// unprivilegedFile writes a file that an unprivileged program reads.
func (s *servers) unprivilegedFile(path, content string) error {
	err := os.WriteFile(path, []byte(content), 0o600)
	if err == nil && s.postgresOwner != nil {
		err = os.Chown(path, int(s.postgresOwner.Uid), int(s.postgresOwner.Gid))
	}
	return err
}

// buildPrevious returns the path of the service of commit c223611, which it builds once.
func (s *servers) buildPrevious(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("TEST_PREVIOUS_EXECUTABLE"); path != "" { // .ci/confined built it
		return path
	}
	path := filepath.Join(s.dir, "user-service-previous")
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if output, err := exec.Command(".ci/previous", path).CombinedOutput(); err != nil {
		t.Fatalf(".ci/previous: %v\n%s", err, output)
	}
	return path
}
