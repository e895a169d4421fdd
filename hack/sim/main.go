package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "sim:", err)
		os.Exit(1)
	}
}

func command(ctx context.Context, args []string, out io.Writer) error {
	name := "fleet"
	if len(args) > 0 && args[0] != "" && args[0][0] != '-' {
		name, args = args[0], args[1:]
	}
	fs := flag.NewFlagSet("sim "+name, flag.ContinueOnError)
	switch name {
	case "fleet":
		o := fleetOptions{}
		fs.Uint64Var(&o.Seed, "seed", 1, "of all that is random")
		fs.IntVar(&o.Connects, "connects", 60_000, "connects in one simulated hour, beside those of users who come back")
		fs.IntVar(&o.Scale, "scale", 100, "hundredths of the 100,000 hosts")
		if err := fs.Parse(args); err != nil {
			return err
		}
		return runFleet(o, out)
	case "agents":
		o := agentsOptions{}
		fs.IntVar(&o.Agents, "n", 10_000, "simulated agents")
		fs.IntVar(&o.Connects, "connects", 5_000, "connects to ask for, once all are there")
		fs.DurationVar(&o.Patience, "patience", patience, "bound of each phase")
		fs.StringVar(&o.Plot, "plot", "sim.svg", "file for the plot of how the agents came; none where empty")
		if err := fs.Parse(args); err != nil {
			return err
		}
		return runAgents(ctx, o, out)
	case "operator":
		o := operatorOptions{}
		fs.IntVar(&o.Hosts, "n", 10_000, "session hosts")
		fs.IntVar(&o.Pools, "pools", 20, "pools that they are in, each of at most 1000")
		fs.DurationVar(&o.Quiet, "quiet", time.Minute, "for how long writes are counted once all is done")
		fs.DurationVar(&o.Patience, "patience", 20*time.Minute, "bound of each phase")
		fs.StringVar(&o.Plot, "plot", "operator.svg", "file for the plot of how the hosts came; none where empty")
		if err := fs.Parse(args); err != nil {
			return err
		}
		return runOperator(ctx, o, out)
	case operatorCommand:
		return runOperatorProcess(ctx, os.Stdin, out)
	case brokerCommand:
		return runBroker(ctx, os.Stdin, out)
	}
	return fmt.Errorf("no command %q; there are fleet (or none), agents and operator", name)
}
