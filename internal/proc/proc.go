// Package proc tells processes apart whose numbers are the same.
package proc

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// StartTime returns when the process started, in ticks since boot: field 22 of /proc/PID/stat (proc(5)). With it a number
// that was given out again is another process. A process that has ended but was not waited for is fs.ErrNotExist too.
func StartTime(pid int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	return startTime(b)
}

func startTime(stat []byte) (string, error) {
	// The second field is a name in parentheses that may hold anything, parentheses too.
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(f) < 20 {
		return "", fmt.Errorf("/proc/PID/stat has %d fields after the name, want 20", len(f))
	}
	if f[0] == "Z" || f[0] == "X" {
		return "", fs.ErrNotExist
	}
	return f[19], nil
}
