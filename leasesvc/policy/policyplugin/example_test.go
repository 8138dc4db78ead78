package policyplugin_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	policyv1 "github.com/dstm-project/dstm/api/policy/v1"
	"github.com/dstm-project/dstm/leasesvc/policy/policyplugin"
)

type nights struct {
	policyv1.UnimplementedPolicyServer
}

func (nights) Decide(context.Context, *policyv1.DecideRequest) (*policyv1.DecideReply, error) {
	if time.Now().Hour() < 6 {
		return policyplugin.Deny("no leases before six"), nil
	}
	return policyplugin.Allow(), nil
}

// Started by hand it says that somebody else starts it.
func ExampleServe() {
	fmt.Println(policyplugin.Serve(context.Background(), nights{}))
	// Output: this is a plugin process: its daemon starts it
}

// TestDocumentedPlugin builds the program that docs/policy-plugins.md shows.
func TestDocumentedPlugin(t *testing.T) {
	b, err := os.ReadFile("../../../docs/policy-plugins.md")
	if err != nil {
		t.Fatal(err)
	}
	program := regexp.MustCompile("(?s)```go\n(.*?)```").FindSubmatch(b)
	if program == nil {
		t.Fatal("no Go program")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "main.go"), program[1], 0o600); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "nights"), filepath.Join(dir, "main.go"))
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	out, err := exec.Command(filepath.Join(dir, "nights")).CombinedOutput()
	if err == nil || !strings.Contains(string(out), policyplugin.ErrByHand.Error()) {
		t.Errorf("by hand: %v, %s", err, out)
	}
}
