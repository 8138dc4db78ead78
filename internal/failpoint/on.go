//go:build failpoints

// Package failpoint lets tests of real processes break them at named points: see Variable.
package failpoint

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// Variable is the environment variable that says what happens where: points apart by commas, each name=action@n. At its nth
// hit, from 1, and at no other, the point acts; without @n at every one. The actions are
//
//	kill       the process ends as by kill -9
//	error      the operation fails
//	a time     such as 2s: the operation takes that much longer
const Variable = "DSTM_FAILPOINTS"

type point struct {
	action string
	nth    int64 // 0 = every hit
	hits   atomic.Int64
}

var points = parse(os.Getenv(Variable))

func parse(text string) map[string]*point {
	m := map[string]*point{}
	for item := range strings.SplitSeq(text, ",") {
		name, action, ok := strings.Cut(item, "=")
		if !ok {
			continue
		}
		p := &point{action: action}
		if a, n, ok := strings.Cut(action, "@"); ok {
			nth, err := strconv.ParseInt(n, 10, 64)
			if err != nil || nth < 1 {
				panic(fmt.Sprintf("%s: %q: want a number from 1 behind @", Variable, item))
			}
			p.action, p.nth = a, nth
		}
		if _, err := time.ParseDuration(p.action); err != nil && p.action != "kill" && p.action != "error" {
			panic(fmt.Sprintf("%s: %q: want kill, error or a time", Variable, item))
		}
		m[name] = p
	}
	return m
}

// Hit is a point.
func Hit(name string) error {
	p := points[name]
	if p == nil {
		return nil
	}
	if n := p.hits.Add(1); p.nth != 0 && n != p.nth {
		return nil
	}
	switch p.action {
	case "kill":
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // not one instruction more of this goroutine
	case "error":
		return errors.New("failpoint " + name)
	}
	d, _ := time.ParseDuration(p.action)
	time.Sleep(d)
	return nil
}

// WallVariable is the environment variable that names a file with a time such as -24h, by which the wall clock is off. The
// file is read each time; none or an empty one means that it is right.
const WallVariable = "DSTM_WALL"

// Wall returns the wall-clock time.
func Wall() time.Time {
	b, _ := os.ReadFile(os.Getenv(WallVariable))
	if len(b) == 0 {
		return time.Now()
	}
	off, err := time.ParseDuration(strings.TrimSpace(string(b)))
	if err != nil {
		panic(fmt.Sprintf("%s: %v", WallVariable, err))
	}
	return time.Now().Round(0).Add(off)
}
