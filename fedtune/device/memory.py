"""How much memory a device has, and how much of it is free now."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

UNLIMITED = 1 << 60  # version 1 of control groups says "no limit" as the largest number of pages there can be


@dataclass(frozen=True)
class MemoryFound:
    """The memory of a device, and how much of it is left.

    Attributes:
        total: bytes that the device, or the container, has.
        free: bytes of them that a new program can have; what the system keeps only until somebody asks counts.
        limit: what sets the total, in words.
    """

    total: int
    free: int
    limit: str


def memory_of(device: torch.device) -> MemoryFound | None:
    """The device's memory; None where the system doesn't say."""
    if device.type != "cuda":
        return host_memory()
    free, total = torch.cuda.mem_get_info(device)
    host = host_memory()
    if host is not None and getattr(torch.cuda.get_device_properties(device), "is_integrated", False):
        # A Jetson's GPU shares the host's memory, and calls free only what nothing is cached in
        return MemoryFound(min(total, host.total), min(total, host.free), f"shared with the CPU; {host.limit}")
    return MemoryFound(total, free, "the GPU's own")


def host_memory(root: Path = Path("/")) -> MemoryFound | None:
    """The host's memory, or what the control group of a container leaves of it.

    Args:
        root: where the system's files are.
    """
    found = _system(root)
    if found is None:
        return None
    for total, free, folder in _groups(root):
        if total < found.total:
            found = MemoryFound(total, min(found.free, free), f"the control group {folder}")
        elif free < found.free:
            found = MemoryFound(found.total, free, found.limit)
    return MemoryFound(found.total, max(found.free, 0), found.limit)


def _system(root: Path) -> MemoryFound | None:
    lines = _lines(root / "proc/meminfo")
    held = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.split()}
    try:
        return MemoryFound(int(held["MemTotal"]) << 10, int(held["MemAvailable"]) << 10, "the machine's")
    except (KeyError, ValueError):
        pass
    try:
        found = importlib.import_module("psutil").virtual_memory()  # it comes with peft
    except (ImportError, OSError):
        return None
    return MemoryFound(int(found.total), int(found.available), "the machine's")


def _groups(root: Path) -> Iterator[tuple[int, int, str]]:
    """Limit, free bytes and folder of each memory control group that this process is in, of either version.

    A limit holds for all groups below it, so those above are asked as well, up to where the hierarchy is mounted: in a
    container that is the container's own group, under whatever name the host gave it.
    """
    for version, mounted_at, top in _mounts(root):
        relative = _inside(_own_group(root, version), top)
        for part in (relative, *relative.parents):
            folder = root / mounted_at.relative_to("/") / part
            if version == 2:
                limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
            else:
                limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
            if limit is not None and used is not None and limit < UNLIMITED:
                yield limit, limit - used + _reclaimable(folder / "memory.stat"), str(mounted_at / part)


def _mounts(root: Path) -> Iterator[tuple[int, PurePosixPath, str]]:
    """Version of the hierarchy, where it is mounted, and which group of it the mount shows as its top."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        words, kind = before.split(), after.split()
        if len(words) < 5 or len(kind) < 3 or not words[4].startswith("/"):
            continue
        if kind[0] == "cgroup2":
            yield 2, PurePosixPath(words[4]), words[3]
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            yield 1, PurePosixPath(words[4]), words[3]


def _own_group(root: Path, version: int) -> str:
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number == "0" and not controllers) if version == 2 else "memory" in controllers.split(","):
            return path
    return "/"


def _inside(path: str, top: str) -> PurePosixPath:
    try:
        relative = PurePosixPath(path).relative_to(top)
    except ValueError:  # the mount is this process's own group
        return PurePosixPath()
    return PurePosixPath() if ".." in relative.parts else relative


def _reclaimable(path: Path) -> int:
    """Bytes of files that are kept in memory until somebody needs it."""
    held = dict(line.split()[:2] for line in _lines(path) if len(line.split()) == 2)
    found = held.get("total_inactive_file", held.get("inactive_file", "0"))
    return int(found) if found.isdecimal() else 0


def _number(path: Path) -> int | None:
    words = (_lines(path) or [""])[0].strip()
    return int(words) if words.isdecimal() else None  # "max" is no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace", encoding="utf-8").splitlines()
    except OSError:
        return []
