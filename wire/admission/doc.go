// Package admission is the gRPC conversation between the relay sidecar and the gateway container of one pod, over a
// Unix socket that only the two share. admission.proto says who asks what, and when.
package admission

//go:generate protoc -I . --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative admission.proto
