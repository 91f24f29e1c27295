"""The memory that there is, to compare with what an update needs before it is run."""

import os
from pathlib import Path
from typing import Any

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_bytes(device: Any) -> int | None:
    """What a device, or for a CPU the machine and the process's control group, has left; `None` if it does not say."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    known = [_machine(), *(_group(limit, used) for limit, used in _CGROUPS)]
    return min((number for number in known if number is not None), default=None)


def _machine() -> int | None:
    meminfo = _read("/proc/meminfo")
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _group(limit: str, used: str) -> int | None:
    """What a control group may still take; files cached for it count as used, and are given back when needed."""
    most, now = _read(limit).strip(), _read(used).strip()
    if not most.isdigit() or not now.isdigit():
        return None
    stat = dict(line.split() for line in _read(str(Path(limit).parent / "memory.stat")).splitlines())
    return int(most) - int(now) + int(stat.get("inactive_file", 0))


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
