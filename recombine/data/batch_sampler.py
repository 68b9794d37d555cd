"""Batches that depend on the seed and the epoch alone, so that a run can stop anywhere and several ranks share them."""

import hashlib
from collections.abc import Iterator

from torch.utils.data import BatchSampler, Sampler


def seed_of(*what) -> int:
    """A seed in 64 bits for anything that can be written down."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "little", signed=True)


class ShardedBatchSampler(Sampler[list[int]]):
    """What a batch sampler yields, cut to the rows of this rank.

    Every epoch is drawn from (seed, epoch); without `set_epoch` the epochs follow each other. Each batch is divided:
    rank r takes rows r, r + world, ... of it, so `data.batch_size` is that of the run and no row comes twice. Where a
    batch has fewer rows than there are ranks, those left empty-handed get its first row, and `empty_shard` says so.

    Args:
        inner: yields the row numbers of the whole run's batches.
        seed: of the run.
        rank, world: this process and how many share a batch.
        start: (epoch, batch) where an interrupted run goes on; `len` still counts whole epochs.
    """

    def __init__(self, inner: BatchSampler, seed: int, rank: int = 0, world: int = 1, start: tuple[int, int] = (0, 0)):
        self.inner, self.seed, self.rank, self.world, self.start = inner, seed, rank, world, start
        self.sampler = self  # Lightning calls loader.batch_sampler.sampler.set_epoch
        self.epoch, self.sizes = start[0], []

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is of this epoch. Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        if (generator := getattr(self.inner.sampler, "generator", None)) is not None:
            generator.manual_seed(seed_of(self.seed, epoch))
        batches = list(self.inner)
        self.sizes = [len(batch) for batch in batches]
        for batch in batches[self.start[1] if epoch == self.start[0] else 0 :]:
            yield batch[self.rank :: self.world] or batch[:1]

    def empty_shard(self, index: int) -> bool:
        """Whether this rank's part of the epoch's batch with that index is not its own and counts for nothing."""
        return self.sizes[index] <= self.rank
