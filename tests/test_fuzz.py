"""Random recurrences through every strategy and `lax.scan`: 120 in the slow part of the suite, any number by `fuzz.py`."""

import random

import fuzz
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_like_lax_scan(part):
    """Drawn by hypothesis, which finds the simplest that fails; the case stands in the error."""

    @seed(part)
    @settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False, note_method_calls=False))
    def check(rng):
        case = fuzz.draw(rng)
        # Two of the strategies drawn for each case: over all cases every strategy meets some thirty.
        case = case._replace(contenders=case.contenders[:2])
        try:
            fuzz.strict(fuzz.check)(case)
        except Exception as error:
            error.add_note(str(case))
            raise

    check()


def test_the_comparison_can_fail():
    """Where a strategy cuts, its gradient is another one, and a case says so."""
    case = fuzz.Case(
        carry={"c0": "vector"},
        params={"p0": "matrix"},
        closed={},
        xs={"x0": "vector"},
        program=(("matvec", 0, 1, 0), ("add", 2, 4, 0)),
        new_carry=(5,),
        ys=(1,),
        loss=("c0", 0),
        last=False,
        wrt=("p0",),
        steps=5,
        rows=2,
        shared=(),
        flags=("valid",),
        padding=float("nan"),
        how="jit",
        contenders=(("truncated_scan", {"truncation_length": 5}),),
        cell=None,
        seed=0,
    )
    assert fuzz.check(case) == 1
    with pytest.raises(AssertionError, match="p0"):
        fuzz.check(case._replace(contenders=(("truncated_scan", {"truncation_length": 1}),)))


def test_everything_is_drawn():
    """What is drawn covers every operation and kind of leaf."""
    cases = [fuzz.draw(random.Random(seed)) for seed in range(500)]
    names = {name for case in cases for name, *_ in case.program}
    assert names == set(fuzz.OPERATIONS)
    assert {kind for case in cases for kind in case.carry.values()} >= {
        "key",
        "empty",
        "overflow",
        "complex",
        "boolean",
    }
    assert {case.how for case in cases} == {"jit", "eager", "vmap", "nested", "second"}
