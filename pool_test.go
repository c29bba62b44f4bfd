package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestPoolConfigLimits checks the timeout of connecting, which no URL can disable, and the number
// of connections.
func TestPoolConfigLimits(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]time.Duration{
		"postgres://u@h/d":                               2 * time.Second,
		"postgres://u@h/d?connect_timeout=0":             2 * time.Second,
		"postgres://u@h/d?connect_timeout=1":             time.Second,
		"postgres://u@h/d?connect_timeout=60":            2 * time.Second,
		"postgres://u@h,i/d":                             1500 * time.Millisecond,
		"postgres://u@h:1,h:2,h:3,h:4/d":                 750 * time.Millisecond,
		"postgres://u@h,h/d?sslmode=disable":             2 * time.Second,
		"postgres://u@a,b,c/d?connect_timeout=1":         time.Second,
		"postgres://u@/d?host=/run/pg,/run/other&port=1": 1500 * time.Millisecond,
	} {
		config, err := poolConfig(url, "test")
		if err != nil || config.ConnConfig.ConnectTimeout != want {
			t.Errorf("%s: timeout %v, %v, want %v",
				url, config.ConnConfig.ConnectTimeout, err, want)
		}
	}
	for query, want := range map[string]int32{"": defaultPoolSize, "?pool_max_conns=7": 7,
		"?pool_max_conns=1": minPoolSize, "?pool_max_conns=99": maxPoolSize} {
		config, err := poolConfig("postgres://u@h/d"+query, "test")
		if err != nil || config.MaxConns != want {
			t.Errorf("%q: %d connections, %v, want %d", query, config.MaxConns, err, want)
		}
	}
}

// TestPoolConfigParameters checks that the startup parameters are those that PgBouncer accepts, and
// that the URL cannot change them.
func TestPoolConfigParameters(t *testing.T) {
	t.Parallel()
	config, err := poolConfig("postgres://u@h/d?client_encoding=LATIN1&DateStyle=German", "test")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"application_name": "test", "client_encoding": "UTF8",
		"datestyle": "ISO", "timezone": "UTC", "standard_conforming_strings": "on"}
	if got := config.ConnConfig.RuntimeParams; !maps.Equal(got, want) {
		t.Errorf("startup parameters %v, want %v", got, want)
	}
}

// TestPoolConfigFindsPrimary checks that connections are validated if there are several hosts, of
// which one takes writes.
func TestPoolConfigFindsPrimary(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]bool{
		"postgres://u@h/d":                                       false,
		"postgres://u@h,i/d":                                     true,
		"postgres://u@h:1,h:2/d":                                 true,
		"postgres://u@h/d?target_session_attrs=read-write":       true,
		"postgres://u@h,i/d?target_session_attrs=prefer-standby": true,
	} {
		config, err := poolConfig(url, "test")
		if err != nil || (config.ConnConfig.ValidateConnect != nil) != want {
			t.Errorf("%s: validates %t, %v, want %t",
				url, config.ConnConfig.ValidateConnect != nil, err, want)
		}
	}
}

// TestPoolConfigTLS checks in which order connections are tried with and without TLS. On loopback,
// plain connections come first.
func TestPoolConfigTLS(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]string{
		"postgres://u@127.0.0.1/d":                   "plain, TLS",
		"postgres://u@[::1]/d?sslmode=prefer":        "plain, TLS",
		"postgres://u@localhost/d":                   "plain, TLS",
		"postgres://u@localhost/d?sslmode=require":   "TLS",
		"postgres://u@localhost/d?sslmode=disable":   "plain",
		"postgres://u@db.example.com/d":              "TLS, plain",
		"postgres://u@192.0.2.1/d":                   "TLS, plain",
		"postgres://u@127.0.0.1,db.example.com/d":    "TLS, plain, TLS, plain",
		"postgres://u@localhost/d?sslmode=allow":     "plain, TLS",
		"postgres://u@/d?host=/var/run/postgresql":   "plain",
		"postgres://u@localhost/d?sslmode=verify-ca": "TLS",
	} {
		config, err := poolConfig(url, "test")
		if err != nil {
			t.Fatal(err)
		}
		attempts := []*tls.Config{config.ConnConfig.TLSConfig}
		for _, f := range config.ConnConfig.Fallbacks {
			attempts = append(attempts, f.TLSConfig)
		}
		got := make([]string, len(attempts))
		for i, config := range attempts {
			got[i] = map[bool]string{true: "plain", false: "TLS"}[config == nil]
		}
		if strings.Join(got, ", ") != want {
			t.Errorf("%s: tries %s, want %s", url, strings.Join(got, ", "), want)
		}
	}
}

