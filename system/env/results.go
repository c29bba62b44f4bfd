package env

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// WriteResults replaces the block "results" in a Markdown document.
func WriteResults(path, results string) error { return WriteBlock(path, "results", results) }

// WriteBlock replaces a named block in a Markdown document: what is between the lines
// <!-- begin NAME --> and <!-- end NAME -->. The path is relative to the repository.
func WriteBlock(path, name, results string) error {
	begin, end := "<!-- begin "+name+" -->\n", "<!-- end "+name+" -->"
	root, err := Root()
	if err != nil {
		return err
	}
	path = filepath.Join(root, path)
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(content), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return fmt.Errorf("%s has no place for %s", path, name)
	}
	text := before + begin + "\n" + strings.TrimSpace(results) + "\n\n" + end + after
	return os.WriteFile(path, []byte(text), 0o644)
}
