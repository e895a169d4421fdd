package rdpkit

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
)

// Probe speaks the first two messages of RDP over conn, as far as the server's agreement to TLS ([MS-RDPBCGR] 1.3.1.1,
// 2.2.1.1 and 2.2.1.2), and then TLS with config. The state shows the version and the certificate that this one
// connection was served with. conn is the caller's to close.
func Probe(ctx context.Context, conn net.Conn, config *tls.Config) (tls.ConnectionState, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	const protocolSSL = 1
	request := []byte{
		3, 0, 0, 19, // TPKT: version 3, 19 bytes in all
		14, 0xe0, 0, 0, 0, 0, 0, // X.224 connection request
		1, 0, 8, 0, protocolSSL, 0, 0, 0, // RDP_NEG_REQ
	}
	if _, err := conn.Write(request); err != nil {
		return tls.ConnectionState{}, err
	}
	confirm := make([]byte, 19)
	if _, err := io.ReadFull(conn, confirm); err != nil {
		return tls.ConnectionState{}, fmt.Errorf("reading the connection confirm: %w", err)
	}
	if confirm[5] != 0xd0 || confirm[11] != 2 || binary.LittleEndian.Uint32(confirm[15:]) != protocolSSL {
		return tls.ConnectionState{}, fmt.Errorf("the server did not agree to TLS: % x", confirm)
	}
	client := tls.Client(conn, config)
	if err := client.HandshakeContext(ctx); err != nil {
		return tls.ConnectionState{}, errors.Join(context.Cause(ctx), err)
	}
	return client.ConnectionState(), nil
}
