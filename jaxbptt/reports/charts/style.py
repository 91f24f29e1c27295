r"""How the report's charts look: colours in light and dark, dashes and shapes, axes, and the CSS that switches the colours.

A chart is drawn once, in the colours of the light theme. In the dark one CSS replaces them, by the attributes of the SVG:
the picture follows the theme of the reader at once, without a script, and print is always light.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import altair as alt
import numpy as np

# (light, dark), each with a contrast of at least 4.5 : 1 on the page: white in light mode, #16181b in dark.
CELLS = (("#005fa8", "#6cb6ff"), ("#b34700", "#ff9e64"), ("#00735c", "#4fd6ad"))
ACCENT = ("#7b3f98", "#d7a6f0")
INK = ("#1b1b1b", "#e8e8e8")
QUIET = ("#5c5c5c", "#a5a9ae")
LINE = ("#d5d5d5", "#3a3e44")
PAPER = ("#ffffff", "#16181b")

# Cells differ by these too, for who does not see the colours.
DASHES = ([1, 0], [7, 3], [9, 3, 2.5, 3])
SHAPES = ("circle", "square", "triangle-up")

# Selections, and the layers whose marks they listen to.
VIEWS = {"legend": "lines", "over": "hover"}

# The static pictures are so wide: their words can be read on a phone, and are not too large on a desk.
PICTURE_WIDTH = 420
FONT = "system-ui, 'Liberation Sans', Arial, sans-serif"
MONOSPACE = "ui-monospace, 'Liberation Mono', monospace"


# Of a logarithmic axis: few digits, and powers of ten where these would be many.
POWERS = "datum.value < 1e-3 || datum.value >= 1e5 ? format(datum.value, '~e') : format(datum.value, '~g')"


def power_of_ten(power: str) -> str:
    """An expression for 10 to some power in words, whether or not a float can hold it."""
    return f"abs({power}) > 4 ? '1e' + format({power}, 'd') : format(pow(10, {power}), '.3~g')"


def step_axis(count: int, title: str, **options: Any) -> alt.Axis:
    """An axis of whole numbers up to a count."""
    stride = next(m * 10**power for power in range(9) for m in (1, 2, 5) if count <= 6 * m * 10**power)
    return alt.Axis(values=list(range(stride, count + 1, stride)), format=",d", grid=False, title=title, **options)


def log_axis(values: Iterable[Any], *, ticks: int = 6) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a logarithmic scale and of its axis, on which a few round numbers are marked.

    Args:
        values: arrays of what is drawn; only what is finite and above 0 counts.
        ticks: the most that there is room for.
    """
    flat = np.concatenate([np.ravel(np.asarray(array, float)) for array in values] or [np.ones(1)])
    flat = flat[np.isfinite(flat) & (flat > 0)]
    low, high = np.log10([flat.min(), flat.max()]) if flat.size else (-0.5, 0.5)
    room = 0.04 * max(high - low, 0.6)
    low, high = low - room, high + room
    powers = np.arange(np.floor(low), np.ceil(high) + 1)
    for multiples in ((1, 2, 3, 5), (1, 3), (1,)):
        marked = np.sort([power + np.log10(multiple) for power in powers for multiple in multiples])
        marked = marked[(marked >= low) & (marked <= high)]
        if len(marked) <= ticks:
            break
    marked = marked[:: -(-len(marked) // ticks)] if len(marked) else np.array([(low + high) / 2])
    domain = [float(f"{10**bound:.4g}") for bound in (low, high)]
    scale = {"type": "log", "domain": domain, "nice": False}
    return scale, {"values": [float(f"{10**mark:.2g}") for mark in marked], "labelExpr": POWERS}


def key(i: int) -> str:
    """What the i-th network is called inside of a chart, where its name would need quoting."""
    return f"c{i}"


def cell_colours() -> alt.Scale:
    """From the keys of networks to colours."""
    return alt.Scale(domain=[key(i) for i in range(len(CELLS))], range=[light for light, _ in CELLS])


def configured(chart: Any, data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The specification of a whole chart: as wide as the page, its words in the page's font.

    Args:
        chart: of Altair.
        data: rows by the names that layers know them by.
        values: what expressions can name. Whatever a user chose, as names are, stands here and in the data, and never in an
            expression.
    """
    ink, quiet, line = INK[0], QUIET[0], LINE[0]
    spec = (
        chart.properties(width="container", autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
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
            labelLimit=200,
            symbolSize=500,
            symbolStrokeWidth=2.5,
            title=None,
            offset=8,
        )
        .configure_title(color=ink, fontSize=13, fontWeight="normal", anchor="start", offset=8, limit=275)
        .configure_point(opacity=1)
        .configure_text(color=ink, fontSize=12)
        .to_dict()
    )
    # Added to the finished specification, since Altair copies and checks all that it is given, many times over.
    spec["datasets"] = dict(data)
    spec["params"] = [*spec.get("params", []), *({"name": name, "value": value} for name, value in values.items())]
    # Altair puts a selection of one layer into all beside it, where layers are nested.
    for param in spec["params"]:
        if "views" in param:
            param["views"] = [view for view in param["views"] if view.startswith(VIEWS[param["name"]])]
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
.chart .controls input[type="range"] {{ width: min(20rem, 45vw); accent-color: var(--chart-accent); }}
/* The slider goes over the lengths by number: the chart's title says which it is. */
#truncation .controls input[type="range"] + span {{ display: none; }}
#vg-tooltip-element.vg-tooltip {{ color: var(--ink); background: var(--paper); border: 1px solid var(--line);
  font: 0.85rem/1.35 system-ui, sans-serif; max-width: min(22rem, 90vw); box-shadow: 0 1px 6px #0004; }}
#vg-tooltip-element table tr td.key {{ color: var(--quiet); max-width: 12rem; }}
@media print {{
  :root {{ color-scheme: light; --ink: {INK[0]}; --paper: {PAPER[0]}; --line: {LINE[0]}; --quiet: {QUIET[0]}; }}
  .chart {{ break-inside: avoid; }} .chart .controls {{ display: none; }}
}}
"""
