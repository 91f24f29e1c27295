"""Mistakes planted in a loop of plain numpy that shares no code with the library, and named from its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbptt as bptt
from jaxbptt.analysis.mistakes import search
from jaxbptt.analysis.mistakes.matching import Match

# Time steps, inputs, hidden units, outputs; the second has square matrices throughout.
SIZES = (6, 2, 4, 3), (7, 4, 4, 4), (10, 3, 6, 5)
BATCHES = (), (3,)

# What is planted, and what the name must have in it.
PLANTED = {
    "W_hh untransposed": "W_hh is not transposed",
    "no W_hh": "W_hh is missing",
    "no tanh'": "tanh' is missing: dh_raw = dh",
    "tanh' of h_prev": "tanh' is that of hₜ₋₁",
    "tanh' without square": "tanh' has no square",
    "tanh' of h": "tanh' is taken at hₜ",
    "tanh' of a": "tanh' is 1 − aₜ²",
    "sigmoid'": "tanh' is that of the logistic function",
    "h for h_prev": "hₜ stands for hₜ₋₁ in the weight gradient",
    "hs[-1] at 0": "the last state stands for h₀",
    "dh carried": "dh is carried back before tanh'",
    "dh in dW": "dh stands for dh_raw in the weight gradient",
    "tanh' not for dh_next": "tanh' is missing for dh_next",
    "tanh' not for dy": "tanh' is missing for dy",
    "no carry": "nothing is carried back",
    "dh_next added": "dh_next is added to from step to step",
    "first left out": "time step 0 (counted from 0, the first) is missing in the sum over time",
    "last left out": "the last) is left out of the backward loop",
    "third left out": "time step 2 (counted from 0) is left out of the backward loop",
    "third twice in dW_hh": "time step 2 (counted from 0) is counted twice in the sum",
    "last loss twice": "the last) is counted twice",
    "last loss started": "dh_next starts from it, and the loop adds it",
    "last loss missing": "the last) is left out",
    "only last loss": "only the last time step's loss counts",
    "target before": "the target is that of the time step before",
    "target before, border kept": "the target is that of the time step before",
    "target before, border skipped": "the target is that of the time step before",
    "target after": "the target is that of the next time step",
    "target after, border skipped": "the target is that of the next time step",
    "no softmax": "the softmax is missing",
    "no target": "the target is not subtracted",
    "overwritten": "is overwritten (=)",
    "overwritten db": "is overwritten (=)",
    "mean over time": "it is the mean over the {T} time steps",
    "sign": "the sign is wrong",
    "next x": "xₜ₊₁ stands for xₜ",
    "previous x": "xₜ₋₁ stands for xₜ",
    "xs reversed": "the inputs are in reverse order of time",
    "deltas reversed": "the deltas are in the order of the backward loop",
    "forward in time": "the backward loop runs forward in time",
    "cut every 3": "the recursion is cut every 3 steps, counted from the first step",
    "clipped": "dh_next is clipped at ±0.25 at every step",
    "clipped to a norm": "dh_next is clipped to a norm of 0.5 at every step",
    "h_prev in dW_hy": "hₜ₋₁ stands for hₜ in dW_hy",
    "dW_hh swapped": "it is the transpose",
}
ONLY_SQUARE = {"W_hy untransposed": "W_hy is not transposed"}
ONLY_ROWS = {
    "mean over rows": "it is the mean over the 3 rows",
    "only last row": "only the last row of the batch counts",
}
QUICK = "W_hh untransposed", "target before, border skipped", "overwritten db"


def make(size, batch, dtype=np.float64, seed=0):
    T, inputs, hidden, outputs = size
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(dtype)

    W_xh, W_hh, b = normal(hidden, inputs, scale=0.7), normal(hidden, hidden, scale=0.6), normal(hidden, scale=0.3)
    params = bptt.NetworkParams(bptt.ElmanParams(W_xh, W_hh, b), normal(outputs, hidden))
    return params, normal(*batch, hidden), normal(T, *batch, inputs), rng.integers(0, outputs, (T, *batch))


def softmax(y):
    e = np.exp(y - y.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def outer(a, b):
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


def by_hand(params, h_0, xs, targets, planted=()):
    """Backpropagation through time with what is planted in it."""
    has = lambda *names: any(name in planted for name in names)
    (W_xh, W_hh, b), W_hy, _ = params
    T, classes = len(xs), np.eye(len(W_hy), dtype=xs.dtype)
    hs, pre = [h_0], []
    for x in xs:
        pre.append(hs[-1] @ W_hh.T + x @ W_xh.T + b)
        hs.append(np.tanh(pre[-1]))
    back = W_hh.T if has("W_hh untransposed") else np.eye(len(W_hh)) if has("no W_hh") else W_hh
    out = W_hy.T if has("W_hy untransposed") else W_hy
    dW_xh, dW_hh, db, dW_hy = (np.zeros_like(w) for w in (W_xh, W_hh, b, W_hy))
    dh_next, raws = np.zeros_like(h_0), []
    if has("last loss started"):
        dh_next = (softmax(hs[-1] @ W_hy.T) - classes[targets[-1]]) @ out
    steps = list(range(T)) if has("forward in time") else list(reversed(range(T)))
    for t in steps:
        if (has("first left out") and t == 0) or (has("last left out") and t == T - 1):
            continue
        if has("third left out") and t == 2:
            continue
        h, h_prev, a = hs[t + 1], hs[t], pre[t]
        s = t
        if has("target before", "target before, border kept", "target before, border skipped"):
            s = t - 1 if t or has("target before") else t
        if has("target after", "target after, border skipped"):
            s = (t + 1) % T
        dy = softmax(h @ W_hy.T) - classes[targets[s]]
        if has("no softmax"):
            dy = h @ W_hy.T - classes[targets[s]]
        if has("no target"):
            dy = softmax(h @ W_hy.T)
        if (has("target before, border skipped") and t == 0) or (has("target after, border skipped") and t == T - 1):
            dy = 0 * dy
        if t == T - 1:
            dy = 2 * dy if has("last loss twice") else 0 * dy if has("last loss missing") else dy
        elif has("only last loss"):
            dy = 0 * dy
        if has("only last row"):
            dy = np.concatenate([0 * dy[:-1], dy[-1:]])
        dh = dy @ out + dh_next
        slope = 1 - h**2
        for name, value in {
            "no tanh'": 1,
            "tanh' of h_prev": 1 - h_prev**2,
            "tanh' without square": 1 - h,
            "tanh' of h": 1 - np.tanh(h) ** 2,
            "tanh' of a": 1 - a**2,
            "sigmoid'": h * (1 - h),
        }.items():
            slope = value if has(name) else slope
        dh_raw = dh * slope
        if has("tanh' not for dh_next"):
            dh_raw = dy @ out * slope + dh_next
        if has("tanh' not for dy"):
            dh_raw = dy @ out + dh_next * slope
        delta = dh if has("dh in dW") else dh_raw
        before = h if has("h for h_prev") else hs[-1] if has("hs[-1] at 0") and t == 0 else h_prev
        x = xs[t]
        if has("next x"):
            x = xs[min(t + 1, T - 1)]
        if has("previous x"):
            x = xs[t - 1] if t else 0 * x
        if has("xs reversed"):
            x = xs[T - 1 - t]
        often = 2 if has("third twice in dW_hh") and t == 2 else 1
        if has("overwritten"):
            dW_xh, dW_hh, db, dW_hy = (
                outer(delta, x),
                outer(delta, before),
                outer(delta, delta * 0 + 1)[:, 0],
                outer(dy, h),
            )
        else:
            dW_xh += outer(delta, x)
            dW_hh += often * outer(delta, before)
            total = delta.reshape(-1, delta.shape[-1]).sum(0)
            db = total if has("overwritten db") else db + total
            dW_hy += outer(dy, h_prev if has("h_prev in dW_hy") else h)
        raws.append(dh_raw)
        sent = (dh if has("dh carried") else dh_raw) @ back
        if has("no carry") or (has("cut every 3") and t % 3 == 0):
            sent = 0 * sent
        if has("clipped"):
            sent = np.clip(sent, -0.25, 0.25)
        if has("clipped to a norm"):
            sent = sent * min(1, 0.5 / max(np.linalg.norm(sent), 1e-300))
        dh_next = dh_next + sent if has("dh_next added") else sent
    if has("deltas reversed"):
        dW_xh = sum(outer(raw, x) for raw, x in zip(raws, xs, strict=True))
        dW_hh = sum(outer(raw, h) for raw, h in zip(raws, hs[:-1], strict=True))
    if has("dW_hh swapped"):
        dW_hh = dW_hh.T
    factor = -1 if has("sign") else 1 / T if has("mean over time") else 1 / 3 if has("mean over rows") else 1
    cell = bptt.ElmanParams(factor * dW_xh, factor * dW_hh, factor * db)
    return bptt.NetworkParams(cell, factor * dW_hy)


def problem_of(params, h_0, xs, targets):
    def step(params, h, x):
        h = jnp.tanh(h @ params.cell.W_hh.T + x @ params.cell.W_xh.T + params.cell.b)
        return h, h @ params.W_hy.T

    def loss(h, ys):
        return bptt.losses.cross_entropy(ys, targets, reduction="sum")

    arrays = jax.tree.map(jnp.asarray, {"params": params, "init": h_0, "xs": xs})
    reference = jax.grad(lambda p: loss(*bptt.scan(step, p, arrays["init"], arrays["xs"])))(arrays["params"])
    return {"step": step, "loss": loss, **arrays}, reference


@functools.cache
def small():
    """The smallest problem, and its reference."""
    given = make(SIZES[0], ())
    return given, *problem_of(*given)


@pytest.fixture
def compiled_once(monkeypatch):
    """The program of the candidates is the same for every gradient of one problem."""
    programs, compiled = {}, search.compiled

    def kept(p, factors):
        key = p.given.step, p.given.loss, p.given.flags.given, factors
        return programs.setdefault(key, None) or programs.update({key: compiled(p, factors)}) or programs[key]

    monkeypatch.setattr(search, "compiled", kept)


def planted_here(size, batch):
    square = size[1] == size[2] == size[3]
    return PLANTED | (ONLY_SQUARE if square else {}) | (ONLY_ROWS if batch else {})


def test_quick(compiled_once):
    given, problem, reference = small()
    assert bptt.compare_gradients(by_hand(*given), reference, **problem).agrees
    for planted in QUICK:
        report = bptt.compare_gradients(by_hand(*given, {planted}), reference, **problem)
        assert PLANTED[planted] in report.cause, planted
        assert not report.agrees


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("size", SIZES)
def test_planted(size, batch, compiled_once):
    given = make(size, batch)
    problem, reference = problem_of(*given)
    missed = {}
    for planted, name in planted_here(size, batch).items():
        report = bptt.compare_gradients(by_hand(*given, {planted}), reference, **problem)
        if name.format(T=size[0]) not in report.cause:
            missed[planted] = report.cause
    assert missed == {}


def perturbed(kind, given, reference, rng):
    """A gradient that no known mistake gives."""
    params, h_0, xs, targets = given
    leaves, treedef = jax.tree.flatten(jax.tree.map(np.array, reference))
    some = rng.integers(len(leaves))
    leaf = leaves[some]
    size = 10.0 ** rng.uniform(-6, 1)
    match kind:
        case "noise in all":
            leaves = [a + size * np.abs(a).max() * rng.standard_normal(a.shape) for a in leaves]
        case "noise in one leaf":
            leaves[some] = leaf + size * np.abs(leaf).max() * rng.standard_normal(leaf.shape)
        case "one entry":
            leaf.flat[rng.integers(leaf.size)] += size * np.abs(leaf).max() * rng.standard_normal()
        case "a leaf scaled":
            leaves[some] = leaf * rng.uniform(-3, 3)
        case "each leaf scaled":
            leaves = [a * rng.uniform(0.1, 3) for a in leaves]
        case "an outer product":
            (a, *b) = map(rng.standard_normal, leaf.shape)
            leaves[some] = leaf + size * (np.outer(a, b[0]) if b else a)
        case "a row":
            leaf[rng.integers(len(leaf))] *= rng.uniform(-3, 3)
        case "two entries exchanged":
            i, j = rng.choice(leaf.size, 2, replace=False)
            leaf.flat[[i, j]] = leaf.flat[[j, i]]
        case "near a known one":
            leaves = [a * -(1 + max(size, 1e-3) * rng.standard_normal(a.shape)) for a in leaves]
        case "other weights":
            moved = jax.tree.map(lambda w: w + max(size, 1e-3) * rng.standard_normal(w.shape), params)
            return by_hand(moved, h_0, xs, targets)
        case "other targets":
            return by_hand(params, h_0, xs, rng.permutation(targets.ravel()).reshape(targets.shape))
        case "a mistake that nobody knows":
            return by_hand(params._replace(W_hy=-params.W_hy), h_0, xs + 0.1, targets, {"no tanh'"})
    return treedef.unflatten(leaves)


KINDS = (
    "noise in all",
    "noise in one leaf",
    "one entry",
    "a leaf scaled",
    "each leaf scaled",
    "an outer product",
    "a row",
)
KINDS += "two entries exchanged", "near a known one", "other weights", "other targets", "a mistake that nobody knows"
# What says what the difference looks like, and names no mistake.
DESCRIBED = "no single cause found", "it is "


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_no_wrong_name(dtype, compiled_once):
    """102 gradients in each precision whose differences are no known mistake's: nothing is named."""
    named, rng = [], np.random.default_rng(1)
    for size, batch in zip(SIZES, ((), (3,), (3,)), strict=True):
        given = make(size, batch, dtype)
        problem, reference = problem_of(*given)
        for trial in range(34):
            kind = KINDS[trial % len(KINDS)]
            mine = jax.tree.map(lambda leaf: leaf.astype(dtype), perturbed(kind, given, reference, rng))
            report = bptt.compare_gradients(mine, reference, **problem)
            if report.mistakes or not (report.agrees or report.cause.startswith(DESCRIBED)):
                named.append((kind, report.cause))
    assert named == []


