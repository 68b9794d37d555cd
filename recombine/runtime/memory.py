"""Sizes in bytes as words such as 8gb, and the memory that is free."""

import os
import re
from pathlib import Path

import torch

from recombine.errors import UsageError

UNITS = {"kb": 2**10, "mb": 2**20, "gb": 2**30, "tb": 2**40}
PATTERN = r"^(auto|\d+(\.\d+)?([kmgt]b))$"  # of a word
CGROUP = Path("/sys/fs/cgroup")  # the share of the memory that a container has


def parse(word: object, key: str) -> int | None:
    """The bytes of a word: 8gb is 8 * 2^30. None for auto.

    Args:
        key: what an error calls it, for example "calibration.memory".

    Raises:
        UsageError: no such word.
    """
    match = re.fullmatch(PATTERN, word) if isinstance(word, str) else None
    if match is None:
        raise UsageError(f"{key}={word!r}: must be a size such as 8gb or 500mb, or auto")
    return None if word == "auto" else int(float(word[:-2]) * UNITS[word[-2:]])


def shown(size: float) -> str:
    """The word of a number of bytes, rounded up so that it can be typed: 1.3gb."""
    unit = next((unit for unit in ("gb", "mb") if size >= UNITS[unit]), "kb")
    return f"{-(-size * 10 // UNITS[unit]) / 10:g}{unit}"


def free(device: torch.device) -> int:
    """The bytes that this process can still take where that device's tensors lie."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return min(of_machine(), of_container())


def of_machine() -> int:
    """The bytes that the system says are available; half of the memory where it does not say."""
    try:
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable:"))
        return 1024 * int(line.split()[1])
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def of_container() -> float:
    """The bytes that the container's limit leaves; infinity without a limit. Cached files can go."""
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return int(limit) - int(used) + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return float("inf")
