package fleet

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// host is a session host outside the cluster: a real agent, and in front of it a server that opens as RDP does (X.224, TLS
// with the certificate that the agent installs) and then speaks the checked stream.
type host struct {
	name     string
	dir      string
	argv     []string
	listener net.Listener
	tally    *tally
	agent    *exec.Cmd
	ended    chan struct{} // closed when the agent's process has

	serving sync.WaitGroup
}

// serve answers until the listener closes.
func (h *host) serve() {
	for {
		conn, err := h.listener.Accept()
		if err != nil {
			return
		}
		h.serving.Go(func() {
			defer conn.Close()
			h.session(conn)
		})
	}
}

// connection requests and confirms of RDP's negotiation (MS-RDPBCGR 2.2.1.1 and 2.2.1.2), for TLS.
var (
	askTLS = []byte{3, 0, 0, 19, 14, 0xe0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 1, 0, 0, 0}
	useTLS = []byte{3, 0, 0, 19, 14, 0xd0, 0, 0, 0x12, 0x34, 0, 2, 0, 8, 0, 1, 0, 0, 0}
)

// hello opens the stream: the session's seed.
const helloLength = 32

// session is one connection: a probe of the agent's, which ends after TLS, or a session.
func (h *host) session(conn net.Conn) {
	conn.SetDeadline(time.Now().Add(patience))
	var ask [19]byte
	if _, err := io.ReadFull(conn, ask[:]); err != nil || ask[0] != askTLS[0] || ask[5] != askTLS[5] {
		return
	}
	if _, err := conn.Write(useTLS); err != nil {
		return
	}
	secure := tls.Server(conn, &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: h.certificate})
	var seed [helloLength]byte
	if _, err := io.ReadFull(secure, seed[:]); err != nil {
		return
	}
	conn.SetDeadline(time.Time{})
	s := newStream(secure, seed, false, h.tally)
	sent := make(chan error, 1)
	go func() { sent <- s.send() }()
	err := s.receive()
	close(s.stop)
	if err != nil {
		conn.Close()
	}
	err = errors.Join(err, <-sent)
	if errors.Is(err, errWrong) { // the client tells of all else
		h.tally.fault("host "+h.name, err)
	}
	secure.CloseWrite()
}

// certificate is what the agent installed last.
func (h *host) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	cert, err := tls.LoadX509KeyPair(filepath.Join(h.dir, "cert", "tls.crt"), filepath.Join(h.dir, "cert", "tls.key"))
	return &cert, err
}

// start runs the agent, as start runs a process.
func (h *host) start(start func(*exec.Cmd) error) error {
	log, err := os.OpenFile(filepath.Join(h.dir, "agent.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(h.argv[0], h.argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := start(cmd); err != nil {
		return fmt.Errorf("fleet: agent of %s: %w", h.name, err)
	}
	h.agent, h.ended = cmd, make(chan struct{})
	go func(ended chan struct{}) {
		cmd.Wait()
		close(ended)
	}(h.ended)
	return nil
}

// close ends agent and server.
func (h *host) close() {
	h.listener.Close()
	if h.agent != nil {
		h.agent.Process.Signal(syscall.SIGTERM)
		select {
		case <-h.ended:
		case <-time.After(5 * time.Second):
			h.agent.Process.Kill()
			<-h.ended
		}
	}
	h.serving.Wait()
}

// negotiate is a client's half of RDP's opening, up to TLS.
func negotiate(conn net.Conn, conf *tls.Config) (*tls.Conn, error) {
	if _, err := conn.Write(askTLS); err != nil {
		return nil, err
	}
	var answer [19]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return nil, fmt.Errorf("no answer to the RDP negotiation: %w", err)
	}
	if answer[5] != useTLS[5] || binary.LittleEndian.Uint32(answer[15:]) != 1 {
		return nil, fmt.Errorf("%w: the RDP negotiation was answered with % x", errWrong, answer)
	}
	secure := tls.Client(conn, conf)
	return secure, secure.Handshake()
}
