"""What a task hands to ``VisionData``: classes, licence, and per split the pictures and their labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SIZES = {"train": 800, "val": 200, "test": 1000}  # VTAB-1K's form; test sets may be smaller


@dataclass(frozen=True)
class Lazy:
    """Pictures made when asked for: ``make(items[i])`` is uint8 (H, W) or (H, W, 3)."""

    make: Callable[[Any], np.ndarray]
    items: Sequence

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.make(self.items[index])


@dataclass(frozen=True)
class Source:
    classes: list[str]
    licence: str
    splits: dict[str, tuple[Sequence[np.ndarray], np.ndarray]]  # pictures and their int64 labels
    note: str = ""


def shuffled(count: int, seed: int) -> np.ndarray:
    """A permutation that no numpy version changes: the order of ``count`` draws of PCG64."""
    return np.argsort(np.random.Generator(np.random.PCG64(seed)).random(count), kind="stable")


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """``count`` indices in random order, every class in its share (largest remainders, the lower class at a tie)."""
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