// TestPostgresReady checks the state of the store while the database is read-only, closed and open.
func TestPostgresReady(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	name := conn.Config().Database
	steps := []struct {
		sql  []string
		want state
	}{
		{nil, "up"},
		{[]string{"ALTER DATABASE " + name + " SET default_transaction_read_only = on"},
			"read-only"},
		{[]string{"ALTER DATABASE " + name + " RESET default_transaction_read_only"}, "up"},
		{[]string{"ALTER DATABASE " + name + " ALLOW_CONNECTIONS false"}, "down"},
		{[]string{"ALTER DATABASE " + name + " ALLOW_CONNECTIONS true"}, "up"},
	}
	for _, step := range steps {
		terminate := "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '" +
			name + "' AND application_name = 'test'"
		if err := admin(t.Context(), append(step.sql, terminate)...); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the state "+string(step.want), func() bool {
			return s.ready(t.Context()) == step.want
		})
		if step.want != "read-only" {
			continue
		}
		_, err := s.createUser(t.Context(), input("John", "Doe", "hash"), "")
		if !errors.Is(err, errUnavailable) {
			t.Errorf("createUser on a read-only database: error %v, want errUnavailable", err)
		}
	}
}

// TestUpdateOfLockedTable checks that an update that waits too long for a lock fails and changes
// nothing.
func TestUpdateOfLockedTable(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	mustCreate(t, s, "John")
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE users"); err != nil {
		t.Fatal(err)
	}
	_, err := s.updateUser(t.Context(), 1, input("Jane", "", ""), nil)
	if !errors.Is(err, errUnavailable) {
		t.Errorf("updateUser: error %v, want errUnavailable", err)
	}
	if _, err := conn.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	if u, err := s.getUser(t.Context(), 1); err != nil || u.Version != 1 {
		t.Errorf("user after the lock: %+v, %v, want version 1", u, err)
	}
}

// TestListsLeaveConnections checks that a statement about another table gets a connection while
// more lists than there are connections wait for a locked table.
func TestListsLeaveConnections(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s := openTestPostgres(t, url)
	_, unlock := lockUsers(&service{t: t, settings: settings{databaseURL: url}})
	ctx, leave := context.WithCancel(t.Context())
	left := make(chan error)
	lists := int(s.pool.Config().MaxConns) - reservedConns - 1
	for range 2 * maxPoolSize {
		go func() {
			_, _, err := s.listUsers(ctx, 0, 0, 1)
			left <- err
		}()
	}
	watcher := connect(t, url)
	eventually(t, "lists that wait for the lock", func() bool {
		return queryValue[int](t, watcher, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock'`) == lists
	})
	if _, _, err := s.creationUnder(t.Context(), "key"); !errors.Is(err, errNotFound) {
		t.Errorf("creationUnder while lists wait: error %v, want errNotFound", err)
	}
	leave() // lists without a connection fail immediately
	for range 2*maxPoolSize - lists {
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("list without a connection: error %v, want %v", err, context.Canceled)
		}
	}
	unlock()
	for range lists {
		if err := <-left; err != nil {
			t.Errorf("list that had begun: error %v, want none", err)
		}
	}
}

// TestReadAfterLostConnections checks that a read succeeds after the server has closed every
// connection of the store.
func TestReadAfterLostConnections(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	mustCreate(t, s, "John")
	for range 5 {
		_, err := conn.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid()`)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.getUser(t.Context(), 1); err != nil {
			t.Errorf("getUser after the connections were closed: %v", err)
		}
	}
}

// TestCancellationKeepsConnections cancels callers while their statements run, and checks that
// their connections are not replaced.
func TestCancellationKeepsConnections(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	mustCreate(t, s, "John")
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE users"); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range 200 {
		timeout := time.Duration(rand.IntN(50)) * time.Millisecond
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		group.Go(func() { s.getUser(ctx, 1) })
	}
	time.Sleep(100 * time.Millisecond)
	if _, err := conn.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	group.Wait()
	if opened := s.pool.Stat().NewConnsCount(); opened > defaultPoolSize {
		t.Errorf("%d connections were opened, want %d or fewer", opened, defaultPoolSize)
	}
}

// TestActivityHidesPasswords checks that the statements that pg_stat_activity shows contain neither
// passwords nor hashes.
func TestActivityHidesPasswords(t *testing.T) {
	t.Parallel()
	set := postgresSettings(t)
	s := startService(t, set)
	id := s.createUser("John", "Doe")
	_, unlock := lockUsers(s)
	var requests sync.WaitGroup
	user := fmt.Sprintf(`{"name": "Ann", "surname": "Lee", "password": %q}`, secret)
	requests.Go(func() { s.do("POST", "/users", user, "Idempotency-Key: key") })
	requests.Go(func() { s.do("PUT", fmt.Sprintf("/users/%d", id), user) })
	requests.Go(func() {
		path := fmt.Sprintf("/users/%d/password/verify", id)
		s.do("POST", path, fmt.Sprintf(`{"password": %q}`, secret))
	})
	const waiting = `SELECT coalesce(string_agg(query, E'\n'), '') FROM pg_stat_activity
		WHERE datname = current_database() AND wait_event_type = 'Lock'`
	watcher := connect(t, set.databaseURL)
	var queries string
	eventually(t, "three statements that wait", func() bool {
		queries = queryValue[string](t, watcher, waiting)
		return strings.Contains(queries, "INSERT INTO users") &&
			strings.Contains(queries, "UPDATE users") &&
			strings.Contains(queries, "SELECT password")
	})
	if strings.Contains(queries, secret) || strings.Contains(queries, "argon2id") {
		t.Errorf("pg_stat_activity shows a password:\n%s", queries)
	}
	unlock()
	requests.Wait()
}