def leaky_by_hand(params, h_0, xs, planted):
    """hₜ = hₜ₋₁/2 + tanh(hₜ₋₁ W + xₜ U)/2 in rows, with L = Σₜ |hₜ − 1|²."""
    W, U = params["W"], params["U"]
    T, hs, zs = len(xs), [h_0], []
    for x in xs:
        zs.append(np.tanh(hs[-1] @ W + x @ U))
        hs.append(hs[-1] / 2 + zs[-1] / 2)
    dW, dU, dh_next = np.zeros_like(W), np.zeros_like(U), np.zeros_like(h_0)
    for t in reversed(range(T)):
        if planted == "first left out" and t == 0:
            continue
        loss_at = (
            1 if planted == "loss of the step before" and t == 0 else t if planted.startswith("loss of") else t + 1
        )
        dh = 2 * (hs[loss_at] - 1) + (0 if planted == "no carry" else dh_next)
        delta = dh / 2 * (1 - zs[t] ** 2)
        dW_t = outer(hs[t + 1] if planted == "h for h_prev" else hs[t], delta)
        dW, dU = dW_t if planted == "overwritten" else dW + dW_t, dU + outer(xs[t - (planted == "previous x")], delta)
        dh_next = delta @ (W if planted == "W untransposed" else W.T) + dh / 2
    return {"U": dU / (T if planted == "mean over time" else 1), "W": dW / (T if planted == "mean over time" else 1)}


