package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"user-service/system/env"
)

// servers are the PostgreSQL and the RabbitMQ of all measurements.
type servers struct {
	*env.Env
	postgres *env.Postgres
	rabbit   *env.RabbitMQ
	users    int
	shared   *rig
}

func startServers(e *env.Env, users int) (*servers, error) {
	s := &servers{Env: e, users: users}
	var err error
	s.postgres, err = e.StartPostgres("max_connections=200",
		"track_activity_query_size=16384")
	if err != nil {
		return nil, err
	}
	if err := s.postgres.SQL("CREATE ROLE bench LOGIN"); err != nil {
		return nil, err
	}
	s.rabbit, err = e.StartRabbitMQ()
	return s, err
}

// rig is a database and a vhost of the service, and a database and a vhost of its peers, with the
// same users.
type rig struct {
	*servers
	database string
	users    int
	db       *pgxpool.Pool // the service's database
	argon    argonParameters
	running  []*subject

	deleted, peersDeleted atomic.Int64 // users of the two databases
	acknowledged          atomic.Int64 // PUT requests that the service answered with 2xx
	consumed              int          // events, by services that were stopped
}

// peersSuffix distinguishes the names of the peers' database and vhost from the service's.
const peersSuffix = "_peers"

// rig returns the rig that most sections share.
func (s *servers) rig() (r *rig, err error) {
	if s.shared != nil {
		return s.shared, nil
	}
	if s.shared, err = s.newRig("bench", s.users); err != nil {
		return nil, err
	}
	if err := s.addVhost("bench" + peersSuffix); err != nil {
		return nil, err
	}
	return s.shared, s.shared.seedPeers(context.Background())
}

// newRig creates a rig without a database for peers.
func (s *servers) newRig(database string, users int) (*rig, error) {
	ctx := context.Background()
	r := &rig{servers: s, database: database, users: users}
	if err := s.addVhost(database); err != nil {
		return nil, err
	}
	if err := s.postgres.SQL("CREATE DATABASE " + database + " OWNER bench"); err != nil {
		return nil, err
	}
	migrating, err := r.start(service)
	if err != nil {
		return nil, err
	}
	r.stop(migrating)
	if r.db, err = pgxpool.New(ctx, s.postgres.URL("postgres", database)); err != nil {
		return nil, err
	}
	s.OnClose(r.db.Close)
	if err := r.seed(ctx); err != nil {
		return nil, fmt.Errorf("seeding: %w", err)
	}
	return r, r.readArgon()
}

func (s *servers) addVhost(name string) error {
	for _, args := range [][]string{{"add_vhost", name},
		{"set_permissions", "-p", name, "guest", ".*", ".*", ".*"}} {
		if _, err := s.rabbit.Ctl(context.Background(), s.rabbit.Nodes[0], args...); err != nil {
			return err
		}
	}
	return nil
}

// subject is a running server.
type subject struct {
	*env.Process
	name     string
	address  string
	url      string
	database string // and its vhost
	store    int    // the process of a database other than PostgreSQL; 0: none
}

// start starts a server with additional environment variables. Its log goes to a file. It returns
// when the server answers.
func (r *rig) start(name string, variables ...string) (*subject, error) {
	port := env.FreePort()
	s := &subject{name: name, address: "127.0.0.1:" + port, url: "http://127.0.0.1:" + port,
		database: r.database + peersSuffix}
	path, err := os.Executable()
	args := []string{"serve", name}
	if name == service {
		s.database = r.database
		path, err = r.Executable()
		args = nil
	}
	if err != nil {
		return nil, err
	}
	variables = append([]string{"PORT=" + port,
		"DATABASE_URL=" + r.postgres.URL("bench", s.database),
		"RABBITMQ_URL=" + r.rabbit.URL() + s.database, "ARGON2=" + r.argon.String()}, variables...)
	s.Process = &env.Process{
		Command: func() (*exec.Cmd, error) {
			output, err := r.Log(fmt.Sprintf("%s.%s.log", r.database, port))
			if err != nil {
				return nil, err
			}
			cmd := exec.Command(path, args...)
			cmd.Dir, cmd.Stdout, cmd.Stderr = r.Dir, output, output
			cmd.Env = append(os.Environ(), variables...)
			return cmd, nil
		},
		Answers: func() error { return send(http.MethodGet, s.url+"/healthz", "") },
	}
	r.OnClose(func() { s.End(syscall.SIGKILL) })
	r.running = append(r.running, s)
	return s, s.Start()
}

