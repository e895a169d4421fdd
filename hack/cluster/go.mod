module rendezvous.dev/rendezvous/hack/cluster

go 1.26.0
