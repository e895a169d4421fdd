module rendezvous.dev/rendezvous/hack

go 1.26.0

replace (
	rendezvous.dev/rendezvous => ../
	rendezvous.dev/rendezvous/hack/cluster => ./cluster
	rendezvous.dev/rendezvous/hack/desktop => ./desktop
)

require golang.org/x/net v0.62.0 // indirect
