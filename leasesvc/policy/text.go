package policy

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxReason is the longest reason of a decision, in bytes.
const MaxReason = 200

// Clean makes text of unknown origin fit for logs and terminals: characters that are not shown (control characters, line
// breaks, marks of writing direction) and bytes that are not UTF-8 become spaces, spaces at both ends go, and what is longer
// than most bytes is cut at a character.
func Clean(s string, most int) string {
	var b strings.Builder
	for _, r := range s {
		switch {
		case !unicode.IsGraphic(r), r == utf8.RuneError, unicode.IsSpace(r):
			r = ' '
		}
		if r == ' ' && b.Len() == 0 {
			continue
		}
		if b.Len()+utf8.RuneLen(r) > most {
			break
		}
		b.WriteRune(r)
	}
	return strings.TrimRight(b.String(), " ")
}
