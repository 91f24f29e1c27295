"""Random recurrences through every strategy and `lax.scan`: 72 in the slow part of the suite, any number by `fuzz.py`."""

import random

import fuzz
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_like_lax_scan(part):
    """Each case from a seed of its own, so that no two are alike; the error says how to find the simplest that fails."""
    for seed in range(18 * part, 18 * (part + 1)):
        case = fuzz.draw(random.Random(seed))
        # Two of the strategies drawn for each case: over all cases every strategy meets a dozen.
        case = case._replace(contenders=case.contenders[:2])
        try:
            fuzz.check(case)
        except Exception as error:
            error.add_note(f"{case}\npython tests/fuzz.py --only {seed} --simplest")
            raise


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
