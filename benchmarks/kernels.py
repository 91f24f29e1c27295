"""Kernels that one time step starts, counted in the compiled program: on a GPU they are what a recurrent loop costs.

Each instruction that is left in a loop's body after XLA has fused what it can is a kernel, and starting one takes a GPU some
microseconds, however little it computes. `loops` counts them in the text of any compiled program. For a CPU the count
is a stand-in, since XLA fuses differently there; with `--h100` the programs are compiled for an H100, for which jax's CUDA
plugin is needed (`pip install 'jax[cuda12]'`) and no GPU. Without one XLA can't try out which products are the fastest, so a
product may become one kernel more or less than on the device.

    python benchmarks/kernels.py [--h100] [--quick]
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jaxbptt as bptt

# With one time step in an iteration on every platform, but for one.
STRATEGIES = {
    "scan": bptt.scan,
    "adjoint_scan": partial(bptt.adjoint_scan, unroll=1),
    "adjoint_scan, unroll=8": partial(bptt.adjoint_scan, unroll=8),
    "adjoint_scan (derived)": lambda cell, *args: bptt.adjoint_scan(cell.step, *args, unroll=1),
    "checkpointed_scan": partial(bptt.checkpointed_scan, unroll=1),
}
CELLS = {"elman": bptt.elman, "gru": bptt.gru, "lstm": bptt.lstm}
# What XLA compiles for, as its own tools describe it.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Instructions that name or reinterpret what is there, and the second halves of asynchronous ones.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier"}
_FREE |= {"partition-id", "replica-id"}
_SECOND_HALVES = ("-done", "-update")

_COMPUTATION = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (.*)")
_RUNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_METADATA = re.compile(r"metadata=\{[^}]*\}")


class Loop(NamedTuple):
    """One loop of a compiled program.

    Attributes:
        name: of its instruction.
        runs: iterations, or None where the compiler doesn't know.
        kinds: how often one iteration starts a kernel of each kind, by HLO's name; of a branch, the dearer side. What loops
            inside start is theirs.
        inside: the loops in its body.
    """

    name: str
    runs: int | None
    kinds: Counter
    inside: list["Loop"]

    @property
    def kernels(self) -> int:
        """Kernels that one iteration starts."""
        return self.kinds.total()


def loops(text: str) -> list[Loop]:
    """The outermost loops of a program, `compiled.as_text()`, in the order in which they run."""
    computations, entry = _computations(text)
    return _contents(computations, entry)[1]


def innermost(found: list[Loop]) -> Iterator[Loop]:
    """Those that have no loop inside: for a scan, its loops over single time steps."""
    for loop in found:
        yield from innermost(loop.inside) if loop.inside else [loop]


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """The (name, opcode, attributes) of the instructions of each computation, and the name of the first to run."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[1]
            entry = name if line.startswith("ENTRY") else entry
            found[name] = []
        elif name and (instruction := _INSTRUCTION.match(line)):
            opcode, _, rest = _without_type(instruction[2]).partition("(")
            found[name].append((instruction[1], opcode, _METADATA.sub("", rest)))
    if not entry:
        raise ValueError("This is not the text of a compiled program: pass jax.jit(f).lower(...).compile().as_text().")
    return found, entry


def _without_type(instruction: str) -> str:
    """`opcode(operands), attributes` of `type opcode(operands), attributes`, where the type may be a tuple of types."""
    depth = 0
    for i, letter in enumerate(instruction):
        depth += (letter == "(") - (letter == ")")
        if letter == " " and depth == 0:
            return instruction[i + 1 :]
    return instruction


def _contents(computations: dict[str, list[tuple[str, str, str]]], name: str) -> tuple[Counter, list[Loop]]:
    """The kernels that a computation starts, and its loops."""
    kinds, found = Counter(), []
    for instruction, opcode, rest in computations[name]:
        if opcode == "while":
            (body,) = _called("body", rest)
            runs = _RUNS.search(rest)
            found.append(Loop(instruction, int(runs[1]) if runs else None, *_contents(computations, body)))
        elif opcode == "call":
            (called,) = _called("to_apply", rest)
            more, inside = _contents(computations, called)
            kinds += more
            found += inside
        elif opcode == "conditional":
            names = _called("branch_computations", rest) or _called("true_computation", rest) + _called(
                "false_computation", rest
            )
            branches = [_contents(computations, branch) for branch in names]
            kinds += max((kinds for kinds, _ in branches), key=Counter.total)
            found += [loop for _, inside in branches for loop in inside]
        elif opcode not in _FREE and not opcode.endswith(_SECOND_HALVES):
            kinds[opcode.removesuffix("-start")] += 1
    return kinds, found


def _called(attribute: str, rest: str) -> list[str]:
    """The computations that an attribute names."""
    value = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|[^\s,]+)", rest)
    return re.findall(r"%([^\s,{}]+)", value[1]) if value else []


def compiled(cell, scan, steps, batch, device=None):
    """The text of the program that computes the gradient of all params, compiled for a device."""

    def loss(params, init, xs):
        _, ys = scan(cell, params, init, xs)
        return jnp.mean(ys**2)

    features = cell.step.sizes[0]
    args = jax.eval_shape(lambda: (cell.init(jax.random.key(0)), cell.initial_carry((batch,))))
    args = *args, jax.ShapeDtypeStruct((steps, batch, features), jnp.float32)
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)
    gradient = jax.jit(jax.grad(loss), in_shardings=sharding, out_shardings=sharding)
    return gradient.lower(*args).compile().as_text() or ""


def h100():
    """An H100 to compile for, which need not be there."""
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # otherwise the plugin asks for a driver
    topology = topologies.get_topology_desc("1x1x1", "cuda", target_config=H100, topology="1 x 1 x 1")
    return topology.devices[0]


HEAD = ("cell", "strategy", "forward", "forward, recomputed", "backward")


def counted(steps, batch, hidden, device=None):
    """A row of kernels per time step for each cell and strategy, under `HEAD`."""
    for name, make in CELLS.items():
        for strategy, scan in STRATEGIES.items():
            found = innermost(loops(compiled(make(hidden, hidden), scan, steps, batch, device)))
            steps_at_once = scan.keywords["unroll"] if isinstance(scan, partial) else 1
            forward, *recomputed, backward = (f"{loop.kernels / steps_at_once:.3g}" for loop in found)
            yield name, strategy, forward, *(recomputed or ["–"]), backward


def main():
    import harness  # not above: what imports the counter may not have this folder on its path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--h100", action="store_true", help="compile for an H100, which need not be there")
    parser.add_argument("--quick", action="store_true", help="small, to check that it runs; writes nothing")
    options = parser.parse_args()
    device = h100() if options.h100 else None
    steps, batch, hidden = (32, 4, 8) if options.quick else (256, 64, 256)

    lines = [
        "# Kernels that a time step starts",
        "",
        f"{harness.machine()}{', compiled for an ' + device.device_kind if device else ''}. Gradient of the params, "
        f"float32, {batch} rows, {hidden} inputs, {hidden} units, {steps} steps.",
        "",
        harness.table(HEAD, list(counted(steps, batch, hidden, device))),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if not options.quick:
        kind = "h100" if options.h100 else jax.default_backend()
        (harness.RESULTS / f"kernels_{kind}_jax_{jax.__version__}.md").write_text(text)


if __name__ == "__main__":
    main()
