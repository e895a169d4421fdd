package setup

import (
	"fmt"
	"io"
	"strings"
)

// around is how many lines are shown around a change.
const around = 2

// showDiff writes what changes in a file, line by line. The files have a few hundred lines, so the plain table will do.
func showDiff(w io.Writer, c change) {
	from, to := split(c.before), split(c.after)
	name := c.path
	if !c.existed {
		name += " (new)"
	}
	fmt.Fprintf(w, "--- %s\n", name)
	// common[i][j] is how many lines from[i:] and to[j:] have in common.
	common := make([][]int, len(from)+1)
	for i := range common {
		common[i] = make([]int, len(to)+1)
	}
	for i := len(from) - 1; i >= 0; i-- {
		for j := len(to) - 1; j >= 0; j-- {
			if from[i] == to[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var out []string
	for i, j := 0, 0; i < len(from) || j < len(to); {
		switch {
		case i < len(from) && j < len(to) && from[i] == to[j]:
			out = append(out, " "+from[i])
			i, j = i+1, j+1
		case i < len(from) && (j == len(to) || common[i+1][j] >= common[i][j+1]):
			out = append(out, "-"+from[i])
			i++
		default:
			out = append(out, "+"+to[j])
			j++
		}
	}
	shown := make([]bool, len(out))
	for i, l := range out {
		if l[0] != ' ' {
			for k := max(0, i-around); k <= min(len(out)-1, i+around); k++ {
				shown[k] = true
			}
		}
	}
	for i, l := range out {
		switch {
		case shown[i]:
			fmt.Fprintln(w, l)
		case i > 0 && shown[i-1]:
			fmt.Fprintln(w, " …")
		}
	}
}

func split(text string) []string {
	if text == "" {
		return nil
	}
	return strings.Split(strings.TrimSuffix(text, "\n"), "\n")
}
