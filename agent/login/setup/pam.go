package setup

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// The block of ours in a PAM file stands between these.
const (
	blockBegin = "# rendezvous: begin"
	blockEnd   = "# rendezvous: end"
)

// pamBlock is what asks the agent. Its comments are for whoever reads the file to find out why a login fails.
func pamBlock(o Options) []string {
	lines := []string{blockBegin, "# " + mark}
	ask := fmt.Sprintf("auth  [success=ignore default=die]  pam_exec.so quiet %s pam --login-dir=%s", o.Program, o.LoginDir)
	if o.Mode == Password {
		lines = append(lines,
			"# Connections from other machines go on to the lines below this block. For those of this machine, the agent's among",
			"# them, the agent decides alone.",
			fmt.Sprintf("auth  [success=2 default=ignore]    pam_exec.so quiet %s pam --elsewhere", o.Program),
			ask,
			"auth  [success=done default=die]    pam_permit.so")
	} else {
		lines = append(lines,
			"# The agent says whose a connection is. Nobody else gets in, and passwords don't count.",
			ask,
			"# pam_exec sets no credentials, and PAM refuses a login for which no module did.",
			"auth  required                      pam_permit.so")
	}
	return append(lines, blockEnd)
}

// pamLine is one rule, which may go over several lines of the file.
type pamLine struct {
	raw     []string
	kind    string // auth, account, password, session, @include; empty for comments
	dash    bool   // a missing module doesn't matter
	control string
	rest    string // module and arguments; for an @include, the file
}

var controlAndRest = regexp.MustCompile(`^(\[[^\]]*\]|\S+)\s*(.*)$`)

func parsePAM(text string) []pamLine {
	var all []pamLine
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		l := pamLine{raw: []string{lines[i]}}
		rule := lines[i]
		for strings.HasSuffix(rule, `\`) && i+1 < len(lines) {
			i++
			l.raw = append(l.raw, lines[i])
			rule = strings.TrimSuffix(rule, `\`) + " " + lines[i]
		}
		rule, _, _ = strings.Cut(rule, "#")
		kind, rest, _ := strings.Cut(strings.TrimSpace(strings.ReplaceAll(rule, "\t", " ")), " ")
		rest = strings.TrimSpace(rest)
		kind, l.dash = strings.CutPrefix(kind, "-")
		l.kind = strings.ToLower(kind)
		if l.kind == "@include" {
			l.rest = rest
		} else if m := controlAndRest.FindStringSubmatch(rest); m != nil {
			l.control, l.rest = m[1], strings.Join(strings.Fields(m[2]), " ")
		}
		all = append(all, l)
	}
	return all
}

// environment says that a rule sets variables and can't let anybody in: pam_env answers "ignore" when it is asked who may.
func (l pamLine) environment() bool {
	module, _, _ := strings.Cut(l.rest, " ")
	return l.kind == "auth" && module == "pam_env.so" && slices.Contains([]string{"required", "requisite", "optional"}, strings.ToLower(l.control))
}

// planPAM puts the block before whatever else decides who logs in, and in mode Connection removes that.
func planPAM(m machine, o Options) (string, error) {
	text := m.texts[pamFile]
	var kept []string
	at := -1
	inBlock := false
	for _, l := range parsePAM(text) {
		switch {
		case l.raw[0] == blockBegin:
			inBlock = true
			if at < 0 {
				at = len(kept)
			}
			continue
		case inBlock:
			inBlock = l.raw[0] != blockEnd
			continue
		case l.kind == "auth" && !l.environment(), l.kind == "@include":
			if at < 0 {
				at = len(kept)
			}
		}
		if o.Mode == Connection && !l.environment() {
			switch {
			case l.kind == "auth", l.kind == "@include" && l.rest == "common-auth":
				continue
			case l.kind == "@include" && asks(m.texts, l.rest, 0):
				return "", refusal("%s includes %s, which has auth lines and others: write the others into %s instead, because nothing but the agent may decide who logs in", pamFile, l.rest, pamFile)
			}
		}
		kept = append(kept, l.raw...)
	}
	if inBlock {
		return "", refusal("%s has %q and no %q after it: restore that line", pamFile, blockBegin, blockEnd)
	}
	if at < 0 {
		at = 0
	}
	return strings.Join(slices.Insert(kept, at, pamBlock(o)...), "\n"), nil
}

// asks says that a PAM file, or one that it includes, has auth rules, or can't be read.
func asks(texts map[string]string, name string, depth int) bool {
	text, ok := texts["/etc/pam.d/"+name]
	if !ok || depth > 8 {
		return true
	}
	return slices.ContainsFunc(parsePAM(text), func(l pamLine) bool {
		return l.kind == "auth" || l.kind == "@include" && asks(texts, l.rest, depth+1)
	})
}

var (
	askRule       = regexp.MustCompile(`^pam_exec\.so quiet (/[^ \[\]]+) pam(?: --login-dir[= ](/[^ \[\]]+))?$`)
	elsewhereRule = regexp.MustCompile(`^pam_exec\.so quiet (/[^ \[\]]+) pam --elsewhere$`)
)

// guarded says why a PAM file doesn't ask the agent in loginDir before anything else, or which program it runs for that.
func guarded(text, loginDir, defaultDir string) (program string, err error) {
	var rules []pamLine
	for _, l := range parsePAM(text) {
		if (l.kind == "auth" || l.kind == "@include") && !l.environment() {
			rules = append(rules, l)
		}
	}
	is := func(i int, control string) bool {
		return i < len(rules) && rules[i].kind == "auth" && !rules[i].dash && strings.Join(strings.Fields(rules[i].control), " ") == control
	}
	first := 0
	if is(0, "[success=2 default=ignore]") {
		if m := elsewhereRule.FindStringSubmatch(rules[0].rest); m != nil {
			first, program = 1, m[1]
		}
	}
	if !is(first, "[success=ignore default=die]") {
		return "", fmt.Errorf("%s does not ask the agent first", pamFile)
	}
	m := askRule.FindStringSubmatch(rules[first].rest)
	if m == nil || first == 1 && m[1] != program {
		return "", fmt.Errorf("%s does not ask the agent first", pamFile)
	}
	if m[2] == "" {
		m[2] = defaultDir
	}
	if m[2] != loginDir {
		return "", fmt.Errorf("%s asks an agent with --login-dir %s, and this one has %s", pamFile, m[2], loginDir)
	}
	after := first + 1
	last := "required"
	if first == 1 {
		last = "[success=done default=die]"
	}
	if !is(after, last) || rules[after].rest != "pam_permit.so" {
		return "", fmt.Errorf("%s has no pam_permit.so after the line that asks the agent", pamFile)
	}
	return m[1], nil
}
