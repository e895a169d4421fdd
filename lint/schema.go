package lint

import (
	"context"
	"fmt"
	"io/fs"
	"sort"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	apivalidation "k8s.io/apimachinery/pkg/api/validation"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"

	"rendezvous.dev/rendezvous/config/crd"
)

// definition is one of our kinds, as the API server checks it.
type definition struct {
	structural *structuralschema.Structural
	schema     validation.SchemaValidator
	rules      *cel.Validator
}

// definitions reads the CRDs that the operator is installed with, by kind.
func definitions(version string) (map[string]*definition, error) {
	files, err := fs.Glob(crd.Bases, "bases/*.yaml")
	if err != nil {
		return nil, err
	}
	kinds := map[string]*definition{}
	for _, file := range files {
		text, err := crd.Bases.ReadFile(file)
		if err != nil {
			return nil, err
		}
		var one apiextensionsv1.CustomResourceDefinition
		if err := yaml.Unmarshal(text, &one); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		for _, v := range one.Spec.Versions {
			if v.Name != version {
				continue
			}
			var props apiextensions.JSONSchemaProps
			if err := apiextensionsv1.Convert_v1_JSONSchemaProps_To_apiextensions_JSONSchemaProps(v.Schema.OpenAPIV3Schema, &props, nil); err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
			d := &definition{}
			if d.structural, err = structuralschema.NewStructural(&props); err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
			if d.schema, _, err = validation.NewSchemaValidator(&props); err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
			d.rules = cel.NewValidator(d.structural, true, celconfig.PerCallLimit)
			kinds[one.Spec.Names.Kind] = d
		}
	}
	return kinds, nil
}

// check does what the API server would: of content nothing is changed.
func (d *definition) check(ctx context.Context, content map[string]any) (faults []fault) {
	obj := runtime.DeepCopyJSON(content)
	unknown := pruning.PruneWithOptions(obj, d.structural, true, structuralschema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true})
	sort.Strings(unknown)
	for _, path := range unknown {
		faults = append(faults, fault{path, "unknown field"})
	}
	defaulting.Default(obj, d.structural)
	meta := &unstructured.Unstructured{Object: obj}
	if meta.GetNamespace() == "" {
		meta.SetNamespace("default") // whatever it is applied to
	}
	errs := apivalidation.ValidateObjectMetaAccessor(meta, true, apivalidation.NameIsDNSSubdomain, field.NewPath("metadata"))
	wrong := validation.ValidateCustomResource(nil, obj, d.schema)
	errs = append(errs, wrong...)
	errs = append(errs, listtype.ValidateListSetsAndMaps(nil, d.structural, obj)...)
	if len(wrong) == 0 && d.rules != nil { // rules count on the types being right
		broken, _ := d.rules.Validate(ctx, nil, d.structural, obj, nil, celconfig.RuntimeCELCostBudget)
		errs = append(errs, broken...)
	}
	for _, err := range errs {
		path := err.Field
		if path == "<nil>" {
			path = ""
		}
		message := err.ErrorBody()
		if err.Type == field.ErrorTypeInvalid && err.Detail != "" {
			message = err.Detail
		}
		faults = append(faults, fault{path, message})
	}
	return faults
}

// fault is what is wrong with one field.
type fault struct{ path, message string }
