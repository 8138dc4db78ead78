package gobgp

import (
	"log/slog"
	"testing"

	"github.com/dstm-project/dstm/bgp"
	"github.com/dstm-project/dstm/bgp/bgptest"
)

func TestContract(t *testing.T) {
	bgptest.Run(t, func(t *testing.T) bgp.Speaker {
		return New(slog.New(slog.NewTextHandler(t.Output(), nil)))
	})
}
