#!/usr/bin/env bash
# What `make lint` runs. Needs the tools in bin/ (make tools).
set -euo pipefail
cd "$(dirname "$0")/../.."

unformatted=$(git ls-files '*.go' | xargs gofmt -l)
if [ -n "$unformatted" ]; then
	printf 'not gofmt-ed, run gofmt -w on:\n%s\n' "$unformatted" >&2
	exit 1
fi

for module in . hack hack/cluster hack/cluster/dex hack/cluster/netpol hack/cluster/localpath hack/desktop hack/bench hack/sim; do
	echo "vet and staticcheck: $module"
	(cd "$module" && go vet ./... && "$OLDPWD/bin/staticcheck" ./...)
done
GOOS=windows go vet ./agent/... ./cmd/agent ./client/... ./cmd/rdv

hack/lint/vulncheck.sh

# Generated files: what `make generate` makes must be what is committed or staged.
before=$(git ls-files -s -- api config docs/api.md wire/admission && git diff -- api config docs/api.md wire/admission | sha256sum)
make --no-print-directory generate
after=$(git ls-files -s -- api config docs/api.md wire/admission && git diff -- api config docs/api.md wire/admission | sha256sum)
if [ "$before" != "$after" ]; then
	echo 'generated files were out of date: commit what `make generate` has just written' >&2
	git diff --stat -- api config docs/api.md wire/admission >&2
	exit 1
fi
go -C hack test ./lint -count=1
