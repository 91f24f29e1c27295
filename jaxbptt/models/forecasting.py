r"""Forecasts of a trained network that runs freely, and how far off they are, by horizon, beside what is easy.

After the last row that is known each prediction is read as the next row. Columns that are read but not predicted keep their
last value: nothing is known of what they become.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.arrays import check_count
from jaxbptt.html_table import columns_table, html_table
from jaxbptt.models.architecture import ModelNetwork
from jaxbptt.models.baselines import LOOKED_AT, persistence, season_length, seasonal_naive
from jaxbptt.models.model import Columns, Model
from jaxbptt.scans.exact import scan
from jaxbptt.words import counted

# In percent, so that ranks are counted exactly.
_LEVELS = (50, 60, 70, 80, 90, 95, 99)
LEVELS = tuple(level / 100 for level in _LEVELS)
MIN_ORIGINS, MAX_ORIGINS = 20, 256
# Rows that bring the carry up to date, and rows of the validation part that are looked at, however long the series is.
WARM_UP, MAX_ROWS = 2_000, 10_000
# Columns of a forecast that a notebook shows.
_SHOWN = 3


class ValidationErrors(NamedTuple):
    """Root mean squared errors of forecasts on validation data, in the columns' own units, and how they spread.

    All three methods forecast the same targets from the same origins. nan where there was nothing to measure, or where an
    error is not finite.

    Attributes:
        columns: names of the columns that are predicted.
        season: length of each column's season in steps; `None` where there is none.
        origins: from how many rows forecasts were made.
        network: `[horizons, columns]`, of the free run; row h - 1 is h steps ahead.
        persistence: `[horizons, columns]`, of the last value.
        seasonal: `[horizons, columns]`, of the seasonal naive forecast; nan without a season.
        observed: `[horizons, columns]`, how many of the targets were observed, and count.
        quantiles: `[levels, horizons, columns]` of the network's absolute errors: with n of them, the ⌈(n + 1) p⌉-th
            smallest for the level p of `LEVELS`; nan where that is more than n.
    """

    columns: tuple[str, ...]
    season: tuple[int | None, ...]
    origins: int
    network: np.ndarray
    persistence: np.ndarray
    seasonal: np.ndarray
    observed: np.ndarray
    quantiles: np.ndarray

    @property
    def horizons(self) -> int:
        """The longest horizon measured."""
        return len(self.network)

    def to_json(self) -> dict[str, Any]:
        """In JSON's types; what is not finite is null."""
        return {
            key: _listed(value) if isinstance(value, np.ndarray) else list(value) if isinstance(value, tuple) else value
            for key, value in self._asdict().items()
        }

    def _repr_html_(self) -> str:
        from jaxbptt.models import wording  # which has this type in its signatures

        head, rows = wording.errors_table(self)
        notes = [wording.measured_sentence(self), *wording.errors_sentences(self)]
        return html_table(head, rows, title="ValidationErrors", notes=notes)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "ValidationErrors":
        """What `to_json` gave."""
        arrays = ("network", "persistence", "seasonal", "quantiles")
        return cls(
            tuple(found["columns"]),
            tuple(found["season"]),
            found["origins"],
            observed=np.array(found["observed"], int),
            **{key: np.array(found[key], float) for key in arrays},
        )


class Forecast(NamedTuple):
    """The rows to come, in the columns' own units.

    Attributes:
        columns: names of the columns that are predicted.
        mean: `[steps, columns]`, the free run of the network.
        low: `[steps, columns]`, the lower end of the interval; nan beyond the longest horizon that validation measured.
        high: `[steps, columns]`, its upper end.
        level: share of the validation targets that their intervals held.
        held: names of the columns that are read but not predicted, held at their last value.
        measured: for how many of the steps there are intervals.
    """

    columns: tuple[str, ...]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float
    held: tuple[str, ...]
    measured: int

    def _repr_html_(self) -> str:
        columns: dict[str, Any] = {"steps ahead": range(1, len(self.mean) + 1)}
        for i, name in enumerate(self.columns[:_SHOWN]):
            columns |= {name: self.mean[:, i], f"{name}, low": self.low[:, i], f"{name}, high": self.high[:, i]}
        notes = [f"Intervals that hold {100 * self.level:g} % of the values of the validation data."]
        if len(self.columns) > _SHOWN:
            notes.append(f"{_SHOWN} of {counted(len(self.columns), 'column')}.")
        if self.held:
            notes.append(f"Held at their last value: {', '.join(self.held)}.")
        return columns_table(self, columns, notes=notes)


