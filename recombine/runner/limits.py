"""What this machine cannot do is refused before it starts: processes beyond its cores, pictures beyond its memory."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from recombine.data.base import DataModule
from recombine.errors import UsageError
from recombine.runtime.threads import cores
from recombine.training import distributed

LEAST_RANKS = 2  # that any machine may run, to try it
WORKERS_A_CORE = 4  # processes that load data; more only wait for each other
GIB = 2**30
CGROUP = Path("/sys/fs/cgroup/memory.max")  # the share of the memory that a container has


def memory() -> int:
    """The bytes of memory that this process may use, as far as the system tells."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    return min(installed, int(limit)) if limit.isdigit() else installed


def require_cores(ranks: int) -> None:
    """Refuses more ranks on a CPU than it has cores.

    Raises:
        UsageError: says how many there may be.
    """
    if ranks > (most := max(LEAST_RANKS, cores())):
        raise UsageError(
            f"trainer.devices={ranks}: this machine has {cores()} cores; say trainer.devices={most} or less"
        )


def require_accelerator(name: str) -> None:
    """Refuses a kind of device that torch does not see.

    Raises:
        UsageError: there is none of that kind.
    """
    seen = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not (seen | {"gpu": any(seen.values())}).get(name, True):
        raise UsageError(f"trainer.accelerator={name}: torch sees none here; say trainer.accelerator=auto, or cpu")


def require_workers(workers: int) -> None:
    """Refuses more processes that load data than a few a core. workers: of each rank.

    Raises:
        UsageError: says how many there may be.
    """
    ranks, most = dist.get_world_size() if distributed.several() else 1, WORKERS_A_CORE * cores()
    if workers * ranks > most:
        each = f", {ranks} ranks with as many each" if ranks > 1 else ""
        why = f"this machine has {cores()} cores{each}"
        raise UsageError(f"data.num_workers={workers}: {why}; say data.num_workers={most // ranks} or less")


def require_batch(data: DataModule) -> None:
    """Refuses a batch of pictures that does not fit into the memory.

    Raises:
        UsageError: says what it takes and what there is.
    """
    size = getattr(data, "image_size", None)
    if size is None or not isinstance(data.batch_size, int):
        return
    pictures = min(data.batch_size, len(data.train))
    if (takes := pictures * 3 * size**2 * 4) > memory():  # float32, three colours
        what = f"{pictures} pictures of {size} x {size} take {takes / GIB:.1f} GiB"
        raise UsageError(
            f"data.batch_size={data.batch_size}: {what}, this machine has {memory() / GIB:.1f} GiB; lower it"
        )
