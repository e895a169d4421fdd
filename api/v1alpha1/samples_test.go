package v1alpha1_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// TestSamples has the API server take every object of the samples, but for keeping it: a field that it doesn't know, or
// that is wrong, fails.
func TestSamples(t *testing.T) {
	c := apiServer(t)
	files, err := filepath.Glob("../../config/samples/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	production, err := filepath.Glob("../../config/samples/production/*.yaml")
	if err != nil || len(files) < 5 || len(production) < 5 {
		t.Fatalf("samples are %v and %v, %v", files, production, err)
	}
	for _, namespace := range []string{"rendezvous-demo", "desktops"} {
		if err := c.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range append(files, production...) {
		if filepath.Base(file) == "kustomization.yaml" || filepath.Base(file) == "namespace.yaml" {
			continue
		}
		t.Run(file, func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			objects := 0
			for documents := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096); ; objects++ {
				obj := &unstructured.Unstructured{}
				if err := documents.Decode(&obj.Object); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatal(err)
				}
				if err := c.Create(t.Context(), obj, client.DryRunAll, client.FieldValidation(metav1.FieldValidationStrict)); err != nil {
					t.Errorf("%s %s: %v", obj.GetKind(), obj.GetName(), err)
				}
			}
			if objects == 0 {
				t.Error("there is nothing in it")
			}
		})
	}
}
