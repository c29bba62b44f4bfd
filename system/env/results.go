package env

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// The lines of a document between which WriteResults writes.
const (
	beginResults = "<!-- begin results -->\n"
	endResults   = "<!-- end results -->"
)

// WriteResults replaces the results in a Markdown document. The path is relative to the repository.
func WriteResults(path, results string) error {
	root, err := Root()
	if err != nil {
		return err
	}
	path = filepath.Join(root, path)
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(content), beginResults)
	_, after, ok2 := strings.Cut(rest, endResults)
	if !ok || !ok2 {
		return fmt.Errorf("%s has no place for results", path)
	}
	text := before + beginResults + "\n" + strings.TrimSpace(results) + "\n\n" + endResults + after
	return os.WriteFile(path, []byte(text), 0o644)
}
