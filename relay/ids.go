package relay

import (
	"crypto/rand"
	"fmt"
	"strings"
)

// newGUID makes a random GUID (RFC 9562, version 4), lower-case.
func newGUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails: the runtime ends the process where there is no randomness
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// parseGUID reads a GUID that somebody else made, with or without braces; "" where it is none.
func parseGUID(s string) string {
	s = strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(s, "{"), "}"))
	if len(s) != 36 {
		return ""
	}
	for i := range len(s) {
		c := s[i]
		dash := i == 8 || i == 13 || i == 18 || i == 23
		if dash != (c == '-') || !dash && !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f') {
			return ""
		}
	}
	return s
}