def forecast(model: Model, values: Any, *, steps: int, level: float = 0.9) -> Forecast:
    r"""The next rows of a series, by a network that reads what it predicts.

    cₜ, ŷₜ₊₁ = f(θ, cₜ₋₁, xₜ) over the rows given,  then cₜ₊ₕ, ŷₜ₊ₕ₊₁ = f(θ, cₜ₊ₕ₋₁, x̂ₜ₊ₕ),  where x̂ₜ₊ₕ is ŷₜ₊ₕ, beside the
    last values of the columns that are not predicted

    The interval h steps ahead is ŷₜ₊ₕ ± q, q the quantile of the absolute errors that the model made h steps ahead on its
    validation data, as in split conformal prediction. It holds new values with probability `level` if their errors are drawn
    as those were; later data that behaves otherwise is not covered, and neighbouring errors depend on each other.

    Cost: one pass over at most the last 2,000 rows, and `steps` steps; compiled once for each number of rows and steps.

    Args:
        model: what `load` returns, of numbers.
        values: `[time, columns]`, all the columns that the model reads, in their own units, the newest row last, gaps
            filled in; `[time]` for one column. Of a data frame those columns are found by name. The more rows, the better
            the carry: as many as a row of its training chunks.
        steps: how many rows to forecast.
        level: of the intervals, one of `LEVELS`.

    Returns:
        A `Forecast`.

    Raises:
        ValueError: a model of text; values of another shape, not finite, not numbers, or none; a data frame without some of
            the columns; steps below 1; another level.

    Example:
        >>> import jax, numpy as np
        >>> from jaxbptt import models
        >>> net = models.build(models.Architecture("gru", 8, 1, 1, 1, text=False, targets=(0,), change=(0.1,)))
        >>> columns = models.Columns(("load",), np.array([50.0]), np.array([10.0]), (0,))
        >>> params, carry = net.init(jax.random.key(0)), net.cell.initial_carry()
        >>> model = models.Model(net, params, carry, None, columns, {}, {"errors": None}, step=0)
        >>> future = models.forecast(model, 50 + 10 * np.sin(np.arange(100) / 5), steps=24)
        >>> future.mean.shape, future.columns
        ((24, 1), ('load',))

    References:
        Lei, G'Sell, Rinaldo, Tibshirani and Wasserman, Distribution-free predictive inference for regression, 2018,
        arXiv:1604.04173.
    """
    columns = model.columns
    if columns is None:
        raise ValueError("The model is one of text, and a forecast is of numbers: use sample.")
    check_count("steps", steps, "it counts the rows to forecast")
    at = _level(level)
    values = _checked("values", _selected(values, columns), columns)
    xs = columns.encode(values)
    start = max(len(xs) - 1 - WARM_UP, 0)
    runs = _run(
        model.network.apply,
        columns.targets,
        steps,
        model.params,
        model.network.cell.initial_carry(),
        xs[start:-1],
        xs[-1],
    )
    mean = columns.decode(runs)
    reach = np.full(mean.shape, np.nan)
    errors = model.info.get("errors")
    if errors is not None:
        quantiles = ValidationErrors.from_json(errors).quantiles[at, :steps]
        reach[: len(quantiles)] = quantiles
    held = tuple(name for i, name in enumerate(columns.names) if i not in columns.targets)
    measured = int(np.isfinite(reach).any(axis=1).sum())
    return Forecast(columns.target_names, mean, mean - reach, mean + reach, _LEVELS[at] / 100, held, measured)


