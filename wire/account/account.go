// Package account turns what an identity provider says of a person into the name of a Unix account, the same way in
// brokers, which promise it, and on session hosts, which make it.
//
//	alice@example.com      alice
//	Jürgen.Groß@example.de jurgen.gross
//	EXAMPLE\bob            bob
//	7of9                   u7of9
//
// Different persons may come out alike: that is found where accounts are given out, and refused there.
package account

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/text/unicode/norm"
)

// MaxLength of a name, in bytes: what Linux's useradd and utmp take.
const MaxLength = 32

// Bounds of user ids that may be given out: below are the system's, above is (uid_t)-1 and what kernels treat specially.
const (
	MinUID = 1000
	MaxUID = 1<<31 - 1
)

// nobody's ids are never a person's (Linux's overflow uid, and its 16-bit form).
var nobody = []uint32{65534, 65535}

// reserved are names that a host needs for itself, whether or not this one has them. Hosts refuse besides every name
// that their own list of users has for the system.
var reserved = []string{
	"root", "daemon", "bin", "sys", "sync", "games", "man", "lp", "mail", "news", "uucp", "proxy", "www-data", "backup", "list", "irc", "gnats",
	"nobody", "nogroup", "adm", "wheel", "sudo", "operator", "toor", "admin", "administrator", "halt", "shutdown", "ftp", "dbus", "messagebus",
	"sshd", "xrdp", "polkitd", "rtkit", "avahi", "colord", "lightdm", "gdm", "sddm", "sssd", "tss", "uuidd", "ntp", "chrony", "docker", "lxd",
	"postgres", "mysql", "redis", "nginx", "apache", "rendezvous", "rdv",
}

var valid = regexp.MustCompile(`^[a-z_][a-z0-9_.-]*$`)

// Name makes an account's name of a claim's value. The part before @ counts, and the part behind a Windows domain's
// backslash. Letters lose case and accents; what no account may have becomes a hyphen. An error says why no account can
// have the name, and quotes the value.
func Name(value string) (string, error) {
	refuse := func(why string) (string, error) {
		return "", fmt.Errorf("%q can't become an account: %s", shown(value), why)
	}
	for _, r := range value {
		switch {
		case r == '/' || r == ':' || r == ',' || r == '=':
			return refuse(fmt.Sprintf("it has a %q", r))
		case unicode.IsControl(r) || r == unicode.ReplacementChar:
			return refuse("it has a control character, or is not UTF-8")
		}
	}
	local := value
	if i := strings.LastIndexByte(local, '\\'); i >= 0 {
		local = local[i+1:]
	}
	if i := strings.IndexByte(local, '@'); i >= 0 {
		local = local[:i]
	}
	name := strings.Trim(safe(local), "-.")
	if name == "" {
		return refuse("nothing is left of it")
	}
	if c := name[0]; c >= '0' && c <= '9' {
		name = "u" + name
	}
	if err := CheckName(name); err != nil {
		return refuse(err.Error())
	}
	return name, nil
}

// shown is a name as errors quote it.
func shown(name string) string {
	if len(name) > 4*MaxLength {
		return strings.ToValidUTF8(name[:4*MaxLength], "") + "…"
	}
	return name
}

// safe spells a text in the letters that names may have.
func safe(text string) string {
	var b strings.Builder
	for _, r := range norm.NFKD.String(text) {
		switch r = unicode.ToLower(r); {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '_', r == '.', r == '-':
			b.WriteRune(r)
		case unicode.Is(unicode.Mn, r): // the accent of the letter before
		case r == 'ß':
			b.WriteString("ss")
		case r == 'æ':
			b.WriteString("ae")
		case r == 'ø':
			b.WriteByte('o')
		case r == 'ł':
			b.WriteByte('l')
		default:
			b.WriteByte('-')
		}
	}
	return b.String()
}

// CheckName says why a name can't be a person's account.
func CheckName(name string) error {
	switch {
	case name == "":
		return errors.New("the name is empty")
	case len(name) > MaxLength:
		return fmt.Errorf("%q has %d characters, and an account's name has at most %d", shown(name), len(name), MaxLength)
	case !valid.MatchString(name):
		return fmt.Errorf("%q is not a valid account name: use a-z, 0-9, '_', '.' and '-', beginning with a letter", shown(name))
	case slices.Contains(reserved, name) || strings.HasPrefix(name, "systemd-") || strings.HasPrefix(name, "_"):
		return fmt.Errorf("%q is a name that systems use for themselves", name)
	}
	return nil
}

// CheckUID says why a user id can't be a person's.
func CheckUID(uid uint32) error {
	if uid < MinUID || uid > MaxUID || slices.Contains(nobody, uid) {
		return fmt.Errorf("user id %d is the system's: a person's is from %d to %d, and not %d or %d", uid, MinUID, MaxUID, nobody[0], nobody[1])
	}
	return nil
}

// ParseUID reads a claim's value.
func ParseUID(value string) (uint32, error) {
	n, err := strconv.ParseUint(value, 10, 32)
	if err != nil || strconv.FormatUint(n, 10) != value {
		return 0, fmt.Errorf("%q is not a user id", value)
	}
	return uint32(n), CheckUID(uint32(n))
}
