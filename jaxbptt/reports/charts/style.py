r"""How the report's charts look: colours in light and dark, dashes and shapes, axes, and the CSS that switches the colours.

A chart is drawn once, in the colours of the light theme. In the dark one CSS replaces them, by the attributes of the SVG:
the picture follows the theme of the reader at once, without a script, and print is always light.
"""

from typing import Any

import altair as alt

# (light, dark), each with a contrast of at least 4.5 : 1 on the page: white in light mode, #16181b in dark.
CELLS = (("#005fa8", "#6cb6ff"), ("#b34700", "#ff9e64"), ("#00735c", "#4fd6ad"))
ACCENT = ("#7b3f98", "#d7a6f0")
INK = ("#1b1b1b", "#e8e8e8")
QUIET = ("#5c5c5c", "#a5a9ae")
LINE = ("#d5d5d5", "#3a3e44")
PAPER = ("#ffffff", "#16181b")

# Cells differ by these too, for who does not see the colours.
DASHES = ([1, 0], [7, 3], [2, 2.5])
SHAPES = ("circle", "square", "triangle-up")

# The static pictures are so wide: their words can be read on a phone, and are not too large on a desk.
PICTURE_WIDTH = 420
FONT = "system-ui, 'Liberation Sans', Arial, sans-serif"
MONOSPACE = "ui-monospace, 'Liberation Mono', monospace"


def key(i: int) -> str:
    """What the i-th network is called inside of a chart, where its name would need quoting."""
    return f"c{i}"


def cell_scale(count: int, ranges: tuple[Any, ...]) -> alt.Scale:
    """From the keys of networks to colours, dashes or shapes."""
    return alt.Scale(domain=[key(i) for i in range(count)], range=[_of(ranges, i) for i in range(count)])


def cell_colours(count: int) -> alt.Scale:
    """From the keys of networks to colours."""
    return cell_scale(count, tuple(light for light, _ in CELLS))


def _of(ranges: tuple[Any, ...], i: int) -> Any:
    return ranges[i % len(ranges)]


def configured(chart: Any) -> dict[str, Any]:
    """The specification of a whole chart: as wide as the page, its words in the page's font."""
    ink, quiet, line = INK[0], QUIET[0], LINE[0]
    spec = (
        chart.properties(autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
        .configure(font=FONT, background="transparent", padding=4)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=ink,
            titleColor=ink,
            domainColor=quiet,
            tickColor=quiet,
            gridColor=line,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            labelOverlap="greedy",
        )
        .configure_legend(
            orient="top",
            direction="vertical",
            labelColor=ink,
            labelFontSize=13,
            labelLimit=280,
            symbolSize=500,
            symbolStrokeWidth=2.5,
            title=None,
            offset=8,
        )
        .configure_title(color=ink, fontSize=13, fontWeight="normal", anchor="start", offset=8)
        .configure_text(color=ink, fontSize=12)
        .to_dict()
    )
    return spec


def _rules() -> str:
    names = {"accent": ACCENT, "ink": INK, "quiet": QUIET, "line": LINE, "paper": PAPER}
    names |= {f"cell-{i}": pair for i, pair in enumerate(CELLS)}
    light = " ".join(f"--chart-{name}: {pair[0]};" for name, pair in names.items())
    dark = " ".join(f"--chart-{name}: {pair[1]};" for name, pair in names.items())
    marks = "\n".join(
        f'.chart svg [{attribute}="{pair[0]}"] {{ {attribute}: var(--chart-{name}); }}'
        for name, pair in names.items()
        for attribute in ("fill", "stroke")
    )
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{marks}"


STYLE = f"""
{_rules()}
.chart {{ margin: 1rem 0; }}
.chart .live, .chart .live.vega-embed, .chart .vega-embed.has-actions {{ display: block; width: 100%; padding: 0; }}
.chart svg {{ display: block; min-width: 0; max-width: 100%; width: auto; height: auto; }}
.chart .picture svg {{ width: 100%; max-width: {1.5 * PICTURE_WIDTH:.0f}px; }}
.chart .controls {{ color: var(--ink); font: 0.9rem/1.4 system-ui, sans-serif; }}
.chart .controls .vega-bind {{ display: flex; flex-wrap: wrap; gap: 0 0.6rem; align-items: center; margin: 0.3rem 0; }}
.chart .controls label {{ display: flex; flex-wrap: wrap; gap: 0 0.6rem; align-items: center; max-width: 100%; }}
.chart .controls .vega-bind-name {{ margin: 0; }}
.chart .controls input, .chart .controls select {{ min-height: 2rem; max-width: 100%; font: inherit; margin: 0; }}
.chart .controls input[type="range"] {{ width: min(20rem, 60vw); accent-color: var(--chart-accent); }}
#vg-tooltip-element.vg-tooltip {{ color: var(--ink); background: var(--paper); border: 1px solid var(--line);
  font: 0.85rem/1.35 system-ui, sans-serif; max-width: min(22rem, 90vw); box-shadow: 0 1px 6px #0004; }}
#vg-tooltip-element table tr td.key {{ color: var(--quiet); max-width: 12rem; }}
@media print {{
  :root {{ color-scheme: light; --ink: {INK[0]}; --paper: {PAPER[0]}; --line: {LINE[0]}; --quiet: {QUIET[0]}; }}
  .chart {{ break-inside: avoid; }} .chart .controls {{ display: none; }}
}}
"""
