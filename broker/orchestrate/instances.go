package orchestrate

import (
	"cmp"
	"maps"
	"slices"

	"rendezvous.dev/rendezvous/broker/model"
)

// maxInstances bounds what is written of one gateway's pods; those with the fewest sessions are left out.
const maxInstances = 128

// instances are a gateway's pods with the workspace's sessions on each, by name. A pod that reports is believed; one that
// drains soon reports no more, since Kubernetes ends its gateway container before its relay: there the session hosts'
// reports are counted.
func (r *registry) instances(workspace string, g *model.Gateway) []model.GatewayInstance {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.now()
	byHosts := map[string]int32{}
	for _, h := range r.hosts {
		for _, s := range h.report.Sessions {
			if s.Gateway == g.Name && s.Instance != "" && !h.gone {
				byHosts[s.Instance]++
			}
		}
	}
	found := map[string]model.GatewayInstance{}
	for name, n := range byHosts {
		found[name] = model.GatewayInstance{Name: name, Workspace: workspace, Sessions: n, Draining: true}
	}
	for k, live := range r.gateways {
		if k.gateway != g.Name || now.Sub(live.at) >= gatewaySilence {
			continue
		}
		i := model.GatewayInstance{Name: k.instance, Workspace: workspace, Sessions: live.report.Sessions, Draining: live.report.Draining}
		if g.Shared || live.report.Draining { // the report counts others' sessions, too, or is the last one
			i.Sessions = byHosts[k.instance]
		}
		found[k.instance] = i
	}
	list := slices.SortedFunc(maps.Values(found), func(a, b model.GatewayInstance) int {
		return cmp.Or(cmp.Compare(b.Sessions, a.Sessions), cmp.Compare(a.Name, b.Name))
	})
	list = list[:min(len(list), maxInstances)]
	slices.SortFunc(list, func(a, b model.GatewayInstance) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

// ownInstances are those of a gateway's instances that this workspace wrote, by name; others is the sessions of the rest.
func ownInstances(workspace string, g *model.Gateway) (own []model.GatewayInstance, others int32) {
	for _, i := range g.Instances {
		if i.Workspace == workspace {
			own = append(own, i)
		} else {
			others += i.Sessions
		}
	}
	slices.SortFunc(own, func(a, b model.GatewayInstance) int { return cmp.Compare(a.Name, b.Name) })
	return own, others
}