LEAKY = {
    "": "agrees",
    "no carry": "nothing is carried back",
    "h for h_prev": "hₜ stands for hₜ₋₁",
    "overwritten": "in gradient['W']: the sum over time is overwritten",
    "first left out": "time step 0 (counted from 0, the first) is missing",
    "loss of the step before": "dy is that of the time step before",
    "previous x": "xₜ₋₁ stands for xₜ",
    "W untransposed": "params['W'] is not transposed",
    "mean over time": "it is the mean over the 6 time steps",
}


@pytest.mark.slow
def test_any_step(compiled_once):
    """A step that is no Elman network, in rows, with a batch axis: what is general is named there too."""
    rng = np.random.default_rng(5)
    params = {"U": rng.standard_normal((3, 4)), "W": rng.standard_normal((4, 4))}
    h_0, xs = rng.standard_normal((2, 4)), rng.standard_normal((6, 2, 3))

    def step(params, h, x):
        h = h / 2 + jnp.tanh(h @ params["W"] + x @ params["U"]) / 2
        return h, h

    def loss(h, hs):
        return jnp.sum((hs - 1) ** 2)

    given = {"step": step, "loss": loss, **jax.tree.map(jnp.asarray, {"params": params, "init": h_0, "xs": xs})}
    reference = jax.grad(lambda p: loss(*bptt.scan(step, p, given["init"], given["xs"])))(given["params"])
    found = {
        planted: bptt.compare_gradients(leaky_by_hand(params, h_0, xs, planted), reference, **given).cause
        for planted in LEAKY
    }
    assert {planted: cause for planted, cause in found.items() if LEAKY[planted] not in cause} == {}


