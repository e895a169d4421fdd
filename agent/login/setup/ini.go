package setup

import (
	"slices"
	"strings"
)

// iniFile is one of xrdp's configuration files, by lines. Sections and keys are found as xrdp finds them, in any case.
type iniFile struct{ lines []string }

// off begins a line of a section that was taken out.
const off = "#rendezvous# "

func parseINI(text string) *iniFile {
	return &iniFile{strings.Split(text, "\n")}
}

// header gives the name of the section that begins with a line.
func header(line string) (name string, ok bool) {
	line = strings.TrimSpace(line)
	if !strings.HasPrefix(line, "[") {
		return "", false
	}
	name, _, ok = strings.Cut(line[1:], "]")
	return strings.TrimSpace(name), ok
}

// assignment reads a line KEY=VALUE.
func assignment(line string) (key, value string, ok bool) {
	line = strings.TrimSpace(line)
	if line == "" || strings.ContainsRune("#;[", rune(line[0])) {
		return "", "", false
	}
	key, value, ok = strings.Cut(line, "=")
	return strings.TrimSpace(key), strings.TrimSpace(value), ok
}

func (f *iniFile) sections() []string {
	var names []string
	for _, l := range f.lines {
		if name, ok := header(l); ok {
			names = append(names, name)
		}
	}
	return names
}

// each calls do for each line of a section but its header, and takes the line that do returns in its place.
func (f *iniFile) each(section string, do func(i int, line string) string) {
	inside := false
	for i, l := range f.lines {
		if name, ok := header(l); ok {
			inside = strings.EqualFold(name, section)
		} else if inside {
			f.lines[i] = do(i, l)
		}
	}
}

// get gives a key's value, the last where there are several.
func (f *iniFile) get(section, key string) (value string) {
	f.each(section, func(_ int, line string) string {
		if k, v, ok := assignment(line); ok && strings.EqualFold(k, key) {
			value = v
		}
		return line
	})
	return value
}

// set gives a key one value: in its own line, or else in a new one below the section's header.
func (f *iniFile) set(section, key, value string) {
	found := false
	f.each(section, func(_ int, line string) string {
		k, v, ok := assignment(line)
		switch {
		case !ok || !strings.EqualFold(k, key):
			return line
		case found:
			return off + line
		}
		found = true
		if v == value {
			return line
		}
		return key + "=" + value
	})
	if found {
		return
	}
	for i, l := range f.lines {
		if name, ok := header(l); ok && strings.EqualFold(name, section) {
			f.lines = slices.Insert(f.lines, i+1, key+"="+value)
			return
		}
	}
	if n := len(f.lines); n > 0 && f.lines[n-1] == "" {
		f.lines = f.lines[:n-1]
	}
	f.lines = append(f.lines, "", "["+section+"]", key+"="+value, "")
}

// disable turns a section into comments.
func (f *iniFile) disable(section string) {
	inside := false
	for i, l := range f.lines {
		name, ok := header(l)
		if ok {
			inside = strings.EqualFold(name, section)
		}
		if _, _, set := assignment(l); inside && (ok || set) {
			f.lines[i] = off + l
		}
	}
}

// marked is the file's text, with the mark.
func (f *iniFile) marked() string {
	text := strings.Join(f.lines, "\n")
	if !marked(text) {
		text = "; " + mark + "\n" + text
	}
	return text
}
