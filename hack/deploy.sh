#!/usr/bin/env bash
# deploy.sh deploy | undeploy [--purge]: what `make deploy` and `make undeploy` do to the current kubeconfig's cluster. On a
# terminal undeploy asks first.
set -euo pipefail
cd "$(dirname "$0")/.."

context=$(kubectl config current-context)
server=$(kubectl config view --minify -o 'jsonpath={.clusters[0].cluster.server}')
kinds=$(sed -n 's/^  name: \(.*\.rendezvous\.dev\)$/\1/p' config/crd/bases/*.yaml)

confirm() {
	echo "$1 context $context, server $server"
	if [ -t 0 ] && [ "${2-}" = ask ]; then
		read -r -p 'Go on? [y/N] ' answer
		[ "$answer" = y ] || { echo 'Nothing was changed.'; exit 1; }
	fi
}

# objects lists all of our kinds in the cluster, one a line.
objects() {
	for kind in $kinds; do
		kubectl get crd "$kind" >/dev/null 2>&1 || continue
		kubectl get "$kind" --all-namespaces -o 'jsonpath={range .items[*]}{.kind} {.metadata.namespace}/{.metadata.name}{"\n"}{end}'
	done
}

case "${1-}" in
deploy)
	confirm 'Installs the CRDs and the operator into'
	kubectl apply --server-side -k config/default
	;;
undeploy)
	found=$(objects)
	count=$(grep -c . <<<"$found" || true)
	if [ "${2-}" = --purge ]; then
		confirm "Removes the operator, the CRDs and $count objects, with all people's assignments, from" ask
		echo "$found"
		if [ "$count" -gt 0 ] && ! kubectl get deployment -n rendezvous-system rendezvous-manager >/dev/null; then
			echo 'There is no operator that would let them go: make deploy, and try again. Nothing was changed.' >&2
			exit 1
		fi
		# First the objects, while the operator is there to let their sessions end: rendezvous.dev/skip-drain=true doesn't wait.
		for kind in $kinds; do
			kubectl get crd "$kind" >/dev/null 2>&1 || continue
			kubectl delete "$kind" --all --all-namespaces --wait=false
		done
		while [ -n "$(objects)" ]; do
			echo "waits for $(objects | wc -l) objects to drain (kubectl get rdv -A; annotation rendezvous.dev/skip-drain=true does not wait)"
			sleep "${DRAIN_LOOK_SECONDS:-5}"
		done
		kubectl delete --ignore-not-found -k config/default
	else
		confirm "Removes the operator, and keeps the CRDs and $count objects with their pods, in" ask
		kubectl delete --ignore-not-found -k config/operator
		echo 'Brokers, gateways and desktops run on. Objects that are deleted now wait for the operator to come back (make deploy).'
		echo 'To remove everything instead: make deploy, then make undeploy PURGE=true.'
	fi
	;;
*)
	echo 'usage: deploy.sh deploy | undeploy [--purge]' >&2
	exit 2
	;;
esac
