// Command probe is what the smoke test runs in pods and network namespaces: there
// is no image with a shell here.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	switch {
	case len(args) == 1 && args[0] == "serve": // answer "hello" on port 8080 until SIGTERM
		fmt.Println("serving")
		srv := &http.Server{Addr: ":8080", Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "hello")
		}), ReadHeaderTimeout: time.Second}
		context.AfterFunc(ctx, func() { srv.Close() })
		if err := srv.ListenAndServe(); err != http.ErrServerClosed {
			return err
		}
		return nil
	case len(args) == 2 && args[0] == "linger": // take so long to end after SIGTERM
		wait, err := time.ParseDuration(args[1])
		if err != nil {
			return err
		}
		<-ctx.Done()
		fmt.Println("draining")
		time.Sleep(wait)
		fmt.Println("drained")
		return nil
	case len(args) == 2 && args[0] == "get": // print what a URL answers
		resp, err := (&http.Client{Timeout: 5 * time.Second}).Get(args[1])
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		_, err = io.Copy(os.Stdout, resp.Body)
		return err
	case len(args) >= 2 && args[0] == "lookup": // print a name's addresses; an optional second argument is the DNS server
		resolver := &net.Resolver{PreferGo: true}
		if len(args) == 3 {
			resolver.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, net.JoinHostPort(args[2], "53"))
			}
		}
		addresses, err := resolver.LookupHost(ctx, args[1])
		fmt.Println(addresses)
		return err
	}
	return fmt.Errorf("unknown arguments %q", args)
}
