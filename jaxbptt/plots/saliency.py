r"""Saliency over text: each character shaded by how much a loss depends on it.

Separate from the other figures since it draws text, which takes layout, ink and fonts of its own.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from jaxbptt.plots.figure import (
    COLOURS,
    NEUTRAL,
    Ax,
    Drawing,
    artist_name,
    by_name,
    drawing,
    extremes,
    finite,
    panels_in,
)
from jaxbptt.words import counted

_FONT = "DejaVu Sans Mono"  # comes with matplotlib
_SYMBOLS = {"\n": "↵", "\t": "→", " ": "·"}
_MISSING = "□"
# A box, in inches.
_WIDTH, _HEIGHT = 0.145, 0.25


def plot_text_saliency(text: str, saliency: Any, *, per_line: int = 64, ax: Ax = None) -> Drawing:
    r"""Text with every character shaded by its saliency for a loss, from 0 to the largest value.

    ‖∂Lₜ/∂xₛ‖ behind the s-th character

    Newline, tab and space are drawn as ↵, → and ·, characters that the font lacks as □. Lines break after a newline,
    and where they are full. Boxes whose saliency is not finite are grey.

    Args:
        text: T characters.
        saliency: `[time]`, one row of `input_saliency`; or several by name, one above the other, on the same scale.
        per_line: how many characters fit on a line.
        ax: the Axes to draw in, one for each name, which also give room to the scale of shades; a new figure by default.
            Give it room: boxes and letters are as large in print as in a figure of their own, unless they don't fit.

    Returns:
        A `Drawing`; the artists are the boxes, `"saliency"` or by name, the list of letters, `"letters"` or
        `"first letters"`, and the scale, `"colour bar"`.

    Raises:
        ValueError: no text; saliency that is not one number for each character, or negative; `per_line` below 1; `ax` of
            another number of Axes.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> leaky = lambda w, h, x: (w * h + x, w * h + x)
        >>> (last,) = bptt.input_saliency(leaky, 0.5, 0.0, jnp.ones(7), lambda h, ys: ys, steps=[6])
        >>> drawing = plots.plot_text_saliency("to have", last)
        >>> "".join(letter.get_text() for letter in drawing.artists["letters"])
        'to·have'

    References:
        Simonyan, Vedaldi and Zisserman, Deep inside convolutional networks: visualising image classification models and
        saliency maps, 2013, arXiv:1312.6034; Li, Chen, Hovy and Jurafsky, Visualizing and understanding neural models in
        NLP, 2016, arXiv:1506.01066.
    """
    named = {name: _checked(text, name, values) for name, values in by_name(saliency).items()}
    if per_line < 1:
        raise ValueError(f"per_line is {per_line}: a line has room for at least 1 character.")
    places = _layout(text, per_line)
    lines, columns = places.max(axis=0) + 1
    _, largest = extremes(named.values()) or (0.0, 0.0)
    palette = LinearSegmentedColormap.from_list("saliency", ["white", COLOURS[0]]).with_extremes(bad=NEUTRAL)
    shades = ScalarMappable(Normalize(0, largest or 1), palette)

    title = 0.3 if any(named) else 0.05
    columns = max(int(columns), 22)  # room for the colour bar
    width, height = columns * _WIDTH + 0.3, len(named) * (lines * _HEIGHT + title) + 0.85
    panels = panels_in(ax, len(named), width=width, height=height, stacked=True)
    artists: dict[str, Any] = {}
    for axes, (name, values) in zip(panels, named.items(), strict=True):
        boxes, letters = _draw(axes, text, places, values, shades)
        artists |= {name or "saliency": boxes, artist_name(name, "letters"): letters}
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlim(0, columns)
        axes.set_ylim(lines, 0)
        axes.set_aspect(_HEIGHT / _WIDTH, anchor="W")
        axes.axis("off")
    bar = panels[0].figure.colorbar(
        shades, ax=panels, location="bottom", shrink=min(1, 3 / width), aspect=25, pad=0.15 / height
    )
    bar.set_label("saliency ‖∂Lₜ/∂xₛ‖")
    bar.ax.locator_params(nbins=4)
    return drawing(panels, artists | {"colour bar": bar})


def _checked(text: str, name: str, values: Any) -> np.ndarray:
    if not text:
        raise ValueError("text is empty: there is nothing to draw.")
    which = f"saliency {name!r}" if name else "saliency"
    if np.shape(values) != (len(text),):
        raise ValueError(
            f"{which} has shape {np.shape(values)}, but text has {counted(len(text), 'character')}: pass one number for "
            f"each, [{len(text)}], such as one row of the result of input_saliency."
        )
    values = finite(values)
    if (values < 0).any():
        raise ValueError(f"{which} has negative entries, but shades start at 0: pass norms or absolute values.")
    return values


def _layout(text: str, per_line: int) -> np.ndarray:
    """Line and column of each character, `[time, 2]`."""
    line, column, places = 0, 0, []
    for i, _ in enumerate(text):
        if column == per_line or (i and text[i - 1] == "\n"):
            line, column = line + 1, 0
        places.append((line, column))
        column += 1
    return np.array(places)


def _draw(
    axes: Axes, text: str, places: np.ndarray, values: np.ndarray, shades: ScalarMappable
) -> tuple[PatchCollection, list[Text]]:
    """The boxes, and the letters in them."""
    masked = np.ma.masked_invalid(values)
    boxes = PatchCollection([Rectangle((column, line), 1, 1) for line, column in places])
    boxes.set(array=masked, cmap=shades.cmap, norm=shades.norm, edgecolor="0.88", linewidth=0.5)
    axes.add_collection(boxes)
    letters = []
    glyphs = get_font(findfont(_FONT))
    for (line, column), character, shade in zip(places, text, shades.to_rgba(masked), strict=True):
        drawn = _SYMBOLS.get(character, character)
        drawn = drawn if glyphs.get_char_index(ord(drawn)) else _MISSING
        ink = _ink(shade, quiet=drawn != character)
        style: dict[str, Any] = {"family": _FONT, "fontsize": 10, "ha": "center", "va": "center_baseline"}
        style |= {"color": ink, "parse_math": False, "in_layout": False}
        letters.append(axes.text(column + 0.5, line + 0.5, drawn, **style))
    return boxes, letters


def _ink(shade: Any, *, quiet: bool) -> tuple[float, ...]:
    """Black on light, white on dark, by the relative luminance at which both have equal contrast; quiet: half of it."""
    channels = np.array(to_rgb(shade))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    ink = np.zeros(3) if linear @ [0.2126, 0.7152, 0.0722] > 0.179 else np.ones(3)
    return tuple((ink + channels) / 2 if quiet else ink)
