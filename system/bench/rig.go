package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"user-service/system/env"
)

// The names of the subjects.
const (
	service    = "this service"
	plain      = "net/http + pgx"
	noDatabase = "net/http without database"
	pgbench    = "pgbench"
	onlyArgon  = "argon2id alone"
)

// subject is a running server.
type subject struct {
	*env.Process
	url string
}

// rig is a database with users, and the servers that use it.
type rig struct {
	*servers
	database string
	users    int
	db       *pgxpool.Pool
	subjects map[string]*subject
}

// newRig returns a rig with some users and the servers of some names. The users' events are
// removed, because no measurement is to share the machine with their delivery.
func (s *servers) newRig(database string, users int, names ...string) (*rig, error) {
	ctx := context.Background()
	r := &rig{servers: s, database: database, users: users, subjects: make(map[string]*subject)}
	if err := s.postgres.SQL("CREATE DATABASE " + database + " OWNER bench"); err != nil {
		return nil, err
	}
	for _, args := range [][]string{{"add_vhost", database},
		{"set_permissions", "-p", database, "guest", ".*", ".*", ".*"}} {
		if _, err := s.rabbit.Ctl(ctx, s.rabbit.Nodes[0], args...); err != nil {
			return nil, err
		}
	}
	var err error
	if r.db, err = pgxpool.New(ctx, s.postgres.URL("postgres", database)); err != nil {
		return nil, err
	}
	s.OnClose(r.db.Close)
	migrating, err := r.start(service)
	if err != nil {
		return nil, err
	}
	migrating.End(syscall.SIGTERM)
	if err := r.seed(); err != nil {
		return nil, fmt.Errorf("seeding: %w", err)
	}
	for _, name := range names {
		if r.subjects[name], err = r.start(name); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (r *rig) seed() error {
	log.Printf("seeding %d users", r.users)
	for _, sql := range []string{
		fmt.Sprintf(`INSERT INTO users (name, surname, password)
			SELECT 'John ' || n, 'Doe', repeat('x', 97) FROM generate_series(1, %d) AS n`, r.users),
		"TRUNCATE outbox",
		"VACUUM (FREEZE, ANALYZE) users",
		"CHECKPOINT",
	} {
		if _, err := r.db.Exec(context.Background(), sql); err != nil {
			return err
		}
	}
	return nil
}

// start starts a server, whose log goes to a file. It returns when the server answers.
func (r *rig) start(name string) (*subject, error) {
	path, err := os.Executable()
	args := []string{"serve", name}
	if name == service {
		path, err = r.Executable()
		args = nil
	}
	if err != nil {
		return nil, err
	}
	port := env.FreePort()
	s := &subject{url: "http://127.0.0.1:" + port}
	s.Process = &env.Process{
		Command: func() (*exec.Cmd, error) {
			output, err := r.Log(fmt.Sprintf("%s.%s.log", r.database, port))
			if err != nil {
				return nil, err
			}
			cmd := exec.Command(path, args...)
			cmd.Dir, cmd.Stdout, cmd.Stderr = r.Dir, output, output
			cmd.Env = append(os.Environ(), "PORT="+port,
				"DATABASE_URL="+r.postgres.URL("bench", r.database),
				"RABBITMQ_URL="+r.rabbit.URL()+r.database)
			return cmd, nil
		},
		Answers: func() error { return send(http.MethodGet, s.url+"/healthz", "") },
	}
	r.OnClose(func() { s.End(syscall.SIGKILL) })
	return s, s.Start()
}

// send sends a request and returns an error if the answer is not 2xx.
func send(method, url, body string) error {
	request, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	return drain(response)
}

// stop ends the servers of the rig and drops its database.
func (r *rig) stop() error {
	for _, s := range r.subjects {
		s.End(syscall.SIGTERM)
	}
	r.db.Close()
	return r.postgres.SQL("DROP DATABASE " + r.database)
}

// check expects that every event was delivered, and that the service's total is exact.
func (r *rig) check() error {
	ctx := context.Background()
	pending := -1
	for deadline := time.Now().Add(20 * time.Second); pending != 0; time.Sleep(50 * time.Millisecond) {
		if err := r.db.QueryRow(ctx, "SELECT count(*) FROM outbox").Scan(&pending); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d events are pending after 20 s", pending)
		}
	}
	var counted, total int
	err := r.db.QueryRow(ctx, `SELECT (SELECT count(*) FROM users),
		(SELECT sum(n) FROM user_counts)`).Scan(&counted, &total)
	if err == nil && counted != total {
		err = errors.New(fmt.Sprint("there are ", counted, " users, but the total is ", total))
	}
	return err
}
