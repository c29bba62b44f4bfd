package main

import (
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// TestPostgresVersion logs which PostgreSQL the tests run on.
func TestPostgresVersion(t *testing.T) {
	conn, err := pgx.Connect(t.Context(), testDatabaseURL)
	if err != nil {
		missing(t, "PostgreSQL", err)
	}
	defer conn.Close(t.Context())
	postgresVersion(t, conn)
}

// postgresVersion logs and returns the version that a server reports, without what a
// distribution adds to it. The test fails if it is not TEST_POSTGRES_VERSION.
func postgresVersion(t *testing.T, conn *pgx.Conn) string {
	t.Helper()
	var reported string
	if err := conn.QueryRow(t.Context(), "SHOW server_version").Scan(&reported); err != nil {
		t.Fatal(err)
	}
	version, _, _ := strings.Cut(reported, " ")
	t.Logf("the server reports PostgreSQL %s", version)
	if want := os.Getenv("TEST_POSTGRES_VERSION"); want != "" && version != want {
		t.Errorf("the tests were to run on PostgreSQL %s", want)
	}
	return version
}
