// Package controllers is the operator: it turns Workspaces, HostPools, SessionHosts and Gateways into what runs, and
// says in their status how that stands.
//
// Each reconciler gathers what there is, lets plan decide and render build, acts by server-side apply through apply.go,
// and writes one status. Nothing is removed by finalizers: every child has an owner reference, and garbage collection
// does the rest.
package controllers
