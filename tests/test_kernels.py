"""How many kernels a time step starts, as a stand-in counted for the CPU: on a GPU they are what a recurrent loop costs.

The counts are those of XLA's fusion, not of a GPU's; what they show is that a loop has not got longer.
"""

import importlib.util
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxbptt as bptt

spec = importlib.util.spec_from_file_location("kernels", Path(__file__).parents[1] / "benchmarks" / "kernels.py")
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)

# The most that each loop over time steps may start in one of them, in the order in which the loops run: forward, recomputed
# if it is, backward. For jax 0.10.2 and 0.12.0.1, which differ by one in one place. Lower a number where a loop gets
# shorter; that it may get longer needs a reason.
MOST = {
    ("elman", "scan"): [11, 11],
    ("elman", "adjoint_scan"): [6, 5],
    ("elman", "adjoint_scan (derived)"): [7, 6],
    ("elman", "checkpointed_scan"): [7, 6, 5],
    ("gru", "scan"): [20, 15],
    ("gru", "adjoint_scan"): [14, 9],
    ("gru", "adjoint_scan (derived)"): [14, 9],
    ("gru", "checkpointed_scan"): [7, 14, 9],
    ("lstm", "scan"): [27, 14],
    ("lstm", "adjoint_scan"): [17, 9],
    ("lstm", "adjoint_scan (derived)"): [20, 9],
    ("lstm", "checkpointed_scan"): [8, 17, 9],
}
STEPS, BATCH = 32, 4


@pytest.fixture(autouse=True)
def single_precision(strict):
    with jax.enable_x64(False):
        yield


@cache
def cell(name):
    return kernels.CELLS[name](3, 8)


def counted(cell, scan):
    """Kernels of each loop over time steps, in the order in which they run."""
    found = kernels.loops(kernels.compiled(cell, scan, STEPS, BATCH))
    return [loop.kernels for loop in kernels.innermost(found)]


@cache
def count(name, strategy):
    return counted(cell(name), kernels.STRATEGIES[strategy])


@pytest.mark.parametrize(("name", "strategy"), MOST)
def test_loops_do_not_get_longer(name, strategy):
    found, most = count(name, strategy), MOST[name, strategy]
    assert len(found) == len(most)
    assert all(map(int.__le__, found, most)), f"{found} kernels, of which at most {most} were known"


@pytest.mark.parametrize("strategy", ["adjoint_scan", "adjoint_scan (derived)"])
@pytest.mark.parametrize("name", kernels.CELLS)
def test_no_longer_than_what_jax_derives(name, strategy):
    assert all(map(int.__le__, count(name, strategy), count(name, "scan")))


def test_what_an_adjoint_adds_is_counted():
    elman = cell("elman")

    def backward(params, residuals, x, h_bar, y_bar):
        h_bar, delta = elman.adjoint.backward(params, residuals, x, h_bar, y_bar)
        return jnp.sort(h_bar), delta

    longer = elman._replace(adjoint=elman.adjoint._replace(backward=backward))
    forward, backward = counted(longer, bptt.adjoint_scan)
    assert [forward, backward - 1] == count("elman", "adjoint_scan")


PROGRAM = """
HloModule jit_f, is_scheduled=true

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %exp = f32[2]{0} exponential(%p)
}

%inner_body (t: (s32[], f32[2])) -> (s32[], f32[2]) {
  %t = (s32[], /*index=1*/f32[2]{0:T(128)}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %h = f32[2]{0} get-tuple-element(%t), index=1
  %start = ((f32[2]{0}), f32[2]{0}, u32[]) fusion-start(%h), kind=kLoop, calls=%fused, metadata={op_name="f/while(body=%x)"}
  %done = f32[2]{0} fusion-done(%start)
  ROOT %pair = (s32[], f32[2]{0}) tuple(%i, %done)
}

%condition (t: (s32[], f32[2])) -> pred[] {
  %t = (s32[], f32[2]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %less = pred[] compare(%i, %i), direction=LT
}

%called (h: f32[2]) -> f32[2] {
  %h = f32[2]{0} parameter(0)
  %matrix = f32[2,2]{1,0} custom-call(%h), custom_call_target="f"
  ROOT %product = f32[2]{0} dot(%h, %matrix), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}

%short (h: f32[2]) -> f32[2] {
  ROOT %h = f32[2]{0} parameter(0)
}

%body (t: (s32[], f32[2])) -> (s32[], f32[2]) {
  %t = (s32[], f32[2]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %h = f32[2]{0} get-tuple-element(%t), index=1
  %f = f32[2]{0} fusion(%h), kind=kLoop, calls=%fused
  %either = f32[2]{0} conditional(%i, %f, %f), branch_computations={%short, %called}
  %next = (s32[], f32[2]{0}) tuple(%i, %either)
  ROOT %while.1 = (s32[], f32[2]{0}) while(%next), condition=%condition, body=%inner_body
}

ENTRY %main (h: f32[2]) -> f32[2] {
  %h = f32[2]{0} parameter(0)
  %zero = s32[] constant(0)
  %first = f32[2]{0} call(%h), to_apply=%called
  %pair = (s32[], f32[2]{0}) tuple(%zero, %first)
  %while.2 = (s32[], f32[2]{0}) while(%pair), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %h_T = f32[2]{0} get-tuple-element(%while.2), index=1
}
"""


def test_counter():
    (outer,) = kernels.loops(PROGRAM)
    assert (outer.name, outer.runs, outer.kinds) == ("while.2", 7, {"fusion": 1, "custom-call": 1, "dot": 1})
    (inner,) = outer.inside
    assert (inner.name, inner.runs, inner.kinds, inner.inside) == ("while.1", None, {"fusion": 1}, [])
    assert [loop.name for loop in kernels.innermost([outer])] == ["while.1"]


def test_counter_wants_a_compiled_program():
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        kernels.loops(jax.jit(jnp.sin).lower(1.0).as_text())