def validation_errors(
    network: ModelNetwork,
    params: Any,
    columns: Columns,
    rows: Any,
    observed: Any = None,
    *,
    start: int,
    season: int | None = None,
    horizons: int = 50,
) -> ValidationErrors:
    r"""How far off forecasts are by horizon, of the network, of persistence, and of the seasonal naive forecast.

    RMSE(h) = √ mean over origins t of (xₜ₊ₕ − x̂ₜ₊ₕ)²

    One pass reads up to 2,000 rows before `start`, and the validation part, of which at most the first 10,000 rows are
    used. From at most 256 of its rows, evenly spaced, the network runs freely, all in one batch; where columns have a
    season, the spacing and the season have no common divisor, so that origins are at all times of the season. All horizons
    have the same origins, and where there are few rows, so few horizons that there are 20 origins, or half as many as rows.

    Cost: at most 12,000 steps of one row and `horizons` steps of 256. Compiled once for data of one shape.

    Args:
        network: of numbers.
        params: its weights.
        columns: how its numbers are read.
        rows: `[time, columns]`, the whole series in the columns' own units, gaps filled in; a memory map is not read whole.
        observed: booleans `[time, columns]`, False where the entry was missing; such a target does not count.
        start: where the validation part begins. What is before it warms the carry up, and is where the season is found.
        season: length of the season of all columns, if it is known.
        horizons: the longest horizon.

    Returns:
        `ValidationErrors`, float64.

    Raises:
        ValueError: rows of another shape or not finite; a start that leaves no row on one side; a season that is longer than
            the rows before `start`; horizons below 1.

    Example:
        >>> import jax, numpy as np
        >>> from jaxbptt import models
        >>> net = models.build(models.Architecture("gru", 8, 1, 1, 1, text=False, targets=(0,), change=(0.1,)))
        >>> columns = models.Columns(("load",), np.array([50.0]), np.array([10.0]), (0,))
        >>> rows = 50 + 10 * np.sin(2 * np.pi * np.arange(400) / 20)[:, None]
        >>> errors = models.validation_errors(net, net.init(jax.random.key(0)), columns, rows, start=300, horizons=10)
        >>> errors.network.shape, errors.season, bool(errors.seasonal.max() < 1e-9 < errors.persistence.min())
        ((10, 1), (20,), True)
    """
    targets = list(columns.targets)
    check_count("horizons", horizons, "it counts steps ahead")
    check_count("start", start, "there must be rows before and after the start of validation", 1, max(len(rows) - 1, 1))
    if observed is not None and np.shape(observed) != np.shape(rows):
        raise ValueError(
            f"observed has shape {np.shape(observed)}, but rows has {np.shape(rows)}: pass a boolean for each entry."
        )
    # The file may be larger than memory.
    used = slice(max(start - max(LOOKED_AT, WARM_UP), 0), start + MAX_ROWS)
    start -= used.start
    rows = _checked("rows", rows[used], columns)
    observed = np.ones(rows.shape, bool) if observed is None else np.asarray(observed[used], bool).reshape(rows.shape)
    if season is None:
        seasons = tuple(season_length(rows[:start, i]) for i in targets)
    else:
        check_count("season", season, "a season is known before validation starts", 1, start)
        seasons = (season,) * len(targets)
    origins, gap, horizons = _origins(start, len(rows), horizons, seasons)

    xs = columns.encode(rows)
    between = xs[origins[0] : origins[-1]].reshape(len(origins) - 1, gap, xs.shape[1])
    runs = _runs(
        network.apply,
        columns.targets,
        horizons,
        params,
        network.cell.initial_carry(),
        xs[max(origins[0] - WARM_UP, 0) : origins[0]],
        between,
        xs[origins],
    )
    values = rows[:, targets]
    ahead = origins[:, None] + np.arange(1, horizons + 1)
    truth, seen = values[ahead], observed[:, targets][ahead]
    seasonal = np.full(truth.shape, np.nan)
    for i, m in enumerate(seasons):
        if m is not None:
            seasonal[..., i] = seasonal_naive(values[:, i : i + 1], origins, horizons, season=m)[..., 0]
    with np.errstate(over="ignore", invalid="ignore"):
        errors = columns.decode(runs).swapaxes(0, 1) - truth
        return ValidationErrors(
            columns.target_names,
            seasons,
            len(origins),
            _rmse(errors, seen),
            _rmse(persistence(values, origins, horizons) - truth, seen),
            _rmse(seasonal - truth, seen),
            seen.sum(axis=0),
            np.stack([_quantile(np.abs(errors), seen, level) for level in _LEVELS]),
        )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    apply: Callable[..., Any], targets: tuple[int, ...], steps: int, params: Any, carry: Any, past: Any, x: Any
) -> Any:
    """Predictions `[steps, *batch, targets]` after `past` rows and the row x."""
    if len(past):
        carry, _ = apply(params, carry, past, scan=scan)
    return _free(apply, targets, steps, params, carry, x)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _runs(
    apply: Callable[..., Any],
    targets: tuple[int, ...],
    steps: int,
    params: Any,
    carry: Any,
    past: Any,
    between: Any,
    origins: Any,
) -> Any:
    """Predictions `[steps, origins, targets]`: `past` is before the first origin, `between` from each to the next."""
    if len(past):
        carry, _ = apply(params, carry, past, scan=scan)

    def on(carry, xs):
        carry, _ = apply(params, carry, xs, scan=scan)
        return carry, carry

    _, later = jax.lax.scan(on, carry, between)
    carries = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), carry, later)
    return _free(apply, targets, steps, params, carries, origins)


