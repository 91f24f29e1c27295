import os

# The suite compiles much and runs little: code that is compiled fast costs a quarter less time than fast code.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest


@pytest.fixture(autouse=True)
def strict():
    """Double precision, and no dtype promotion that nobody asked for; what is about float32 asks for it."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield
