package controllers

import (
	"context"
	"fmt"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

// issued says how a Certificate that we applied stands: nil problems and true where its Secret holds a certificate for
// the spec as it is. It also sees to it that the Secret goes with its owner.
func (a *Applier) issued(ctx context.Context, owner client.Object, name string, found *problems) (*certmanager.Certificate, bool, error) {
	cert, err := getOrNil(ctx, a.Client, owner.GetNamespace(), name, &certmanager.Certificate{})
	if err != nil {
		return nil, false, err
	}
	what := fmt.Sprintf("Certificate %q", name)
	if cert == nil {
		found.add(rdv.ReasonCertificatePend, what+" is not made yet")
		return nil, false, nil
	}
	secret, err := secretMetadata(ctx, a.Client, owner.GetNamespace(), cert.Spec.SecretName)
	if err != nil {
		return nil, false, err
	}
	hasSecret := secret != nil && secret.Annotations[certmanager.CertificateNameKey] == name
	if hasSecret {
		if err := a.Adopt(ctx, owner, cert, secret); err != nil {
			return nil, false, err
		}
	}
	if problem := certificateProblem(cert); problem != nil {
		found.add(problem.reason, what+" "+problem.message)
		return cert, hasSecret && certificateIssuedBefore(cert), nil
	}
	if !hasSecret {
		found.add(rdv.ReasonCertificatePend, fmt.Sprintf("%s waits for its Secret %q", what, cert.Spec.SecretName))
	}
	return cert, hasSecret, nil
}

// certificateIssuedBefore says that the Secret of a Certificate that is not ready now still holds an earlier one.
func certificateIssuedBefore(cert *certmanager.Certificate) bool { return cert.Status.NotAfter != nil }

// certificateProblem is nil where cert-manager says that the Certificate, as it is declared now, is ready.
func certificateProblem(cert *certmanager.Certificate) *problem {
	var ready, issuing *certmanager.CertificateCondition
	for i := range cert.Status.Conditions {
		switch c := &cert.Status.Conditions[i]; c.Type {
		case certmanager.CertificateConditionReady:
			ready = c
		case certmanager.CertificateConditionIssuing:
			issuing = c
		}
	}
	switch {
	case ready != nil && ready.Status == cmmeta.ConditionTrue && ready.ObservedGeneration == cert.Generation:
		return nil
	case issuing != nil && issuing.Status == cmmeta.ConditionFalse && cert.Status.FailedIssuanceAttempts != nil:
		return &problem{reason: rdv.ReasonCertificateFailed, message: "could not be issued: " + issuing.Message}
	case ready != nil && ready.ObservedGeneration == cert.Generation && ready.Message != "":
		return &problem{reason: rdv.ReasonCertificatePend, message: "is being issued: " + ready.Message}
	}
	return &problem{reason: rdv.ReasonCertificatePend, message: "is being issued"}
}

// pruneCertificates removes the owner's Certificates that are no longer wanted and, once each is gone, its Secret:
// cert-manager would make that anew before.
func (a *Applier) pruneCertificates(ctx context.Context, owner client.Object, labels client.MatchingLabels, wanted map[string]bool) error {
	if err := a.Prune(ctx, owner, certmanager.SchemeGroupVersion.WithKind(certmanager.CertificateKind), labels, wanted); err != nil {
		return err
	}
	list := &certmanager.CertificateList{}
	if err := a.Client.List(ctx, list, client.InNamespace(owner.GetNamespace()), labels); err != nil {
		return fmt.Errorf("list Certificates: %w", err)
	}
	keep := map[string]bool{}
	for i := range list.Items {
		keep[list.Items[i].Spec.SecretName] = true
	}
	for name := range wanted {
		keep[name] = true
	}
	return a.Prune(ctx, owner, secretKind, labels, keep)
}