def _free(apply: Callable[..., Any], targets: tuple[int, ...], steps: int, params: Any, carry: Any, x: Any) -> Any:
    def step(state, _):
        carry, x = state
        carry, ys = apply(params, carry, x[None], scan=scan)
        return (carry, x.at[..., jnp.array(targets)].set(ys[0])), ys[0]

    return jax.lax.scan(step, (carry, x), length=steps)[1]


def _origins(start: int, stop: int, horizons: int, seasons: tuple[int | None, ...]) -> tuple[np.ndarray, int, int]:
    """Rows to forecast from, their spacing, and the horizons; the first target is at `start`, the last before `stop`."""
    rows = stop - start
    horizons = min(horizons, max(rows - MIN_ORIGINS + 1, rows // 2, 1))
    possible = rows - horizons + 1
    gap = -(-possible // MAX_ORIGINS)
    while any(m is not None and np.gcd(gap, m) > 1 for m in seasons) and gap < possible:
        gap += 1
    return start - 1 + np.arange(0, possible, gap), gap, horizons


def _rmse(errors: np.ndarray, counted: np.ndarray) -> np.ndarray:
    count = counted.sum(axis=0)
    mean = np.sum(np.where(counted, errors, 0.0) ** 2, axis=0) / np.maximum(count, 1)
    return np.where((count > 0) & np.isfinite(mean), np.sqrt(mean), np.nan)


def _quantile(sizes: np.ndarray, counted: np.ndarray, percent: int) -> np.ndarray:
    """The ⌈(n + 1) p⌉-th smallest of the n sizes that count, along the first axis; nan where there are fewer."""
    count = counted.sum(axis=0)
    rank = -(-(count + 1) * percent // 100)
    ordered = np.sort(np.where(counted & np.isfinite(sizes), sizes, np.inf), axis=0)
    found = np.take_along_axis(ordered, np.clip(rank - 1, 0, len(sizes) - 1)[None], axis=0)[0]
    return np.where((rank <= count) & np.isfinite(found), found, np.nan)


def _level(level: float) -> int:
    for i, known in enumerate(LEVELS):
        if abs(level - known) < 1e-9:
            return i
    raise ValueError(f"level is {level!r}, but intervals are kept for some levels only: pass one of {LEVELS}.")


def _selected(values: Any, columns: Columns) -> Any:
    """The columns of a data frame that the model reads; what has no names is left as it is."""
    if not hasattr(values, "columns"):
        return values
    there = {str(name): name for name in values.columns}
    missing = [repr(name) for name in columns.names if name not in there]
    if missing:
        raise ValueError(
            f"values has no column {_shortened(missing)}, but {_shortened([repr(name) for name in there])}: name its columns "
            "as the training data's, or pass an array with the model's columns in their order."
        )
    return values[[there[name] for name in columns.names]]


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")


def _as_floats(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values, float)
    except (TypeError, ValueError):
        pass
    try:
        entries = np.asarray(values, object).ravel()
    except ValueError:
        entries = np.array([], object)
    for entry in entries:
        try:
            float(entry)
        except (TypeError, ValueError):
            raise ValueError(
                f"{name} has {entry!r}, which is not a number: pass columns of numbers only, gaps filled in."
            ) from None
    raise ValueError(f"{name} is not an array of numbers: pass [time, columns].") from None


def _checked(name: str, values: Any, columns: Columns) -> np.ndarray:
    values = _as_floats(name, values)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or values.shape[1] != len(columns.names) or not len(values):
        raise ValueError(
            f"{name} has shape {values.shape}, but the model reads {counted(len(columns.names), 'column')} "
            f"({_shortened(columns.names)}): pass "
            f"[time, {len(columns.names)}] with at least one row."
        )
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(
            f"{name}[{row}, {column}] ({columns.names[column]}) is {values[row, column]}: fill gaps in, or cut the series."
        )
    return values


def _listed(array: np.ndarray) -> Any:
    """Nested lists, with None for what is not finite."""
    plain = array.astype(object)
    plain[~np.isfinite(array)] = None
    return plain.tolist()
