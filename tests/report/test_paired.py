"""Paired comparisons: intervals that cover, ranks with ties, and the published constants."""

import base64

import numpy as np
import pytest
from scipy.stats import rankdata, studentized_range

from helpers import refusal
from recombine.report.paired import NEMENYI, Paired, right, shared_ranks
from recombine.report.records import Record

SEEDS, COUNT = 5, 400


def runs(gains: dict[str, float], rng: np.random.Generator, noise: float = 0.02, own: float = 0.0) -> dict:
    """Methods whose accuracies differ by `gains`, on samples that are hard for all, with seeds that all share.

    own: how much a seed moves each method by itself.
    """
    hard, luck = rng.random(COUNT), rng.normal(0, noise, SEEDS)
    alone = {method: rng.normal(0, own, SEEDS) for method in gains}
    flips = {method: rng.random((SEEDS, COUNT)) for method in gains}
    return {
        method: {
            ("task", seed): (
                0.7 * hard + 0.3 * flips[method][seed] < 0.5 + gain + luck[seed] + alone[method][seed]
            ).astype(np.uint8)
            for seed in range(SEEDS)
        }
        for method, gain in gains.items()
    }


@pytest.mark.parametrize("own", [0.0, 0.03])
def test_intervals_hold_the_truth_about_as_often_as_they_say(own):
    held = 0
    for trial in range(100):
        told = runs({"a": 0.0, "b": 0.0}, np.random.default_rng(trial), own=own)
        found = Paired(told, draws=300).difference("a", "b")
        held += found.low <= 0 <= found.high
    assert 88 <= held <= 100


def test_a_paired_difference_is_told_where_single_intervals_overlap():
    paired = Paired(runs({"a": 0.06, "b": 0.0, "c": 0.001}, np.random.default_rng(1), noise=0.1))
    a, b = paired.accuracy("a"), paired.accuracy("b")
    assert a.low < b.high  # seeds move both together
    assert paired.difference("a", "b").verdict == "win" and paired.difference("b", "a").verdict == "loss"
    assert paired.difference("b", "c").verdict == "tie" and paired.level_with_best() == ["a"]
    mean = np.mean([paired.cells["task", s]["a"] for s in range(SEEDS)])
    assert a.mean == pytest.approx(mean) and a.low < mean < a.high


def test_tasks_count_alike_whatever_their_size():
    cells = {("small", 0): np.ones(10, np.uint8), ("large", 0): np.zeros(1000, np.uint8)}
    paired = Paired({"a": cells, "b": cells}, draws=10)
    assert paired.accuracy("a").mean == 0.5 and paired.difference("a", "b", "small").verdict == "tie"


def test_ranks_share_ties():
    values = [0.2, 0.1, 0.2, 0.4]
    assert shared_ranks(values) == rankdata(values).tolist() == [2.5, 1, 2.5, 4]


def test_critical_differences_are_nemenyis():
    for k, q in enumerate(NEMENYI, 2):
        assert q == pytest.approx(studentized_range.ppf(0.95, k, np.inf) / 2**0.5, abs=1e-3)
    told = runs({"a": 0.1, "b": 0.0}, np.random.default_rng(0))
    assert Paired(told, 10).critical_difference() == pytest.approx(1.96 * (2 * 3 / (6 * SEEDS)) ** 0.5)


def test_a_record_says_which_samples_were_right():
    bits = np.random.default_rng(0).integers(0, 2, 13).astype(np.uint8)
    told = {"test_right": base64.b64encode(np.packbits(bits).tobytes()).decode(), "data": {"sizes": {"test": 13}}}
    assert right(Record({}, told, "x")).tolist() == bits.tolist()
    assert "x: its result has no test_right" in refusal(right, Record({}, {"data": {"sizes": {"test": 3}}}, "x"))


def test_methods_with_other_seeds_are_not_compared():
    cells = {("task", 0): np.ones(4, np.uint8)}
    line = refusal(Paired, {"a": cells, "b": {("task", 1): np.ones(4, np.uint8)}})
    assert "b and a have not the same tasks, seeds and test samples" in line
