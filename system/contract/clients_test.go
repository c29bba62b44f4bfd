package contract

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"user-service/system/env"
)

// TestGeneratedClients generates clients from openapi.json with the default settings of the
// generators, compiles them, and runs the programs in testdata/clients that use them.
func TestGeneratedClients(t *testing.T) {
	t.Parallel()
	document, err := filepath.Abs(filepath.Join(root, "openapi.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name     string
		needs    string
		commands []string // URL and DOCUMENT stand for those of the service
	}{
		{name: "go", needs: "go", commands: []string{
			"go tool oapi-codegen -package main -o api.go DOCUMENT",
			"go vet .",
			"go run . URL",
		}},
		{name: "typescript", needs: "npm", commands: []string{
			"npm ci --ignore-scripts --no-audit --no-fund",
			"npm exec --no -- openapi-typescript DOCUMENT -o api.d.ts",
			"npm exec --no -- tsc",
			"node main.js URL",
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			if _, err := exec.LookPath(test.needs); err != nil {
				env.Missing(t, test.needs, err)
			}
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS("../testdata/clients/"+test.name)); err != nil {
				t.Fatal(err)
			}
			url := startService(t).URL
			for _, command := range test.commands {
				run(t, dir, command, "DOCUMENT", document, "URL", url)
			}
		})
	}
}
