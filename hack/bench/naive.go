package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"os"
)

// naiveCommand is the argument that makes this program the yardstick: what one writes in an hour with crypto/tls and io.Copy.
const naiveCommand = "naive-proxy"

const naiveConf = `{"cert": "{{.Cert}}", "key": "{{.Key}}", "ca": "{{.CA}}", "host": "{{.Host}}", "backend": "127.0.0.1:{{.Backend}}",
 "full": "127.0.0.1:{{(index .Legs 0).Port}}", "resumed": "127.0.0.1:{{(index .Legs 1).Port}}"}`

type naive struct{ Cert, Key, CA, Host, Backend, Full, Resumed string }

func runNaive(file string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var n naive
	if err := json.Unmarshal(data, &n); err != nil {
		return err
	}
	cert, err := tls.LoadX509KeyPair(n.Cert, n.Key)
	if err != nil {
		return err
	}
	ca, err := os.ReadFile(n.CA)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	full := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: n.Host}
	resumed := full.Clone()
	resumed.ClientSessionCache = tls.NewLRUClientSessionCache(16)
	failed := make(chan error)
	for address, dial := range map[string]*tls.Config{n.Full: full, n.Resumed: resumed} {
		l, err := tls.Listen("tcp", address, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}})
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					failed <- err
					return
				}
				go n.serve(c.(*tls.Conn), dial)
			}
		}()
	}
	return <-failed
}

func (n *naive) serve(client *tls.Conn, conf *tls.Config) {
	defer client.Close()
	if client.Handshake() != nil {
		return
	}
	host, err := tls.Dial("tcp", n.Backend, conf)
	if err != nil {
		slog.Error("no host", "error", err)
		return
	}
	defer host.Close()
	done := make(chan int64)
	go func() { done <- naiveCopy(host, client) }()
	sent := naiveCopy(client, host)
	slog.Info("session ended", "peer", client.RemoteAddr().String(), "toClient", sent, "toHost", <-done)
}

func naiveCopy(to, from *tls.Conn) int64 {
	n, _ := io.Copy(to, from)
	to.CloseWrite()
	return n
}
