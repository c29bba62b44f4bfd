package main

import (
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// TestPostgresVersion logs the version of PostgreSQL that the tests use.
func TestPostgresVersion(t *testing.T) {
	conn, err := pgx.Connect(t.Context(), testDatabaseURL)
	if err != nil {
		missing(t, "PostgreSQL", err)
	}
	defer conn.Close(t.Context())
	postgresVersion(t, conn)
}

// postgresVersion logs and returns the version of a server, without the suffix of a distribution. The
// test fails if TEST_POSTGRES_VERSION is set and differs.
func postgresVersion(t *testing.T, conn *pgx.Conn) string {
	t.Helper()
	var reported string
	if err := conn.QueryRow(t.Context(), "SHOW server_version").Scan(&reported); err != nil {
		t.Fatal(err)
	}
	version, _, _ := strings.Cut(reported, " ")
	t.Logf("the server reports PostgreSQL %s", version)
	if want := os.Getenv("TEST_POSTGRES_VERSION"); want != "" && version != want {
		t.Errorf("PostgreSQL version: got %s, want %s", version, want)
	}
	return version
}
