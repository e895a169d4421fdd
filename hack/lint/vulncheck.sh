#!/usr/bin/env bash
# Known vulnerabilities that our code reaches, by govulncheck. Its database is https://vuln.go.dev, or what GOVULNDB names, such as a
# mirror or file:///DIR. Where that can't be had, this says so and passes, unless RDV_REQUIRE_VULNDB is set, as release builds do.
# hack/cluster/dex is left out: a stand-in for a company's provider in tests, by a release of Dex that is not shipped.
set -euo pipefail
cd "$(dirname "$0")/../.."

for module in . hack hack/cluster hack/desktop hack/bench hack/sim; do
	echo "govulncheck: $module"
	status=0
	found=$(cd "$module" && "$OLDPWD/bin/govulncheck" ${GOVULNDB:+-db "$GOVULNDB"} ./... 2>&1) || status=$?
	case $status in
	0) ;;
	3)
		printf '%s\n\ngovulncheck: %s reaches known vulnerabilities: update the modules, or Go, that it names above\n' "$found" "$module" >&2
		exit 1
		;;
	*)
		printf '%s\n' "$found" >&2
		cat >&2 <<-END

		************************************************************************
		NOT CHECKED for known vulnerabilities: govulncheck failed, see above.
		Where vuln.go.dev can't be reached, set GOVULNDB to a mirror or file://.
		************************************************************************

		END
		[ -z "${RDV_REQUIRE_VULNDB:-}" ] || exit 1
		exit 0
		;;
	esac
done
