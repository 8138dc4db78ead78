package cmd

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dstm-project/dstm/internal/daemon"
)

// TestBrokenConfigurations checks each file of testdata/broken/DAEMON with `DAEMON -t`: it must be refused with the lines
// that stand behind "# want" at its end, each line:column: sentence.
func TestBrokenConfigurations(t *testing.T) {
	files, err := filepath.Glob("testdata/broken/*/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 60 {
		t.Fatalf("%d files: the corpus is not there", len(files))
	}
	for _, path := range files {
		program, name := filepath.Base(filepath.Dir(path)), filepath.Base(path)
		t.Run(program+"/"+strings.TrimSuffix(name, ".yaml"), func(t *testing.T) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			for line := range strings.Lines(string(b)) {
				if w, ok := strings.CutPrefix(line, "# want "); ok {
					want = append(want, name+":"+strings.TrimSpace(w))
				}
			}
			if len(want) == 0 {
				t.Fatal("the file does not say what it wants")
			}
			cmd := exec.Command(filepath.Join(programs, program), "-t", "-c", name)
			cmd.Dir = filepath.Dir(path)
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != daemon.ExitUsage {
				t.Fatalf("%v, want exit code %d:\n%s", err, daemon.ExitUsage, out)
			}
			got := strings.TrimPrefix(strings.TrimSpace(string(out)), program+": ")
			if got != strings.Join(want, "\n") {
				t.Errorf("got\n%s\nwant\n%s", got, strings.Join(want, "\n"))
			}
		})
	}
}
