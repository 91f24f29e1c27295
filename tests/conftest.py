import fcntl
import gc
import os
import pickle
from pathlib import Path

import fast_compilation  # noqa: F401, which sets flags before jax is imported
import jax
import pytest
import report_page

# A program for eight devices, not a module with examples.
collect_ignore = ["sharded_scans.py"]


def pytest_configure():
    """One core for each worker and what it starts: threads of several that wait for each other cost more than they bring."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_finish():
    """Modules and tests stay until the end: the garbage collector need not look through them again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def strict():
    """Double precision, and no dtype promotion that nobody asked for; what is about float32 asks for it."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Linux grants a process 65,530 mappings, and each compiled program takes some: at the limit, compiling crashes."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def whole_report(tmp_path_factory):
    """The report of `report_page`, made by the worker that needs it first and read by the others."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own in that of the run
        shared = shared.parent
    kept = shared / "whole-report.pickle"
    with (shared / "whole-report.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            folder = shared / "whole-report"
            folder.mkdir()
            kept.write_bytes(pickle.dumps(report_page.make(folder)))
        return pickle.loads(kept.read_bytes())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of a test marked costly, the first case is quick and the others are slow; slow ones run without coverage."""
    seen = set()
    for item in items:
        if item.get_closest_marker("costly") and not item.get_closest_marker("slow"):
            test = item.nodeid.split("[")[0]
            if test in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(test)
        # Coverage makes tracing a fifth slower, and what is quick covers each behaviour once.
        if item.get_closest_marker("slow") and config.pluginmanager.hasplugin("_cov"):
            item.add_marker("no_cover")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Where coverage pauses, it does so in the programs that a test starts as well."""
    measured = "COVERAGE_PROCESS_CONFIG" in os.environ and item.get_closest_marker("no_cover")
    config = os.environ.pop("COVERAGE_PROCESS_CONFIG") if measured else None
    try:
        return (yield)
    finally:
        if measured:
            os.environ["COVERAGE_PROCESS_CONFIG"] = config
