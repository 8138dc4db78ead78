package tc

import (
	"testing"

	"github.com/dstm-project/dstm/dataplane"
	"github.com/dstm-project/dstm/dataplane/dataplanetest"
)

func TestEngine(t *testing.T) {
	dataplanetest.Run(t, dataplanetest.Engine{
		NewGateway: func() (dataplane.Gateway, error) { return NewGateway(quiet()) },
		NewHost:    func() (dataplane.Host, error) { return NewHost(quiet()) },
	})
}