@pytest.mark.costly
@pytest.mark.parametrize(("name", "t"), [("dh_raw", 4), ("hs", 2), ("ys", 3), ("dy", 4), ("dh", 1)])
def test_first_difference(name, t):
    """Each intermediate result, wrong at one time step and the one that is computed next."""
    (params, h_0, xs, targets), problem, reference = small()
    right = bptt.bptt(params, xs, h_0, targets)
    wrong = np.array(getattr(right, name))
    wrong[[t, t + 1 if name in ("hs", "ys") else t - 1]] += 0.1
    compare = functools.partial(bptt.compare_gradients, right.gradients, reference, **problem)
    report = compare(intermediates=right._replace(**{name: wrong}))
    assert report.first_difference.startswith(f"{name} at time step {t} (counted from 0) is the first that differs")
    assert report.cause == f"agrees; {report.first_difference}"
    if name == "dh_raw":
        assert report.first_difference.endswith("after 1 step that agree; dy and dh agree there")
        assert compare(intermediates=right).first_difference == ""


@pytest.mark.slow
def test_read_out_of_a_network_and_of_a_cell_alone():
    """A cell with a network's params has the read-out in its step; and nothing is named where the params are others."""
    given, problem, reference = small()
    mine = by_hand(*given, {"dh carried"})
    cell = bptt.elman(2, 4, dtype=jnp.float64)
    report = bptt.compare_gradients(mine, reference, **problem | {"step": cell})
    assert report.mistakes == ("dh is carried back before tanh': dhₜ₋₁ = W_hhᵀ dhₜ",)
    nearly = jax.tree.map(lambda leaf: 1.000_001 * leaf, reference)
    for other in (mine, nearly):
        with pytest.raises(
            ValueError, match=r"reference is not the gradient of this problem: params.cell.W_xh differs"
        ):
            bptt.compare_gradients(reference, other, **problem)


