r"""What is chosen by platform: one table, and what each entry was measured on.

The platform is the one that JAX lowers a program for. While a program is traced it is not known: the default backend, an
array's device and `jax.export(platforms=...)` can differ. So functions for all platforms are traced, and JAX takes one of
them when it lowers the program.

What is not here is the same on every platform, and was measured on CPUs alone: the forms of products (`cells/dense.py`) and
of convolutions (`programs/program.py`).
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax


class Choices(NamedTuple):
    """What is chosen for one platform.

    Attributes:
        segment_rows: rows, time steps times batch, of one product of the weight gradient; `None` for all rows at once.
        unroll: time steps in one iteration of a loop over them.
    """

    segment_rows: int | None
    unroll: int


# By the names that `jax.export` has for platforms: "cpu", "cuda", "rocm", "tpu".
CHOICES = {
    # So what a product reads is still in the cache. 2 cores, x86, jax 0.10 and 0.12, 32 and 64 rows a step, against all rows
    # at once: 0.71 to 0.97 of the time for gru and lstm, 0.81 to 1.2 for elman, and 0.67 of the bytes. 512 and 2,048 rows
    # take up to 1.1 and 1.2 times as long.
    "cpu": Choices(segment_rows=1024, unroll=1),
    # One H200, jax 0.11, against one step in an iteration. XLA makes one launch of the kernels of an iteration if there are 5
    # or more, and takes about 5 µs to start each of fewer: so an elman layer, n = 128, one row, took 41.8 µs a step with its
    # gradient, and takes 5.8. With 64 rows and n = 512 it takes 0.59 of the time, an lstm 0.71; with 4 steps 0.61 and 0.73, and
    # with 16 and 32 it changes by at most a tenth. All rows at once: there 1,024 and 8,192 rows took 1.03 to 1.18 times as long.
    "cuda": Choices(segment_rows=None, unroll=8),
}
# Not measured. Few large products are the rule on accelerators, and one step an iteration is the default of `lax.scan`.
ELSEWHERE = Choices(segment_rows=None, unroll=1)


def all_choices() -> tuple[Choices, ...]:
    """Those of every platform."""
    return *CHOICES.values(), ELSEWHERE


def by_platform(choose: Callable[[Choices], Callable[..., Any]]) -> Callable[..., Any]:
    """The function that is `choose(choices)` for the choices of the platform that its program is lowered for.

    All of them return arrays of the same types. Where `choose` returns the same object for all choices, it is that.
    """
    default = choose(ELSEWHERE)
    others = {name: function for name, choices in CHOICES.items() if (function := choose(choices)) is not default}
    if not others:
        return default
    return lambda *args: jax.lax.platform_dependent(*args, default=default, **others)


def unrolled(unroll: int | bool | None, loop: Callable[[int | bool], Callable[..., Any]]) -> Callable[..., Any]:
    """`loop(unroll)`, a function of arrays; for `None` that of the platform, which has the same results."""
    loop = cache(loop)
    return loop(unroll) if unroll is not None else by_platform(lambda choices: loop(choices.unroll))
