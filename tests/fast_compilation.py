"""Imported before jax: flags of XLA that compile fast, since tests compile much and run little."""

import os
from importlib.metadata import version

FLAGS = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # later ones know no such flag, and stop at it
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
