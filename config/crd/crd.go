// Package crd holds the definitions of the four kinds, as they are installed.
package crd

import "embed"

// Bases holds one CustomResourceDefinition per file, in folder bases.
//
//go:embed bases/*.yaml
var Bases embed.FS
