package main

import "github.com/spf13/cobra"

// extraCommands are the commands that have nothing to do with a running DSTM.
func extraCommands() []*cobra.Command {
	return []*cobra.Command{labCommand()}
}
