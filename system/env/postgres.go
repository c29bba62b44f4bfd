package env

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

const debianPostgres = "/usr/lib/postgresql/*/bin"

// Postgres is a PostgreSQL server with a data directory of its own. Its superuser is postgres, and
// it asks nobody for a password.
type Postgres struct {
	*Process
	Port string

	env    *Env
	data   string // the directory
	log    string // the name of its log
	killed bool   // and not started since
}

// StartPostgres starts an empty server. Settings are such as "max_connections=60", and come on top
// of PostgreSQL's defaults.
func (e *Env) StartPostgres(settings ...string) (*Postgres, error) {
	p, err := e.newPostgres(settings)
	if err != nil {
		return nil, err
	}
	if err := p.initDB(); err != nil {
		return nil, err
	}
	return p, p.Start()
}

// newPostgres returns a server whose data directory is still empty.
func (e *Env) newPostgres(settings []string) (*Postgres, error) {
	path, err := findProgram("postgres", debianPostgres)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprint("postgres_", e.serial.Add(1))
	data, err := e.unprivilegedDir(name)
	if err != nil {
		return nil, err
	}
	p := &Postgres{env: e, data: data, Port: FreePort(), log: name + ".log"}
	args := []string{"-D", data, "-p", p.Port}
	for _, setting := range append([]string{"listen_addresses=127.0.0.1",
		"unix_socket_directories=" + data, "fsync=on"}, settings...) {
		args = append(args, "-c", setting)
	}
	p.Process = &Process{
		Command: func() (*exec.Cmd, error) { return e.unprivileged(data, p.log, path, args...) },
		Answers: func() error { return p.SQL("SELECT 1") },
	}
	e.OnClose(p.Remove)
	return p, nil
}

func (p *Postgres) initDB() error {
	path, err := findProgram("initdb", debianPostgres)
	if err != nil {
		return err
	}
	cmd, err := p.env.unprivileged(p.data, "", path, "-D", p.data, "-U", "postgres", "-A", "trust",
		"-E", "UTF8", "--no-locale", "--no-sync")
	if err != nil {
		return err
	}
	return output(cmd)
}

// Start starts the server.
func (p *Postgres) Start() error {
	if err := p.Process.Start(); err != nil {
		return fmt.Errorf("%w\n%s", err, p.env.Tail(p.log))
	}
	p.killed = false
	return nil
}

// URL returns the URL of a database, for a role.
func (p *Postgres) URL(role, database string) string {
	return fmt.Sprintf("postgres://%s@127.0.0.1:%s/%s", role, p.Port, database)
}

// SQL runs statements as the superuser in the database postgres, each in its own transaction.
func (p *Postgres) SQL(statements ...string) error {
	return SQL(p.URL("postgres", "postgres"), statements...)
}

// SQL runs statements over one new connection, each in its own transaction, within 20 s.
func SQL(url string, statements ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	for _, statement := range statements {
		if _, err := conn.Exec(ctx, statement); err != nil {
			return fmt.Errorf("%s: %w", statement, err)
		}
	}
	return nil
}

// Version returns the version that the server reports, such as "15.20", without what a distribution
// adds to it.
func (p *Postgres) Version(ctx context.Context) (string, error) {
	conn, err := pgx.Connect(ctx, p.URL("postgres", "postgres"))
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	var reported string
	err = conn.QueryRow(ctx, "SHOW server_version").Scan(&reported)
	version, _, _ := strings.Cut(reported, " ")
	return version, err
}

// Restart does what pg_ctl restart does: SIGINT is its mode fast, SIGQUIT its mode immediate.
func (p *Postgres) Restart(signal syscall.Signal) error {
	p.End(signal)
	return p.Start()
}

// Freeze stops every process of the server until thaw is called. It learns their ids over a
// connection of db. They are not in one process group.
func (p *Postgres) Freeze(ctx context.Context, db *pgxpool.Pool) (thaw func(), err error) {
	conn, err := db.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Release()
	p.SignalGroup(syscall.SIGSTOP) // from here on there is no new process
	pids, err := backends(ctx, conn.Conn())
	thaw = p.env.OnClose(func() {
		signalAll(pids, syscall.SIGCONT)
		p.SignalGroup(syscall.SIGCONT)
	})
	if err != nil {
		thaw()
		return nil, err
	}
	signalAll(pids, syscall.SIGSTOP)
	return thaw, nil
}

