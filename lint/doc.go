// Package lint checks manifests without a cluster: by the definitions that the API server would check them by, with their
// CEL rules, and by the operator's own rules (controllers/rules, controllers/render), which a server-side dry run doesn't
// know. References and hostnames are checked among all files together. Objects of other kinds are read where ours refer
// to them, and not checked.
package lint
