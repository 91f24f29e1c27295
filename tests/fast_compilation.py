"""Imported before jax: flags of XLA that compile fast, since tests compile much and run little."""

import os
from importlib.metadata import version

# No optimisation, and one module of machine code for each program: splitting it only pays where cores are idle.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):  # later ones know no such flag, and stop at it
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