// Kill ends every process of the server at the same moment, as a power failure does.
func (p *Postgres) Kill(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, p.URL("postgres", "postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	p.SignalGroup(syscall.SIGSTOP) // from here on there is no new process
	pids, err := backends(ctx, conn)
	signalAll(pids, syscall.SIGSTOP)
	signalAll(pids, syscall.SIGKILL)
	p.SignalGroup(syscall.SIGKILL)
	p.End(syscall.SIGKILL)
	p.killed = true
	return err
}

// backends returns the ids of all processes of a server but its first.
func backends(ctx context.Context, conn *pgx.Conn) ([]int, error) {
	rows, _ := conn.Query(ctx, "SELECT pid FROM pg_stat_activity")
	return pgx.CollectRows(rows, pgx.RowTo[int])
}

func signalAll(pids []int, signal syscall.Signal) {
	for _, pid := range pids {
		syscall.Kill(pid, signal)
	}
}

// Remove ends the server and removes its data. A server that was killed left shared memory behind,
// which it removes when it starts again and ends in order.
func (p *Postgres) Remove() {
	if p.killed {
		p.Start()
	}
	p.End(syscall.SIGQUIT)
	os.RemoveAll(p.data)
}

// Pair is a primary and its streaming standby.
type Pair struct {
	Primary, Standby *Postgres
	ToPrimary        *Proxy // the standby receives through it
}

// StartPair starts a primary and a standby that replicates asynchronously. The settings are those
// of both servers. The database drill belongs to the role drill.
func (e *Env) StartPair(settings ...string) (*Pair, error) {
	primary, err := e.StartPostgres(settings...)
	if err != nil {
		return nil, err
	}
	standby, err := e.newPostgres(settings)
	if err != nil {
		return nil, err
	}
	p := &Pair{Primary: primary, Standby: standby}
	if p.ToPrimary, err = e.NewProxy(primary.URL("postgres", "postgres")); err != nil {
		return nil, err
	}
	path, err := findProgram("pg_basebackup", debianPostgres)
	if err != nil {
		return nil, err
	}
	host, port := p.ToPrimary.hostPort()
	backup, err := e.unprivileged(standby.data, "", path, "--pgdata", standby.data,
		"--write-recovery-conf", "--checkpoint", "fast", "--no-sync", "--dbname",
		fmt.Sprintf("host=%s port=%s user=postgres application_name=standby", host, port))
	if err != nil {
		return nil, err
	}
	if err := output(backup); err != nil {
		return nil, err
	}
	return p, standby.Start()
}

// URL names both servers. Only the one that accepts writes is used.
func (p *Pair) URL(role, database string) string {
	return fmt.Sprintf("postgres://%s@127.0.0.1:%s,127.0.0.1:%s/%s?target_session_attrs=read-write",
		role, p.Primary.Port, p.Standby.Port, database)
}

// RequireStandby makes commits of the primary wait for the standby.
func (p *Pair) RequireStandby() error {
	return p.Primary.SQL("ALTER SYSTEM SET synchronous_standby_names = 'standby'",
		"SELECT pg_reload_conf()")
}

// Promote makes the standby the primary, and returns when it accepts writes.
func (p *Pair) Promote() error {
	if err := p.Standby.SQL("SELECT pg_promote(true, 20)"); err != nil {
		return err
	}
	return SQL(p.URL("postgres", "postgres"), "SELECT 1")
}

// Remove ends both servers and removes their data.
func (p *Pair) Remove() {
	p.ToPrimary.Close()
	p.Standby.Remove()
	p.Primary.Remove()
}

// PgBouncer is a pooler in front of a PostgreSQL server.
type PgBouncer struct {
	*Process
	port, role string
}

// URL returns the URL of a database.
func (b *PgBouncer) URL(database string) string {
	return fmt.Sprintf("postgres://%s@127.0.0.1:%s/%s", b.role, b.port, database)
}

// StartPgBouncer starts a pooler in front of target for one role. Its settings are its defaults,
// except for the mode, where it listens and that it asks for no password.
func (e *Env) StartPgBouncer(target *Postgres, mode, role, database string) (*PgBouncer, error) {
	path, err := findPgBouncer()
	if err != nil {
		return nil, err
	}
	name := fmt.Sprint("pgbouncer_", e.serial.Add(1))
	dir, err := e.unprivilegedDir(name)
	if err != nil {
		return nil, err
	}
	b := &PgBouncer{port: FreePort(), role: role}
	users, settings := filepath.Join(dir, "users"), filepath.Join(dir, "ini")
	if err := e.unprivilegedFile(users, fmt.Sprintf("%q \"\"\n", role)); err != nil {
		return nil, err
	}
	lines := []string{
		"[databases]", "* = host=127.0.0.1 port=" + target.Port,
		"[pgbouncer]", "listen_addr = 127.0.0.1", "listen_port = " + b.port, "unix_socket_dir =",
		"auth_type = trust", "auth_file = " + users, "pool_mode = " + mode, "",
	}
	if err := e.unprivilegedFile(settings, strings.Join(lines, "\n")); err != nil {
		return nil, err
	}
	b.Process = &Process{
		Command: func() (*exec.Cmd, error) { return e.unprivileged(dir, name+".log", path, settings) },
		Answers: func() error { return SQL(b.URL(database)) },
	}
	e.OnClose(func() { b.End(syscall.SIGKILL) })
	if err := b.Start(); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, e.Tail(name+".log"))
	}
	return b, nil
}

// PgBouncerVersion returns such as "PgBouncer 1.18.0".
func PgBouncerVersion() string {
	path, err := findPgBouncer()
	if err != nil {
		return "no PgBouncer"
	}
	output, _ := exec.Command(path, "--version").Output()
	lines := slices.Collect(strings.Lines(string(output)))
	return strings.TrimSpace(strings.Join(lines[:min(1, len(lines))], ""))
}

func findPgBouncer() (string, error) { return findProgram("pgbouncer", "/usr/sbin") }
