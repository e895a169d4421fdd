// Command sim answers questions about fleets that no test bench holds, with the product's own code.
//
//	sim           100,000 hosts, 50 gateways, 3 regions and 3 brokers on a simulated clock and network: how even the load
//	              is, who is refused, how long a decision takes. The decisions are broker/placement's and wire/choose's.
//	sim agents    real connections of many agents to 3 real brokers' buses: how soon all are back once every broker was
//	              killed, what an idle agent costs a broker in memory, connects per second. Its plot is sim.svg.
//	sim operator  10,000 SessionHosts under the real operator on a real kube-apiserver, with stand-ins for cert-manager and
//	              the agents: time to steady state, writes afterwards, memory. Its plot is operator.svg.
//
// -h lists the flags. They print tables and leave nothing else behind.
package main