@pytest.mark.slow
@pytest.mark.parametrize(
    "planted",
    [
        ("no tanh'", "h for h_prev"),
        ("W_hh untransposed", "last left out"),
        ("tanh' of h_prev", "mean over time"),
        ("dh carried", "last loss twice"),
        ("h for h_prev", "overwritten db"),
        ("target before", "W_hh untransposed"),
    ],
)
def test_two_mistakes(planted, compiled_once):
    given = make(SIZES[2], (3,))
    problem, reference = problem_of(*given)
    report = bptt.compare_gradients(by_hand(*given, set(planted)), reference, **problem)
    for one in planted:
        assert PLANTED[one].format(T=10) in report.cause


@pytest.mark.slow
def test_gradient_of_the_first_state():
    """Gradients of (params, init), where the loop returns ∂L/∂h₁ for ∂L/∂h₀."""
    (params, h_0, xs, targets), problem, _ = small()

    def loss(both):
        return problem["loss"](*bptt.scan(problem["step"], *both, problem["xs"]))

    reference = jax.grad(loss)((problem["params"], problem["init"]))
    right = bptt.bptt(params, xs, h_0, targets)
    assert bptt.compare_gradients((right.gradients, right.dh_0), reference, **problem).agrees
    report = bptt.compare_gradients((right.gradients, right.dh[0]), reference, **problem)
    assert report.mistakes == ("the gradient of the first state is that of the state after the first step",)


