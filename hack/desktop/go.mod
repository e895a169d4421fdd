module rendezvous.dev/rendezvous/hack/desktop

go 1.26.0

require (
	golang.org/x/sys v0.49.0
	rendezvous.dev/rendezvous/hack/cluster v0.0.0
)

replace rendezvous.dev/rendezvous/hack/cluster => ../cluster
