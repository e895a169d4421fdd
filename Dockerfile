# One target per binary: docker build --target relay -t REGISTRY/relay:TAG .
# The embedded cluster needs none of this: `make images` builds the same images without a container engine.
# The patch release of Go that go.mod names, too: a newer one where an advisory for the standard library asks for it.
FROM golang:1.26.11 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY api/ api/
COPY agent/ agent/
COPY broker/ broker/
COPY client/ client/
COPY cmd/ cmd/
COPY config/ config/
COPY controllers/ controllers/
COPY gateway/ gateway/
COPY lint/ lint/
COPY relay/ relay/
COPY sessionsapi/ sessionsapi/
COPY wire/ wire/
ARG TARGETOS=linux TARGETARCH VERSION=(devel)
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -ldflags="-s -w -X 'main.linked=$VERSION'" -o /out/ ./cmd/...

# Static binaries: no libc, no shell; the CA certificates are there for brokers and agents that trust public issuers.
FROM scratch AS base
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
USER 65532:65532

FROM base AS manager
COPY --from=build /out/manager /manager
ENTRYPOINT ["/manager"]

FROM base AS broker
COPY --from=build /out/broker /broker
ENTRYPOINT ["/broker"]

FROM base AS gateway
COPY --from=build /out/gateway /gateway
ENTRYPOINT ["/gateway"]

FROM base AS relay
COPY --from=build /out/relay /relay
ENTRYPOINT ["/relay"]

FROM base AS agent
COPY --from=build /out/agent /agent
ENTRYPOINT ["/agent"]

FROM base AS rdv
COPY --from=build /out/rdv /rdv
ENTRYPOINT ["/rdv"]
