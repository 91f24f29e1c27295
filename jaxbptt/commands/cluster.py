"""The devices and the processes of a run."""

import contextlib
import os
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxbptt.tasks import InputError
from jaxbptt.words import counted

# The variables with the number of processes and the index of this one, by launcher; the first that is set counts. JAX itself
# reads only the address, and asks Slurm and Open MPI for the rest.
_LAUNCHERS = {
    "JAX_NUM_PROCESSES": "JAX_PROCESS_ID",
    "SLURM_NTASKS": "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
}


class Place(NamedTuple):
    """Where a run takes place.

    Attributes:
        mesh: of the devices that share the batch, or `None` for a single device.
        processes: how many there are.
        first: whether this is the process that prints and writes.
    """

    mesh: Mesh | None
    processes: int
    first: bool


def processes(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """How many processes the launcher has started, and the index of this one; `None` for a single process.

    Raises:
        InputError: variables that contradict each other or are not numbers.
    """
    for size, rank in _LAUNCHERS.items():
        # A Slurm batch script has the number of tasks, but is not one of them unless `srun` started it.
        if size not in environment or (size == "SLURM_NTASKS" and "SLURM_STEP_NODELIST" not in environment):
            continue
        try:
            count, number = int(environment[size]), int(environment[rank])
        except (KeyError, ValueError):
            raise InputError(
                f"{size} is {environment[size]!r} and {rank} is {environment.get(rank)!r}: both have to be whole numbers."
            ) from None
        if not 0 <= number < max(count, 1):
            raise InputError(f"{rank} is {number}, but {size} is {count}: processes are counted from 0.")
        return (count, number) if count > 1 else None
    if "JAX_COORDINATOR_ADDRESS" in environment:
        raise InputError("JAX_COORDINATOR_ADDRESS is set: set JAX_NUM_PROCESSES and JAX_PROCESS_ID too, or unset it.")
    return None


def start(devices: int, batch: int) -> Place:
    """Join the other processes, if there are any, and find the devices. Call it before anything runs on a device.

    Args:
        devices: in each process.
        batch: rows that all devices of all processes share.

    Raises:
        InputError: too few devices, a batch that can't be divided evenly, processes that can't connect.
    """
    ours = processes(os.environ)
    count = ours[0] if ours else 1
    if batch % (devices * count):
        among = f"--devices {devices}" + (f" in each of {count} processes" if count > 1 else "")
        raise InputError(f"--batch {batch} can't be divided evenly over {among}: use a multiple of {devices * count}.")
    if devices > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # JAX refuses once it has started; the devices are counted below.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", devices)
    if ours:
        try:
            # jax finds the address in JAX_COORDINATOR_ADDRESS, or asks Slurm or Open MPI.
            jax.distributed.initialize(num_processes=ours[0], process_id=ours[1])
        except (ValueError, RuntimeError) as error:
            words = " ".join(str(error).split())[:200].rstrip(".")
            raise InputError(
                f"process {ours[1]} of {ours[0]} can't connect to the others: {words}. Set JAX_COORDINATOR_ADDRESS to the "
                "host:port of process 0 in all of them."
            ) from None
    found = jax.local_devices()
    if len(found) < devices:
        raise InputError(
            f"--devices {devices}: only {counted(len(found), 'device')} of kind {found[0].platform} available."
        )
    if devices * count == 1:
        return Place(None, 1, True)
    chosen = []
    for process in range(jax.process_count()):
        chosen += [device for device in jax.devices() if device.process_index == process][:devices]
    return Place(Mesh(np.array(chosen), ("batch",)), jax.process_count(), jax.process_index() == 0)
