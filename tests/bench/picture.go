package main

import (
	"fmt"
	"html"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

// drawTunnels draws a bar chart for each column, three beside each other. A bar is cut at twice the second longest.
func drawTunnels(all []results) error {
	const across, width, bar, label, length = 3, 450, 16, 190, 190
	columns := slices.Concat(callColumns, otherColumns)
	height := 44 + bar*len(all)
	down := (len(columns) + across - 1) / across
	var svg strings.Builder
	fmt.Fprintf(&svg, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" `+
		`font-family="sans-serif" font-size="11"><rect width="100%%" height="100%%" fill="white"/>`+"\n",
		across*width+20, down*height)
	for i, c := range columns {
		x, y := i%across*width, i/across*height
		better := "less is better"
		if c.more {
			better = "more is better"
		}
		fmt.Fprintf(&svg, `<text x="%d" y="%d" font-size="13">%s <tspan fill="#777">(%s)</tspan></text>`+"\n",
			x+10, y+24, html.EscapeString(c.title), better)
		values := make([]float64, len(all))
		for i, r := range all {
			values[i], _ = cell(all, r, c.title)
		}
		sorted := slices.Sorted(slices.Values(values))
		most := min(sorted[len(sorted)-1], 2*sorted[len(sorted)-2])
		for i, value := range values {
			fill := "#b8c4d0"
			if strings.HasPrefix(all[i].name, "ours") {
				fill = "#1f6feb"
			}
			top := y + 32 + i*bar
			size, cut := max(value, 0)/most*length, ""
			if size > length {
				size, cut = length, " (cut)"
			}
			fmt.Fprintf(&svg, `<text x="%d" y="%d" text-anchor="end">%s</text>`+
				`<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/><text x="%.1f" y="%d">%.*f%s</text>`+"\n",
				x+label, top+11, html.EscapeString(all[i].name), x+label+6, top, size, bar-4, fill,
				float64(x+label+10)+size, top+11, c.digits, value, cut)
		}
	}
	svg.WriteString("</svg>\n")
	root, err := process.Root()
	if err != nil {
		return err
	}
	file := filepath.Join(root, ".build", "tunnels.svg")
	fmt.Fprintln(os.Stderr, "drawn:", file)
	return os.WriteFile(file, []byte(svg.String()), 0o644)
}
