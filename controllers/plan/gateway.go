package plan

import (
	"cmp"
	"slices"
)

// GatewayPod is a gateway's pod that is not on its way out, as seen.
type GatewayPod struct {
	Name     string
	Sessions int32
	Ready    bool
	// Updated says that the pod's gateway container is declared with the new image, Back that it runs since then and that
	// the pod is ready.
	Updated, Back bool
	// Cost is what the pod's deletion cost says.
	Cost int32
}

// Rolling is what is seen while the gateway containers of pods that stay get a new image.
type Rolling struct {
	// Paused says that the Deployment is, and that its controller knows.
	Paused bool
	// Template says that the ReplicaSet makes pods with the new image, and that its controller knows.
	Template bool
	Pods     []GatewayPod // those of that ReplicaSet
}

// RollStep is the next thing to do.
type RollStep int

// The steps, in their order.
const (
	// RollPause waits for the Deployment to be paused, so that what follows does not look to it like a template of which
	// there is no ReplicaSet.
	RollPause RollStep = iota
	// RollTemplate has the ReplicaSet make new pods with the new image.
	RollTemplate
	// RollPod gives one pod the new image.
	RollPod
	// RollWait waits for the last of those to be back.
	RollWait
	// RollFinish declares the new image in the Deployment, and lets it go on.
	RollFinish
)

// RollGateway plans a new image of the gateway containers without new pods. Each step follows from what is seen, so that
// an operator that was interrupted goes on where it was. Pods go one by one, the emptiest first; one that isn't ready is
// missed by nobody, and goes at once, so that a broken image can be taken back.
func RollGateway(seen Rolling) (step RollStep, pod string) {
	switch {
	case !seen.Paused:
		return RollPause, ""
	case !seen.Template:
		return RollTemplate, ""
	}
	old := slices.DeleteFunc(slices.Clone(seen.Pods), func(p GatewayPod) bool { return p.Updated })
	away := slices.ContainsFunc(seen.Pods, func(p GatewayPod) bool { return p.Updated && !p.Back })
	slices.SortFunc(old, func(a, b GatewayPod) int {
		return cmp.Or(compareBool(a.Ready, b.Ready), cmp.Compare(a.Sessions, b.Sessions), cmp.Compare(a.Name, b.Name))
	})
	switch {
	case len(old) > 0 && (!old[0].Ready || !away):
		return RollPod, old[0].Name
	case away:
		return RollWait, ""
	}
	return RollFinish, ""
}

// DeletionCosts gives the pods whose deletion cost is to change, so that Kubernetes takes the emptiest first. While the
// order that stands is about right it gives none: sessions come and go all the time.
func DeletionCosts(pods []GatewayPod) map[string]int32 {
	right := true
	for _, a := range pods {
		for _, b := range pods {
			// By a fifth at least, which for few sessions is one.
			if 5*int64(a.Sessions) < 4*int64(b.Sessions) && a.Cost >= b.Cost {
				right = false
			}
		}
	}
	if right {
		return nil
	}
	costs := map[string]int32{}
	for _, p := range pods {
		if p.Cost != p.Sessions {
			costs[p.Name] = p.Sessions
		}
	}
	return costs
}
