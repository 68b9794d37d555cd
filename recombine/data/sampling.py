"""Seeded cuts of a data set that no version of numpy changes: they are part of what a result is about."""

from __future__ import annotations

import math
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


def cut_sizes(known: dict[str, int], pooled: bool, share: float, holdout: float, merged: bool) -> dict[str, int]:
    """How many rows each split has once a set is cut: a stratified cut keeps its counts but for rounding.

    Args:
        known: rows of the set's own splits, train, test and perhaps val.
        pooled: all splits together, of which a fifth is test.
        share: of train that is used.
        holdout: share of train for val, where the set has none.
        merged: train and val train together.
    """
    total, own = sum(known.values()), None if pooled else known.get("val")
    test = round(0.2 * total) if pooled else known["test"]
    train = total - test if pooled else math.ceil(share * known["train"])
    val = round(holdout * train) if own is None else own
    train -= val * (own is None)
    return {"train": train + val, "test": test} if merged else {"train": train, "val": val, "test": test}
