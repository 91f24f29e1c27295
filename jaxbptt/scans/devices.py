r"""What is computed without a thought of devices, on many of them: what JAX asks there of every operation is seen to here."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding

from jaxbptt.array_types import is_explicit, varying, varying_over
from jaxbptt.programs.perturbed import PerturbedAdjoint
from jaxbptt.scans.contraction import fit
from jaxbptt.trees import combine, is_array, is_differentiable, partition, select


def varying_alike(tree: Any) -> Any:
    """Floating-point leaves of a tree, made to vary over all devices of a `shard_map` that any leaf varies over.

    A backward written by hand has the gradients of what each device computes. Of what varies less, JAX adds them up.
    """
    axes = varying(*filter(is_array, jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: varying_over(leaf, axes) if is_differentiable(leaf) else leaf, tree)


def laid_out(fn: Callable[[Any], Any], args: Any, likes: Any) -> Any:
    """`fn(args)`; for arrays of an Explicit mesh, whose operations say how results lie, the compiler lays them out in `fn`.

    The results lie like `likes`, a tree of the same structure.
    """
    arrays, others = partition(args, is_array)
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(arrays)]
    mesh = next(filter(is_explicit, meshes), None)
    if mesh is None:
        return fn(args)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, jax.typeof(leaf).sharding.spec), likes)
    automatic = jax.sharding.auto_axes(
        lambda arrays: fn(combine(arrays, others)),
        axes=tuple(axis for axis, kind in kinds if kind is AxisType.Explicit),
        out_sharding=shardings,
    )
    return automatic(arrays)


def on_any_mesh(adjoint: PerturbedAdjoint) -> PerturbedAdjoint:
    """An adjoint by hand, whose products over time sum over axes that may lie on several devices."""
    flags = adjoint.perturbed

    def contract(params, residuals, xs, ys_bar, deltas):
        def bars(args):
            params_bar, xs_bar = adjoint.contract(*args)
            params_bar = fit(params_bar, args[0], flags.params, "params", cast=False)
            return params_bar, fit(xs_bar, args[2], flags.x, "xs", cast=False)

        likes = select(params, flags.params), select(xs, flags.x)
        return laid_out(bars, (params, residuals, xs, ys_bar, deltas), likes)

    return adjoint._replace(contract=contract)
