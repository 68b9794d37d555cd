"""Batches follow seed and epoch, and are divided among ranks without a rest."""

import torch
from torch.utils.data import BatchSampler, RandomSampler

from recombine.data.batch_sampler import ShardedBatchSampler


def sampled(length: int, batch_size: int, **kwargs) -> ShardedBatchSampler:
    rows = RandomSampler(range(length), generator=torch.Generator())
    return ShardedBatchSampler(BatchSampler(rows, batch_size, drop_last=False), 3, **kwargs)


def test_batches_follow_seed_and_epoch_and_are_divided_without_a_rest():
    epochs = [list(sampled(21, 4)) for _ in range(2)]
    assert epochs[0] == epochs[1] and sorted(sum(epochs[0], [])) == list(range(21))
    loader = sampled(21, 4)
    first, second = list(loader), list(loader)
    assert first == epochs[0] != second
    loader.set_epoch(1)
    assert list(loader) == second and len(loader) == 6
    resumed = sampled(21, 4, start=(1, 4))
    assert list(resumed) == second[4:] and list(resumed) != second and len(resumed) == 6
    ranks = [sampled(21, 4, rank=r, world=3) for r in range(3)]
    parts = [list(rank) for rank in ranks]
    for i, batch in enumerate(first):
        mine = [part[i] for part, rank in zip(parts, ranks, strict=True) if not rank.empty_shard(i)]
        assert sorted(sum(mine, [])) == sorted(batch) and all(part[i] for part in parts)
    assert [rank.empty_shard(5) for rank in ranks] == [False, True, True]  # one row is left for three
