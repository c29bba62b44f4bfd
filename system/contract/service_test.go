// Package contract tests what a user of the repository relies on: the binary, seen from
// outside, and the files beside it. Nothing here imports the service.
//
// Run the tests with -count=1: the cache of `go test` does not notice changes of files outside
// this module.
package contract

import (
	"log"
	"os"
	"path/filepath"
	"testing"

	"user-service/system/env"
)

// root is the directory of the repository.
const root = "../.."

// testEnv builds the service and runs it for all tests.
var testEnv *env.Env

func TestMain(m *testing.M) {
	var err error
	if testEnv, err = env.New(); err != nil {
		log.Fatal(err)
	}
	code := m.Run()
	testEnv.Close()
	os.Exit(code)
}

// startService starts the service with these settings and returns when it listens.
func startService(t *testing.T, settings ...string) *env.Program {
	t.Helper()
	return testEnv.StartProgram(t, settings...)
}

// readFile returns the content of a file of the repository.
func readFile(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}
