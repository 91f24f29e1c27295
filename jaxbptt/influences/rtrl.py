r"""Real-time recurrent learning: the influence itself, every entry of it."""

from typing import Any

from jaxbptt.influences import dense, own_units
from jaxbptt.influences.influence import Influence
from jaxbptt.influences.own_units import OwnUnits
from jaxbptt.influences.state import jacobians
from jaxbptt.programs.pattern import reached_entries


def rtrl() -> Influence:
    r"""Real-time recurrent learning: dcₜ/dθ in full. Exact, for any step and any carry.

    Mₜ = Jₜ Mₜ₋₁ + Fₜ

    M has a leaf `[n, *leaf]` for each leaf of the params, n numbers of the carry of a row. Time O(n² p) a step and row, memory
    O(n p), whatever T. For a dense layer p is about n² itself, so the time is O(n⁴). Where no unit reads another and each weight
    leads to one unit, as in `lru`, `min_gru`, `min_lstm` and `rg_lru`, only that is kept, and time and memory are O(p). Whether it
    is so is found from the step.

    Returns:
        An `Influence`.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> power = lambda w, h, x: (w * h, w * h)
        >>> last = lambda w: bptt.forward_scan(power, w, 1.0, length=3, influence=bptt.influences.rtrl())[0]
        >>> print(jax.grad(last)(0.5))  # 3 w²
        0.75

    References:
        Williams and Zipser, A learning algorithm for continually running fully recurrent neural networks, 1989,
        doi:10.1162/neco.1989.1.2.270.
    """
    return Influence(_init, _advance, own_units.pull)


def _init(step: Any, params: Any, carry: Any, x: Any) -> Any:
    layout = own_units.layout_of(params, carry, *reached_entries(step, params, carry, x))
    return own_units.init(layout, params, carry)


def _advance(step: Any, params: Any, carry: Any, x: Any, M: Any, key: Any) -> Any:
    if isinstance(M, OwnUnits):
        between = own_units.jacobian_between(step, params, carry, x)
        return own_units.advance(step, params, carry, x, M, between)
    return dense.advance(M, *jacobians(step, params, carry, x))
