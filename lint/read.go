package lint

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/util/json"
	kubeyaml "sigs.k8s.io/yaml"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

// maxFile bounds one file.
const maxFile = 16 << 20

// Source is one file as read.
type Source struct {
	Name string
	Data []byte
}

// Read reads files, folders (all .yaml, .yml and .json files below them) and, for "-", standard input.
func Read(paths []string, stdin io.Reader) ([]Source, error) {
	var sources []Source
	for _, path := range paths {
		if path == "-" {
			data, err := io.ReadAll(io.LimitReader(stdin, maxFile+1))
			if err != nil {
				return nil, fmt.Errorf("standard input: %w", err)
			}
			sources = append(sources, Source{"<stdin>", data})
			continue
		}
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		files := []string{path}
		if info.IsDir() {
			if files, err = below(path); err != nil {
				return nil, err
			}
			if len(files) == 0 {
				return nil, fmt.Errorf("%s holds no .yaml, .yml or .json file", path)
			}
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				return nil, err
			}
			sources = append(sources, Source{file, data})
		}
	}
	for _, s := range sources {
		if len(s.Data) > maxFile {
			return nil, fmt.Errorf("%s is larger than %d MiB", s.Name, maxFile>>20)
		}
	}
	return sources, nil
}

func below(dir string) (files []string, err error) {
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() && path != dir && strings.HasPrefix(entry.Name(), ".") {
			return filepath.SkipDir
		}
		if !entry.IsDir() && slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(path)) {
			files = append(files, path)
		}
		return nil
	})
	return files, err
}

// object is one object of a file.
type object struct {
	file string
	line int // added to the lines of node
	node *yaml.Node
	data map[string]any
}

// at is the line of a field, or of the nearest that holds it. path is as errors of the API server spell it.
func (o *object) at(path string) int {
	node := o.node
	for _, step := range steps(path) {
		next := child(node, step)
		if next == nil {
			break
		}
		node = next
	}
	return node.Line + o.line
}

var stepPattern = regexp.MustCompile(`\[[^\]]*\]|[^.\[\]]+`)

func steps(path string) []string { return stepPattern.FindAllString(path, -1) }

// child is one step down: a key, an index, or a list's entry by its name.
func child(node *yaml.Node, step string) *yaml.Node {
	if node.Kind == yaml.AliasNode {
		node = node.Alias
	}
	key := strings.Trim(step, `[]"`)
	switch node.Kind {
	case yaml.MappingNode:
		for i := 0; i+1 < len(node.Content); i += 2 {
			if node.Content[i].Value == key {
				value := *node.Content[i+1]
				value.Line = node.Content[i].Line // of the key: a value may begin below it
				return &value
			}
		}
	case yaml.SequenceNode:
		if i, err := strconv.Atoi(key); err == nil && i < len(node.Content) {
			return node.Content[i]
		}
		for _, entry := range node.Content {
			if name := child(entry, "name"); name != nil && name.Value == key {
				return entry
			}
		}
	}
	return nil
}

var documentEnd = regexp.MustCompile(`(?m)^---(?:[ \t].*)?$`)

// parse splits a file into objects. A document that can't be read is a finding, and hides no other.
func parse(s Source) (objects []object, findings []Finding) {
	data := bytes.ReplaceAll(s.Data, []byte("\r\n"), []byte("\n"))
	begin := 0
	ends := append(documentEnd.FindAllIndex(data, -1), []int{len(data), len(data)})
	for _, end := range ends {
		text := data[begin:end[0]]
		line := bytes.Count(data[:begin], []byte("\n"))
		begin = end[1]
		var root yaml.Node
		err := yaml.Unmarshal(text, &root)
		var content any
		if err == nil && len(root.Content) > 0 {
			content, err = asKubectlReads(text)
		}
		if err != nil {
			findings = append(findings, Finding{File: s.Name, Line: line + lineOf(err), Message: "can't be read: " + yamlMessage(err)})
			continue
		}
		if content == nil {
			continue
		}
		if what := halfOurs(content); what != "" {
			findings = append(findings, Finding{File: s.Name, Line: line + root.Content[0].Line, Message: what})
		}
		objects = append(objects, gather(s.Name, line, root.Content[0], content)...)
	}
	return objects, findings
}

// asKubectlReads gives a document's content, and refuses keys that stand twice.
func asKubectlReads(text []byte) (content any, err error) {
	asJSON, err := kubeyaml.YAMLToJSONStrict(text)
	if err != nil {
		return nil, err
	}
	err = json.Unmarshal(asJSON, &content)
	return content, err
}

// halfOurs says what is missing from a document that looks like an object of ours, and isn't one.
func halfOurs(content any) string {
	data, _ := content.(map[string]any)
	kind, _ := data["kind"].(string)
	apiVersion, _ := data["apiVersion"].(string)
	switch {
	case apiVersion == "" && slices.Contains([]string{"Workspace", "HostPool", "SessionHost"}, kind): // there are other Gateways
		return fmt.Sprintf("a %s without apiVersion: write apiVersion: %s", kind, rdv.GroupVersion)
	case kind == "" && strings.HasPrefix(apiVersion, rdv.GroupVersion.Group+"/"):
		return fmt.Sprintf("an object of %s without kind", apiVersion)
	}
	return ""
}

// gather takes lists apart, and leaves out what is no Kubernetes object: values of a chart, a kustomization.
func gather(file string, line int, node *yaml.Node, content any) (objects []object) {
	data, _ := content.(map[string]any)
	kind, _ := data["kind"].(string)
	apiVersion, _ := data["apiVersion"].(string)
	if kind == "" || apiVersion == "" {
		return nil
	}
	items, isList := data["items"].([]any)
	list := child(node, "items")
	if !isList || !strings.HasSuffix(kind, "List") || list == nil || len(list.Content) != len(items) {
		return []object{{file, line, node, data}}
	}
	for i, item := range items {
		objects = append(objects, gather(file, line, list.Content[i], item)...)
	}
	return objects
}

var yamlLine = regexp.MustCompile(`line (\d+): ?`)

func lineOf(err error) int {
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
		n, _ := strconv.Atoi(m[1])
		return n
	}
	return 1
}

func yamlMessage(err error) string {
	text := strings.TrimPrefix(yamlLine.ReplaceAllString(err.Error(), ""), "yaml: ")
	return strings.Join(strings.Fields(strings.TrimPrefix(text, "unmarshal errors:")), " ")
}
