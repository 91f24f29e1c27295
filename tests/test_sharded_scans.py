"""Strategies under `jax.shard_map` and on Explicit meshes, in another process: JAX settles the number of devices once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(*words):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    return subprocess.run(
        [sys.executable, str(Path(__file__).parent / "sharded_scans.py"), *words],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_adjoints_by_hand_with_flags_on_eight_devices():
    found = run("adjoint", "gru", "flags")
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.split() == ["passed", "manual-adjoint-gru-flags", "passed", "explicit-adjoint-gru-flags"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["manual", "explicit", "eager"])
def test_every_strategy_on_eight_devices(where):
    found = run(where)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("passed") > 3