// startAll starts servers of the shared rig by name.
func (s *servers) startAll(names []string, variables ...string) (r *rig,
	subjects map[string]*subject, err error) {
	r, err = s.rig()
	subjects = make(map[string]*subject)
	for _, name := range names {
		if err != nil {
			break
		}
		subjects[name], err = r.start(name, variables...)
	}
	return r, subjects, err
}

// stop ends servers.
func (r *rig) stop(subjects ...*subject) {
	for _, s := range subjects {
		if s.name == service {
			r.consumed += s.consumed()
		}
		s.End(syscall.SIGTERM)
		r.running = slices.DeleteFunc(r.running, func(t *subject) bool { return t == s })
	}
}

// load returns a load for a subject.
func (r *rig) load(s *subject, m mix) load {
	l := load{address: s.address, mix: m, users: r.users, deleted: &r.peersDeleted}
	if s.name == service {
		l.deleted, l.acknowledged = &r.deleted, &r.acknowledged
	}
	return l
}

// readArgon learns the cost of the service's hashes from one in the database.
func (r *rig) readArgon() error {
	s, err := r.start(service)
	if err != nil {
		return err
	}
	if err := send(http.MethodPost, s.url+"/users", newUser); err != nil {
		return err
	}
	var hash string
	err = r.db.QueryRow(context.Background(),
		"SELECT password FROM users ORDER BY id DESC LIMIT 1").Scan(&hash)
	if err == nil {
		_, err = fmt.Sscanf(hash, "$argon2id$v=19$"+argonFormat+"$",
			&r.argon.memory, &r.argon.time, &r.argon.threads)
	}
	if err != nil {
		return err
	}
	return r.finish()
}

// settleTime is how long settle and check wait.
const settleTime = 30 * time.Second

// settle waits until all events are delivered and the writes of the last measurement are done.
func (r *rig) settle() error {
	pending := -1
	for deadline := time.Now().Add(settleTime); pending != 0; time.Sleep(50 * time.Millisecond) {
		err := r.db.QueryRow(context.Background(), "SELECT count(*) FROM outbox").Scan(&pending)
		if err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d events are pending after %v", pending, settleTime)
		}
	}
	time.Sleep(500 * time.Millisecond)
	return nil
}

// finish runs check, and ends all servers of the rig.
func (r *rig) finish() error {
	if err := r.check(); err != nil {
		return fmt.Errorf("checking the results: %w", err)
	}
	r.stop(slices.Clone(r.running)...)
	return nil
}

// check expects that every event was delivered and consumed, that the service's total is exact, and
// that no acknowledged PUT is lost. It needs a running service.
func (r *rig) check() error {
	if err := r.settle(); err != nil {
		return err
	}
	var counted, total, updates, others int
	err := r.db.QueryRow(context.Background(), `
		SELECT count(*), (SELECT sum(n) FROM user_counts), sum(version - 1),
			count(*) FILTER (WHERE id > $1) + $1 - count(*) FILTER (WHERE id <= $1)
		FROM users`, r.users).Scan(&counted, &total, &updates, &others)
	switch lost := int(r.acknowledged.Load()) - updates; {
	case err != nil:
		return err
	case counted != total:
		return fmt.Errorf("there are %d users, but the total is %d", counted, total)
	case lost > 0:
		return fmt.Errorf("%d acknowledged PUT requests are lost", lost)
	}
	for deadline := time.Now().Add(settleTime); ; time.Sleep(100 * time.Millisecond) {
		consumed := r.consumed
		for _, s := range r.running {
			if s.name == service {
				consumed += s.consumed()
			}
		}
		if consumed >= updates+others {
			log.Printf("checked: %d events consumed, %d PUT requests acknowledged", consumed,
				r.acknowledged.Load())
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d events were consumed, of %d", consumed, updates+others)
		}
	}
}
