package admission

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

// window is how many bytes may be under way unread. It is fixed: left alone, gRPC pings with every few messages to learn how
// much the path holds, which on a Unix socket is most of its traffic.
const window = 1 << 20

// workers take the calls in turns. A goroutine per call would grow its stack anew each time.
const workers = 4

// Dial makes a client of the socket. The connection is made with the first call, and again whenever it breaks.
func Dial(socket string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+socket, append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(),
		grpc.WithStaticStreamWindowSize(window), grpc.WithStaticConnWindowSize(window),
	}, opts...)...)
}

// Patient has calls wait, d at most, for a gateway container that is not there, before they fail: one that is replaced in
// place, or was killed, is back within moments.
func Patient(d time.Duration) grpc.DialOption {
	return grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		wait, cancel := context.WithTimeout(ctx, d)
		defer cancel()
		for s := cc.GetState(); s != connectivity.Ready; s = cc.GetState() {
			cc.Connect()
			if !cc.WaitForStateChange(wait, s) {
				break
			}
		}
		return invoke(ctx, method, req, reply, cc, opts...)
	})
}

// NewServer makes a server for clients made by Dial.
func NewServer() *grpc.Server {
	return grpc.NewServer(
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
		grpc.StaticStreamWindowSize(window), grpc.StaticConnWindowSize(window), grpc.NumStreamWorkers(workers))
}
