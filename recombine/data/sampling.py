"""Seeded cuts of a data set that no version of numpy changes: they are part of what a result is about."""

from __future__ import annotations

from typing import Any

import numpy as np


def shuffled(count: int, seed: int) -> np.ndarray:
    """A permutation of 0 .. count - 1, int64 (count,): the order of ``count`` draws of PCG64."""
    return np.argsort(np.random.Generator(np.random.PCG64(seed)).random(count), kind="stable")


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """``count`` indices in random order, every class in its share (largest remainders, the lower class at a tie).

    ``labels`` are int64 (N,) from 0; the result is int64 (count,).
    """
    sizes = np.bincount(labels)
    exact = sizes * count / len(labels)
    quota = np.floor(exact).astype(int)
    quota[np.argsort(quota - exact, kind="stable")[: count - quota.sum()]] += 1
    order = shuffled(len(labels), seed)
    rank = np.empty(len(labels), int)  # of each item among those of its class
    for label in np.flatnonzero(sizes):
        mine = order[labels[order] == label]
        rank[mine] = np.arange(len(mine))
    return order[rank[order] < quota[labels[order]]]


def held_out(rows: list[Any], seed: int, count: int = 120) -> dict[str, list[Any]]:
    """``count`` rows each for val and test, a tenth each of small sets; the rest trains. All in seeded order."""
    count = min(count, len(rows) // 10)
    order = shuffled(len(rows), seed).tolist()
    parts = {"train": order[2 * count :], "val": order[:count], "test": order[count : 2 * count]}
    return {split: [rows[i] for i in indices] for split, indices in parts.items()}
