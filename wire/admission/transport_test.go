package admission

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

type answers struct {
	UnimplementedAdmissionServer
}

func (answers) Authenticate(context.Context, *AuthenticateRequest) (*AuthenticateResponse, error) {
	return &AuthenticateResponse{User: "alice"}, nil
}

func TestPatient(t *testing.T) {
	call := func(t *testing.T, patience time.Duration, serve func(socket string)) (*AuthenticateResponse, error) {
		socket := filepath.Join(t.TempDir(), "a.sock")
		cc, err := Dial(socket, Patient(patience))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cc.Close() })
		go serve(socket)
		return NewAdmissionClient(cc).Authenticate(t.Context(), &AuthenticateRequest{})
	}
	t.Run("a server that comes in time answers", func(t *testing.T) {
		srv := NewServer()
		RegisterAdmissionServer(srv, answers{})
		t.Cleanup(srv.Stop)
		got, err := call(t, time.Minute, func(socket string) {
			time.Sleep(100 * time.Millisecond) // the first attempt to connect has failed by then, mostly
			if l, err := net.Listen("unix", socket); err == nil {
				srv.Serve(l)
			}
		})
		if err != nil || got.User != "alice" {
			t.Errorf("%v, %v", got, err)
		}
	})
	t.Run("one that does not come is missed in the end", func(t *testing.T) {
		if _, err := call(t, time.Millisecond, func(string) {}); status.Code(err) != codes.Unavailable {
			t.Errorf("%v", err)
		}
	})
}
