package gateway

import (
	"context"
	"time"

	"rendezvous.dev/rendezvous/wire/admission"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/trace"
)

// Enter is admission.AdmissionServer's. The ticket is checked here first, so that brokers hear of good ones only.
func (g *Gateway) Enter(ctx context.Context, r *admission.EnterRequest) (*admission.EnterResponse, error) {
	began := time.Now()
	claims, w, err := g.verify(r.Ticket)
	resp := &admission.EnterResponse{ActivityId: r.ActivityId}
	if claims.User != "" {
		r.ActivityId = g.own(r.ActivityId, claims)
		resp.ActivityId = r.ActivityId
	}
	if err == nil {
		reply, asked := w.enter(ctx, r)
		resp.Retry, resp.Gateway, resp.Hostname, resp.Port, resp.Target = reply.Retry, reply.Gateway, reply.Hostname, uint32(reply.Port), reply.Target
		err = asked
	}
	e := refusal.From(err)
	g.metrics.Entries.WithLabelValues(codeOf(e)).Inc()
	if e != nil {
		resp.Error = protoError(e)
		if w != nil && claims.User != "" { // the relay has no timeline of an entry
			w.trace(trace.Event{ActivityID: r.ActivityId, Step: trace.StepAdmit, Component: "gateway/" + g.instance, At: began, Duration: time.Since(began),
				Detail: e.Message, Error: string(e.Code), User: claims.User})
		}
		g.log.Info("entry refused", "activity", r.ActivityId, "user", claims.User, "client", r.ClientAddr, "retry", resp.Retry, "code", e.Code, "error", e.Message)
		return resp, nil
	}
	g.log.Info("client sent on", "activity", r.ActivityId, "user", claims.User, "resource", claims.Resource, "gateway", resp.Gateway)
	return resp, nil
}
