package monitoring

import (
	"cmp"
	"fmt"
	"image"
	"image/color"
	stddraw "image/draw"
	"image/png"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
)

// Lengths are points, and pixels.
const (
	column = 50 * vg.Length(1) // width of one of Grafana's 24 columns
	line   = 24 * vg.Length(1) // height of one of its rows
	gap    = 6 * vg.Length(1)
)

var (
	background = color.RGBA{244, 245, 245, 255}
	grid       = color.RGBA{215, 219, 224, 255}
	ink        = color.RGBA{36, 41, 46, 255}
	lines      = []color.RGBA{
		{86, 166, 75, 255}, {50, 116, 217, 255}, {224, 47, 68, 255}, {255, 152, 48, 255},
		{163, 82, 204, 255}, {0, 150, 150, 255}, {150, 110, 60, 255}, {110, 110, 110, 255},
	}
)

// drawDashboard draws every panel, from what p has stored, into dashboard.png. It is not Grafana, but shows the same
// queries at the same places.
func drawDashboard(t *testing.T, d dashboard, p *prometheus, from, to time.Time) {
	t.Helper()
	height := 0
	for _, panel := range d.Panels {
		height = max(height, panel.GridPos.Y+panel.GridPos.H)
	}
	width, total := 24*column+gap, vg.Length(height)*line+gap
	// 72 dots an inch: a point is a pixel.
	canvas := vgimg.NewWith(vgimg.UseWH(width, total), vgimg.UseDPI(72), vgimg.UseBackgroundColor(background))
	whole := draw.New(canvas)
	for _, panel := range d.Panels {
		g := panel.GridPos
		left, top := vg.Length(g.X)*column+gap, total-vg.Length(g.Y)*line-gap
		box := draw.Canvas{Canvas: whole.Canvas, Rectangle: vg.Rectangle{
			Min: vg.Point{X: left, Y: top - vg.Length(g.H)*line + gap},
			Max: vg.Point{X: left + vg.Length(g.W)*column - gap, Y: top},
		}}
		if panel.Type == "row" {
			write(box, panel.Title, 14, vg.Point{X: box.Min.X, Y: box.Center().Y}, text.XLeft)
			continue
		}
		box.FillPolygon(color.White, []vg.Point{box.Min, {X: box.Max.X, Y: box.Min.Y}, box.Max, {X: box.Min.X, Y: box.Max.Y}})
		write(box, panel.Title, 12, vg.Point{X: box.Min.X + gap, Y: box.Max.Y - 12}, text.XLeft)
		if panel.Type == "stat" {
			drawStat(t, box, panel, p)
		} else {
			drawSeries(t, box, panel, p, from, to)
		}
	}
	file, err := os.Create(filepath.Join(component, "dashboard.png"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	encoder := png.Encoder{CompressionLevel: png.BestCompression}
	if err := encoder.Encode(file, reduce(canvas.Image())); err != nil {
		t.Fatal(err)
	}
}

// reduce keeps only the colours that are drawn with, and a few steps from each to white. The file is then a third of
// the size.
func reduce(full image.Image) image.Image {
	colors := color.Palette{background}
	for _, c := range append([]color.RGBA{ink, grid}, lines...) {
		for step := range 12 {
			blend := func(part uint8) uint8 { return uint8(255 - (255-int(part))*(12-step)/12) }
			colors = append(colors, color.RGBA{blend(c.R), blend(c.G), blend(c.B), 255})
		}
	}
	small := image.NewPaletted(full.Bounds(), append(colors, color.White))
	stddraw.Draw(small, full.Bounds(), full, image.Point{}, stddraw.Src)
	return small
}

func style(size vg.Length, align text.XAlignment) text.Style {
	return text.Style{Color: ink, Font: font.From(font.Font{Typeface: "Liberation", Variant: "Sans"}, size),
		XAlign: align, YAlign: text.YCenter, Handler: plot.DefaultTextHandler}
}

func write(c draw.Canvas, s string, size vg.Length, at vg.Point, align text.XAlignment) {
	c.FillText(style(size, align), at, s)
}

func drawStat(t *testing.T, c draw.Canvas, panel panel, p *prometheus) {
	t.Helper()
	found, err := p.query(resolve(panel.Targets[0].Expr))
	if err != nil {
		t.Fatal(err)
	}
	height := (c.Max.Y - c.Min.Y - 24) / vg.Length(max(1, len(found)))
	for i, s := range found {
		value := unit(panel, s.Value.value)
		for _, mapping := range panel.FieldConfig.Defaults.Mappings {
			if option, ok := mapping.Options[strconv.FormatFloat(s.Value.value, 'f', -1, 64)]; ok {
				value = option.Text
			}
		}
		middle := c.Max.Y - 24 - height*(vg.Length(i)+0.5)
		write(c, value, 24, vg.Point{X: c.Center().X, Y: middle + 9}, text.XCenter)
		write(c, legend(panel.Targets[0].LegendFormat, s), 11, vg.Point{X: c.Center().X, Y: middle - 14}, text.XCenter)
	}
}

func drawSeries(t *testing.T, c draw.Canvas, panel panel, p *prometheus, from, to time.Time) {
	t.Helper()
	plotted := plot.New()
	plotted.BackgroundColor = color.White
	plotted.X.Min, plotted.X.Max = float64(from.Unix()), float64(to.Unix())
	plotted.X.Tick.Marker = plot.TickerFunc(func(low, high float64) (ticks []plot.Tick) {
		for at := math.Ceil(low/60) * 60; at < high; at += 60 {
			ticks = append(ticks, plot.Tick{Value: at, Label: time.Unix(int64(at), 0).UTC().Format("15:04")})
		}
		return ticks
	})
	yAlign := []text.YAlignment{plotted.X.Tick.Label.YAlign, plotted.Y.Tick.Label.YAlign}
	for i, axis := range []*plot.Axis{&plotted.X, &plotted.Y} {
		axis.Color, axis.Tick.Color = grid, grid
		axis.Tick.Label = style(10, axis.Tick.Label.XAlign)
		axis.Tick.Label.YAlign = yAlign[i]
	}
	behind := plotter.NewGrid()
	behind.Vertical.Color, behind.Horizontal.Color = grid, grid
	plotted.Add(behind)

	type entry struct {
		name  string
		color color.Color
	}
	var entries []entry
	for _, target := range panel.Targets {
		var answer struct{ Result []series }
		err := p.get("/api/v1/query_range", url.Values{"query": {resolve(target.Expr)}, "step": {"1"},
			"start": {strconv.FormatInt(from.Unix(), 10)}, "end": {strconv.FormatInt(to.Unix(), 10)}}, &answer)
		if err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(answer.Result, func(a, b series) int {
			return cmp.Compare(legend(target.LegendFormat, a), legend(target.LegendFormat, b))
		})
		for _, s := range answer.Result {
			shown := lines[len(entries)%len(lines)]
			var points plotter.XYs
			flush := func() {
				if len(points) == 0 {
					return
				}
				l, err := plotter.NewLine(points)
				if err != nil {
					t.Fatal(err)
				}
				l.Color, l.Width = shown, 1.5
				plotted.Add(l)
				points = nil
			}
			for _, v := range s.Values {
				if math.IsNaN(v.value) || len(points) > 0 && v.at-points[len(points)-1].X > 2 { // a gap
					flush()
				}
				if !math.IsNaN(v.value) {
					points = append(points, plotter.XY{X: v.at, Y: v.value})
				}
			}
			flush()
			entries = append(entries, entry{legend(target.LegendFormat, s), shown})
		}
	}
	// After the lines, which widen the axes to what they need.
	if least := panel.FieldConfig.Defaults.Min; least != nil {
		plotted.Y.Min = *least
	}
	if most := panel.FieldConfig.Defaults.Max; most != nil {
		plotted.Y.Max = *most * 1.05
	}
	if plotted.Y.Max <= plotted.Y.Min {
		plotted.Y.Max = plotted.Y.Min + 1
	}
	plotted.Y.Max *= 1.05
	plotted.Y.Tick.Marker = plot.TickerFunc(func(low, high float64) []plot.Tick { return ticks(panel, low, high) })

	// The legend, in as many lines as it needs.
	const lineHeight = 13
	font := style(10, text.XLeft)
	left := c.Min.X + gap
	at := vg.Point{X: left} // relative to the first line
	places := make([]vg.Point, len(entries))
	for i, e := range entries {
		width := font.Width(e.name) + 26
		if at.X > left && at.X+width > c.Max.X {
			at = vg.Point{X: left, Y: at.Y - lineHeight}
		}
		places[i] = at
		at.X += width
	}
	first := c.Min.Y + lineHeight/2 + 2 - at.Y
	for i, e := range entries {
		x, y := places[i].X, places[i].Y+first
		c.StrokeLine2(draw.LineStyle{Color: e.color, Width: 3}, x, y, x+10, y)
		c.FillText(font, vg.Point{X: x + 14, Y: y}, e.name)
	}
	plotted.Draw(draw.Crop(c, gap, -gap-4, first-c.Min.Y+lineHeight/2+2, -26))
}

// ticks returns ticks at round numbers in the panel's unit.
func ticks(panel panel, low, high float64) (marks []plot.Tick) {
	scale := 1.0
	if panel.FieldConfig.Defaults.Unit == "bytes" {
		for high >= 1024*scale {
			scale *= 1024
		}
	}
	step := math.Pow(10, math.Floor(math.Log10((high-low)/scale/3)))
	for _, factor := range []float64{1, 2, 5, 10} {
		if (high-low)/scale/(step*factor) <= 4 {
			step *= factor
			break
		}
	}
	for i := math.Ceil(low / scale / step); i*step*scale <= high; i++ {
		marks = append(marks, plot.Tick{Value: i * step * scale, Label: unit(panel, i*step*scale)})
	}
	return marks
}

func legend(format string, s series) string {
	return legendLabel.ReplaceAllStringFunc(format, func(name string) string { return s.Metric[name[2:len(name)-2]] })
}

// unit formats a value much as Grafana does.
func unit(panel panel, v float64) string {
	short := func(v, base float64, units ...string) string {
		for len(units) > 1 && math.Abs(v) >= base {
			v, units = v/base, units[1:]
		}
		return strconv.FormatFloat(v, 'g', 3, 64) + units[0]
	}
	switch panel.FieldConfig.Defaults.Unit {
	case "s":
		if math.Abs(v) < 1 && v != 0 {
			return fmt.Sprintf("%.3g ms", v*1000)
		}
		if v >= 3600 {
			return fmt.Sprintf("%.1f h", v/3600)
		}
		return fmt.Sprintf("%.3g s", v)
	case "reqps":
		return short(v, 1000, "/s", "k/s")
	case "Bps":
		return short(v, 1000, " B/s", " kB/s", " MB/s")
	case "bytes":
		return short(v, 1024, " B", " KiB", " MiB", " GiB")
	case "percentunit":
		return fmt.Sprintf("%.3g%%", v*100)
	}
	return short(v, 1000, "", "k", "M")
}
