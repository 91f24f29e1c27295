"""Flags of XLA for tests, which compile much and run little: programs that are compiled fast cost less than fast programs."""

import os
from importlib.metadata import version


def ask_for():
    """Before jax is imported, unless flags are set."""
    flags = "--xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):  # later ones know no such flag, and stop at it
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", flags)
