r"""Charts on a page: a static picture of each, and one script that puts the live charts in their place.

The picture is drawn while the page is made, so it is there without scripts and in print.
"""

import json
import re
from collections.abc import Iterable
from html import escape
from typing import Any, NamedTuple

import vl_convert

from jaxbptt.reports.charts.style import PICTURE_WIDTH

# A script that fails leaves the picture where it is.
_EMBED = """
for (const [name, spec] of Object.entries(specs)) {
  const figure = document.getElementById(name), live = figure.querySelector(".live");
  const options = {actions: false, renderer: "svg", mode: "vega-lite", bind: figure.querySelector(".controls")};
  vegaEmbed(live, spec, options).then(
    () => figure.querySelector(".picture").remove(),
    (error) => { console.error(error); live.replaceChildren(); figure.querySelector(".controls").replaceChildren(); },
  );
}
"""


class Chart(NamedTuple):
    """A chart of the report.

    Attributes:
        name: on the page.
        spec: Vega-Lite.
        description: what it shows, for who does not see it.
    """

    name: str
    spec: dict[str, Any]
    description: str


def figure(chart: Chart, caption: str) -> str:
    """The place of a chart on the page, with its static picture.

    Args:
        chart: of `charts`.
        caption: what there is to see, in words, no HTML.
    """
    label = escape(chart.description, quote=True)
    picture = f'<div class="picture" role="img" aria-label="{label}">{_picture(chart)}</div>'
    places = '<div class="controls"></div><div class="live"></div>'
    return (
        f'<figure class="chart" id="{chart.name}">{places}{picture}<figcaption>{escape(caption)}</figcaption></figure>'
    )


def scripts(charts: Iterable[Chart]) -> str:
    """The script that makes the charts live: Vega, and a call for each chart. It goes to the end of the page."""
    specs = {chart.name: {**chart.spec, "description": chart.description} for chart in charts}
    if not specs:
        return ""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return f"<script>{_in_script(bundle)}\nconst specs = {_json(specs)};\n{_EMBED}</script>"


def _json(value: Any) -> str:
    """JSON that a script can hold: no tag or comment can begin in it, whatever the strings are."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _in_script(code: str) -> str:
    """Code that can stand between script tags: `<` begins neither an end of the script nor a comment."""
    return re.sub(r"<(?=/script|!--|script)", r"\\x3c", code, flags=re.IGNORECASE)


def _picture(chart: Chart) -> str:
    """The chart as SVG, without the layers that only catch the pointer."""
    spec: dict[str, Any] = {**_without_hover(chart.spec), "width": PICTURE_WIDTH}
    spec["params"] = [param for param in spec.get("params", []) if param["name"] != "over"]
    svg = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
    # Two pictures on one page must not share the ids of their clip paths.
    svg = re.sub(r'\bid="', f'id="{chart.name}-', svg)
    return re.sub(r'(href="|url\()#', rf"\1#{chart.name}-", svg)


def _without_hover(spec: dict[str, Any]) -> dict[str, Any]:
    layers = [layer for layer in spec.get("layer", []) if not layer.get("name", "").startswith("hover")]
    return spec | ({"layer": [_without_hover(layer) for layer in layers]} if layers else {})