@pytest.mark.slow
def test_loss_of_the_last_step_and_of_the_last_state():
    """Where only the last step has a loss, through its output or through the carry."""
    params, h_0, xs, _ = make(SIZES[2], (3,))
    cell, xs, h_0 = bptt.elman(3, 6, dtype=jnp.float64), jnp.asarray(xs), jnp.asarray(h_0)
    for loss in (lambda h, hs: jnp.sum(h**2), lambda h, hs: jnp.sum(hs[-1] ** 2)):
        given = {"step": cell, "params": params.cell, "init": h_0, "xs": xs, "loss": loss}
        reference = jax.grad(lambda p, loss=loss: loss(*bptt.scan(cell, p, h_0, xs)))(params.cell)
        (W_xh, W_hh, b), hs = params.cell, [h_0]
        for x in xs:
            hs.append(np.tanh(hs[-1] @ W_hh.T + x @ W_xh.T + b))
        dh, mine = 2 * hs[-1], [0 * w for w in params.cell]
        for t in reversed(range(len(xs))):
            dh_raw = dh * (1 - hs[t + 1] ** 2)
            mine = [
                g + d for g, d in zip(mine, (outer(dh_raw, xs[t]), outer(dh_raw, hs[t]), dh_raw.sum(0)), strict=True)
            ]
            dh = dh_raw @ W_hh.T
        report = bptt.compare_gradients(bptt.ElmanParams(*mine), reference, **given)
        assert report.mistakes == ("W_hh is not transposed in dhₜ₋₁ = W_hhᵀ dh_rawₜ",)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_cells_with_gates_and_flags(name):
    """Rows that are cut off from the past, in a cell that is no Elman network: the same loop without a carry is told."""
    cell = getattr(bptt, name)(2, 3, dtype=jnp.float64)
    params, init = cell.init(jax.random.key(0)), cell.initial_carry((2,))
    xs, valid = jax.random.normal(jax.random.key(1), (5, 2, 2)), jnp.arange(5)[:, None] < jnp.array([5, 3])
    loss = lambda carry, ys: jnp.sum(ys**2)
    given = {"step": cell, "params": params, "init": init, "xs": xs, "valid": valid}
    scans = {"": bptt.scan, "no carry": functools.partial(bptt.truncated_scan, truncation_length=1)}
    right, cut = (
        jax.grad(lambda p, scan=scan: loss(*scan(cell, p, init, xs, valid=valid)))(params) for scan in scans.values()
    )
    assert bptt.compare_gradients(right, right, loss=loss, **given).agrees
    assert "nothing is carried back" in bptt.compare_gradients(cut, right, loss=loss, **given).cause


@pytest.mark.parametrize(("shape", "likely"), [((4,), False), ((2, 2), True)])
def test_numbers_of_an_outer_product_are_not_all_its_own(shape, likely):
    """Three digits in each of four numbers, after 10,000 tries; two and two make four, but three of them say the fourth."""
    reference, mine, one = np.zeros(shape), np.ones(shape), np.ones(1)
    match = Match([mine], [reference], [1e-9], [1.0], tried=10_000)
    assert match.likely(1e-3 * one, one, np.array([True])) == likely


def test_a_number_alone_is_no_evidence_in_single_precision():
    """One number in float32 has 7 digits: by chance one of hundreds of candidates may be as close."""
    power = lambda w, h, x: (w * h, None)
    loss = lambda h, ys: h
    given = {"step": power, "params": jnp.float32(0.2), "init": jnp.float32(0.9), "length": 3, "loss": loss}
    reference = jnp.float32(3 * 0.2**2 * 0.9)
    report = bptt.compare_gradients(reference / 3, reference, **given)
    assert report.mistakes == ()
    assert report.cause.startswith("no single cause found: none of the")


@pytest.mark.slow
def test_a_single_time_step():
    """What leaves it out is 0 everywhere, and is said to be; what doubles it is a factor."""
    given = make((1, 2, 3, 2), (2,))
    problem, reference = problem_of(*given)
    report = bptt.compare_gradients(reference._replace(W_hy=0 * reference.W_hy), reference, **problem)
    assert report.mistakes == ()
    assert report.cause.startswith("it is 0 everywhere")
    assert bptt.compare_gradients(by_hand(*given, {"sign"}), reference, **problem).cause == "the sign is wrong"


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"loss": None}, TypeError, "A part of the problem is given, but no loss"),
        ({"init": None}, TypeError, "A part of the problem is given, but no init"),
        ({"step": None, "loss": None}, TypeError, "but not its step and loss"),
        ({"params": {"W": 1.0}}, ValueError, "pass gradients of params, or of the pair"),
        ({"intermediates": {"h": 1}}, ValueError, "intermediates have 'h', but what is compared is hs, ys, dy"),
        ({"intermediates": {"dh": np.ones(3)}}, ValueError, r"dh has shape \(3,\), but \(6, 4\) is expected"),
    ],
)
def test_errors(changed, error, words):
    _, problem, reference = small()
    with pytest.raises(error, match=words):
        bptt.compare_gradients(reference, reference, **problem | changed)
