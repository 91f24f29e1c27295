r"""Matrices as coloured squares: Jacobians, their products, weights and what their gradients look like."""

from typing import Any

import matplotlib
import numpy as np

from jaxbptt.plots.figure import NEUTRAL, Ax, Drawing, by_name, drawing, extremes, finite, label_axes, panels_in


def plot_matrices(matrices: Any, *, ax: Ax = None) -> Drawing:
    r"""Matrices beside each other, on one scale: white at 0, red above and blue below.

    The first row is on top, as a matrix is written. Entries that are not finite are grey.

    Args:
        matrices: one matrix `[rows, columns]`, or several by name.
        ax: the Axes to draw in, one for each name, which also give room to the scale of colours; a new figure by default.

    Returns:
        A `Drawing`; the artists are the images, `"matrix"` or by name, and the scale, `"colour bar"`.

    Raises:
        ValueError: an array that is not a matrix, `ax` of another number of Axes.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> weights = bptt.elman(3, 4).init(jax.random.key(0))
        >>> drawing = plots.plot_matrices({"W_xh": weights.W_xh, "W_hh": weights.W_hh})
        >>> [axes.get_title() for axes in drawing.axes]
        ['W_xh', 'W_hh']
    """
    named = {name: finite(matrix) for name, matrix in by_name(matrices).items()}
    for name, matrix in named.items():
        if matrix.ndim != 2:
            which = f"matrix {name!r}" if name else "the matrix"
            raise ValueError(f"{which} has shape {matrix.shape}: pass an array of two axes, [rows, columns].")
    limit = float(np.max(np.abs(extremes(named.values()) or (0.0, 0.0)))) or 1.0
    palette = matplotlib.colormaps["RdBu_r"].with_extremes(bad=NEUTRAL)
    style: dict[str, Any] = {"cmap": palette, "vmin": -limit, "vmax": limit, "interpolation": "none"}
    panels = panels_in(ax, len(named), width=1.2 + 1.9 * len(named), height=2.4)
    artists: dict[str, Any] = {}
    for axes, (name, matrix) in zip(panels, named.items(), strict=True):
        artists[name or "matrix"] = axes.imshow(matrix, **style)
        label_axes(axes, name, "", "")
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.set_yticks([])
    bar = panels[0].figure.colorbar(next(iter(artists.values())), ax=panels, label="entry", shrink=0.8)
    return drawing(panels, artists | {"colour bar": bar})
