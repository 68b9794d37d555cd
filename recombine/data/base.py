"""What all data modules share: whole-number settings, plain loaders, a cache that one process builds at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import lightning
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from recombine.data.batch_sampler import Batches
from recombine.errors import UsageError
from recombine.runtime.assets import cache_dir, writing

SPLITS = ("train", "val", "test")


class DataModule(lightning.LightningDataModule):
    """A subclass sets `train`, `val` (None: nothing chooses, the last epoch counts) and `test`, and `batch_size`,
    `num_workers` and `seed`. Its datasets make whole batches: `__getitems__`."""

    start = (0, 0)  # (epoch, batch) of the training data where an interrupted run goes on

    def _loader(self, split: Dataset, batches: BatchSampler | None = None, start=(0, 0)) -> DataLoader:
        batches = batches or BatchSampler(SequentialSampler(split), self.batch_size, drop_last=False)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DataLoader(
            split,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_batch,
            batch_sampler=Batches(batches, self.seed, rank, world, start),
        )

    def train_dataloader(self) -> DataLoader:
        """Another order every epoch, the same ones for the same seed."""
        sampler = RandomSampler(self.train, generator=torch.Generator())
        return self._loader(self.train, BatchSampler(sampler, self.batch_size, drop_last=False), self.start)

    def val_dataloader(self) -> DataLoader | list:
        return [] if self.val is None else self._loader(self.val)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test)


class CachedModule(DataModule):
    """Data that is made once into a file."""

    def source(self):
        """Where the samples come from."""
        raise NotImplementedError

    def identity(self) -> str:
        """Changes when the samples, their labels or their split change; must be cheap."""
        raise NotImplementedError

    def check(self, digests: dict[str, str]) -> None:
        """Sees the sha256 of every whole split before anything is cached."""

    def prepare_data(self) -> None:
        if self._meta() is None:
            with building(self.path.stem):
                if self._meta() is None:  # still, and not built by another while this one waited
                    self._build()


def whole(least: int, **settings: Any) -> None:
    """Raises UsageError for a setting that is neither None nor a whole number from `least`."""
    for key, value in settings.items():
        if value is not None and (not isinstance(value, int) or value < least):
            raise UsageError(f"data.{key}={value!r} is no whole number from {least}: give one")


@contextmanager
def building(what: str) -> Iterator[None]:
    """Lets one process at a time through. The lock dies with its process."""
    with writing(folder := cache_dir() / "locks"):
        lock = FileLock(folder / f"{what}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            announce(f"{what}: another process builds it, waiting")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@cache
def announce(line: str) -> None:
    """Once a process, and of several ranks only the first."""
    if rank_zero_only.rank == 0:
        print(line, file=sys.stderr)


def _batch(batch):
    return batch  # __getitems__ made it one already
