// dstm is the command-line tool for host users and operators: the state of the local daemons, leases and their history,
// certificates, labs.
package main

import (
	"context"
	"os"
	"time"

	"github.com/dstm-project/dstm/internal/daemon"
)

func main() {
	daemon.Main("dstm", func(ctx context.Context, args []string) error {
		return run(ctx, env{out: os.Stdout, now: time.Now, connect: connect}, args)
	})
}
