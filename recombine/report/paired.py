"""Methods compared on the same test samples and the same seeds: bootstrap intervals, ranks with ties, wins and losses.

A run's `test_right` says which test samples it told right. Two methods with the same seed saw the same training data
in the same order, and all runs of a task the same test samples. So a resample draws seeds and samples once for all
methods, and a difference of two methods has a smaller error than either. Of S seeds it draws S - 1, which makes up for
the variance that few seeds seem not to have (Rao and Wu 1988). What seeds do not change, intervals do not hold for.
"""

import base64
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recombine.errors import UsageError
from recombine.report.records import Record

DRAWS = 2000
LEVEL = 0.95
NEMENYI = (  # quantile of the studentised range / sqrt(2) at 5 %, for 2, 3, ... methods
    *(1.960, 2.344, 2.569, 2.728, 2.850, 2.948, 3.031, 3.102, 3.164),
    *(3.219, 3.268, 3.313, 3.354, 3.391, 3.426, 3.458, 3.489, 3.517, 3.544),
)


def right(record: Record) -> np.ndarray:
    """Which test samples a run told right: (N,) of 0 and 1.

    Raises:
        UsageError: the run did not keep them.
    """
    packed, count = record.get("test_right"), (record.get("data.sizes") or {}).get("test")
    if packed is None or count is None:
        raise UsageError(f"{record.cell}: its result has no test_right; run it again with retry=true")
    return np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8), count=count)


@dataclass(frozen=True)
class Difference:
    """How much more accurate one method is than another, in shares of the test samples, with an interval of LEVEL."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """win, loss, or tie where the interval holds 0."""
        return "win" if self.low > 0 else "loss" if self.high < 0 else "tie"


class Paired:
    """Accuracies of some methods over the same tasks and seeds, with resamples of both.

    Args:
        runs: method -> (task, seed) -> which of the task's samples are told right, (N,).
        draws: number of resamples.

    Raises:
        UsageError: two methods have other tasks, seeds or numbers of samples.
    """

    def __init__(self, runs: Mapping[str, Mapping[tuple[str, int], np.ndarray]], draws: int = DRAWS):
        self.methods = list(runs)
        cells = {method: {key: len(value) for key, value in runs[method].items()} for method in runs}
        first = self.methods[0]
        for method in self.methods:
            if cells[method] != cells[first]:
                raise UsageError(f"{method} and {first} have not the same tasks, seeds and test samples")
        rng = np.random.default_rng(0)
        self.tasks = list(dict.fromkeys(task for task, _ in cells[first]))
        self.seeds = {task: [seed for name, seed in cells[first] if name == task] for task in self.tasks}
        self.cells: dict[tuple[str, int], dict[str, float]] = {
            key: {method: float(runs[method][key].mean()) for method in runs} for key in cells[first]
        }
        self.by_task: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # means (methods,) and resamples (draws, methods)
        for task, seeds in self.seeds.items():
            told = np.stack([[runs[method][task, seed] for seed in seeds] for method in runs]).astype(np.float32)
            count = told.shape[-1]
            samples = rng.multinomial(count, np.full(count, 1 / count), draws).astype(np.float32)  # (draws, N)
            size = max(1, len(seeds) - 1)
            drawn = rng.multinomial(size, np.full(len(seeds), 1 / len(seeds)), draws)  # (draws, seeds)
            scores = told @ samples.T / count  # (methods, seeds, draws)
            self.by_task[task] = told.mean((1, 2)), np.einsum("msd,ds->dm", scores, drawn) / size
        self.mean, self.resampled = (np.mean(parts, 0) for parts in zip(*self.by_task.values(), strict=True))

    def accuracy(self, method: str, task: str | None = None) -> Difference:
        """The mean over a task's seeds, or over tasks and seeds, with its interval: how far it is above 0."""
        return self._interval(lambda scores: scores[..., self.methods.index(method)], task)

    def difference(self, one: str, other: str, task: str | None = None) -> Difference:
        """How much more accurate `one` is than `other`, on a task, or in the mean over the tasks."""
        i, j = self.methods.index(one), self.methods.index(other)
        return self._interval(lambda scores: scores[..., i] - scores[..., j], task)

    def _interval(self, of: Callable[[np.ndarray], np.ndarray], task: str | None = None) -> Difference:
        mean, resampled = (self.mean, self.resampled) if task is None else self.by_task[task]
        low, high = np.quantile(of(resampled), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Difference(float(of(mean)), float(low), float(high))

    def level_with_best(self) -> list[str]:
        """The best method and those whose difference from it has 0 in its interval, the best first."""
        order = sorted(self.methods, key=lambda method: -self.mean[self.methods.index(method)])
        return [method for method in order if self.difference(order[0], method).verdict != "win"]

    def ranks(self) -> dict[str, float]:
        """Mean rank over the cells of task and seed, 1 the best; equal accuracies share their ranks."""
        ranks = np.mean([shared_ranks([-cell[m] for m in self.methods]) for cell in self.cells.values()], 0)
        return dict(zip(self.methods, ranks.tolist(), strict=True))

    def critical_difference(self) -> float:
        """By how much two mean ranks have to differ to be told apart (Nemenyi's test at 5 %, Demsar 2006).

        It takes the cells for independent, which seeds of one task are not: read it as a lower bound.

        Raises:
            UsageError: there is one method only, or there are more than 20.
        """
        if not 2 <= (k := len(self.methods)) <= len(NEMENYI) + 1:
            raise UsageError(f"{k} methods: a critical difference is for 2 to {len(NEMENYI) + 1}")
        return NEMENYI[k - 2] * (k * (k + 1) / (6 * len(self.cells))) ** 0.5


def shared_ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1 for the smallest; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    place = 0
    for _, same in itertools.groupby(order, key=values.__getitem__):
        same = list(same)
        for i in same:
            ranks[i] = place + (len(same) + 1) / 2
        place += len(same)
    return ranks
