// Command bench measures the relay beside the programs that people would otherwise put in its place, in one run on one
// machine, driven by one load generator:
//
//	relay-raw   our relay with its gateway container's real admission path, RDP in WebSocket frames
//	relay-tsgu  the same processes, MS-TSGU over WebSocket
//	haproxy     HAProxy in TCP mode
//	nginx       nginx with its stream module
//	stunnel     two stunnel services, for it speaks TLS on one side only
//	naive       crypto/tls and io.Copy: what the design of the relay has to beat
//
// Everything is on the loopback address, with TLS 1.3 (AES-128-GCM, P-256) on both legs. A peer takes TLS from the
// client and opens TLS to a host that it verifies; our relay takes TLS from the client and from the host's agent, which
// dials in. Every contender logs its sessions to a file, as it would in service.
//
//	main.go       flags, the order of the run
//	contend.go    who contends, and what they share: how a session is opened
//	peers.go      configurations of HAProxy, nginx, stunnel; naive.go: the yardstick
//	relay.go      relay, gateway, bus, and the agents of the hosts; client.go: an RDP client's framing
//	load.go       the load; scenario.go: what of it is measured, under which names
//	process.go    processes, their CPU time and memory; install.go: Debian packages; certs.go: certificates
//	flame.go      where the relay's CPU time goes
//	result.go     samples, medians; table.go, plot.go, goals.go: what is made of them
//
// Costs are CPU time of the contender's processes and their resident memory. Wall-clock figures (rates, latencies) stand
// beside them, but share the machine with the load generator.
package main
