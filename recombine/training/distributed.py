"""What the ranks of a run do together: wait, agree on a number, form a group and leave it.

A rank is one process on one device. Every rank computes the same run and only the first writes. What may come out
differently (a factorisation, a budget) the first rank computes, and the others load it from the state folder.
`recombine.runner.ranks` starts and ends the ranks.
"""

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch import Tensor

REPORT = "RECOMBINE_RANK_REPORT"  # environment: where a rank that `ranks.launch` started says how it ended
_group = None  # of the ranks, without a time limit: the first may factorise for hours


def rank() -> int:
    """This process's number among the ranks; 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def several() -> bool:
    """Whether this process is one of several ranks."""
    return count() > 1


def wait() -> None:
    """Waits until every rank is here."""
    if several():
        dist.barrier(_group)


def all_reduce_max(value: int, device: torch.device) -> int:
    """The largest of the values that the ranks call this with; every rank has to call it."""
    if not several():
        return value
    dist.all_reduce(all_of := torch.tensor(value, device=device), dist.ReduceOp.MAX)
    return int(all_of)


def follow_first(tensors: Iterable[Tensor]) -> None:
    """Gives every rank the first one's values, in place; every rank has to call it."""
    if several():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather(value: Any) -> list[Any]:
    """What every rank calls this with, in their order; every rank has to call it."""
    if not several():
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value, group=_group)
    return values


def cluster():
    """Lightning's environment: how ranks find each other, and who starts them."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if REPORT not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        return SLURMEnvironment(auto_requeue=False)  # submitit does that: recombine/training/resume.py
    return LightningEnvironment()


def init_group(trainer) -> None:
    """Makes this process a rank of the trainer's group, where there is one."""
    global _group
    trainer.strategy.setup_environment()
    if several():
        _group = dist.new_group(backend="gloo", timeout=timedelta(days=30))


def destroy_group() -> None:
    """Leaves the group, where there is one."""
    global _group
    if dist.is_initialized():
        dist.destroy_process_group()
    _group = None
