"""Pairs of rows in the paper's order: how many, how many by chance, and which are clearly not."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from helpers.report_runs import METHODS, SCORES, SPEC, TAB07, entries, runs
from recombine.report import table
from recombine.report.agreement import clear, count
from recombine.report.paper import Number
from recombine.report.records import Record, Runs
from recombine.report.table_data import Entry, Measure, Row


def counted(ours, theirs):
    """Concordant pairs, an equal pair of ours half."""
    pairs = [(i, j) for i, j in itertools.combinations(range(len(ours)), 2) if theirs[i] != theirs[j]]
    return sum(0.5 * (1 + np.sign((ours[i] - ours[j]) * (theirs[i] - theirs[j]))) for i, j in pairs), len(pairs)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ([1, 2, 3, 4, 5], [3, 1, 2, 5, 4]),
        ([1, 1, 2, 3, 3, 3], [1, 2, 2, 4, 5, 6]),
        ([1, 2, 2, 2, 1], [3, 3, 3, 1, 1]),
        ([1, 2], [1, 1]),
        ([7], [7]),
    ],
)
def test_chance_is_every_order_of_our_numbers(ours, theirs):
    """Mean and deviation over all orders, ties on both sides included."""
    every = [counted(order, theirs)[0] for order in itertools.permutations(ours)]
    same, pairs, mean, deviation = count([list(zip(ours, theirs, strict=True))])
    assert (same, pairs) == counted(ours, theirs)
    assert mean == pytest.approx(np.mean(every)) and deviation == pytest.approx(np.std(every), abs=1e-12)


def test_blocks_are_shuffled_apart():
    rows = [(1.0, 2.0), (2.0, 1.0), (3.0, 4.0)]
    one, two = count([rows]), count([rows, rows])
    assert two[:3] == tuple(2 * x for x in one[:3]) and two[3] == pytest.approx(2**0.5 * one[3])


def test_twelve_rows_have_33_of_66_by_chance():
    _, pairs, mean, deviation = count([[(i, i) for i in range(12)]])
    assert (pairs, mean) == (66, 33) and deviation == pytest.approx(7.3, abs=0.05)


def row(name, ours, theirs, n=3, spread=1.0, error=2.0):
    return Row((name,), (name,), []), Entry(ours, spread, n, n, error, Number(str(theirs), theirs, ""))


@pytest.mark.parametrize(
    "change, found",
    [({}, ["B over A"]), ({"mean": 45.9}, []), ({"n": 2}, []), ({"error": None}, []), ({"error": 2.2}, [])],
    ids=str,
)
def test_clear_is_beyond_seeds_and_the_test_set(change, found):
    """46.1 is behind by 6.1, more than 1 + 1 of the seeds and 2 + 2 of the test set."""
    (a, high), (b, low) = row("A", 40.0, 90.0), row("B", 46.1, 80.0)
    assert clear([(a, high), (b, replace(low, **change))]) == found


def test_the_error_of_a_test_set_is_binomial():
    share = Measure("top-1", "test.{metric}", 100.0)
    result = {"metric": "acc", "test": {"acc": 0.4, "x": 0.4}, "data": {"sizes": {"test": 300}}}
    assert share.error(Record({}, result, "x")) == pytest.approx(100 * (0.4 * 0.6 / 300) ** 0.5)
    assert share.error(Record({}, result, "x")) == pytest.approx(2.8, abs=0.05)
    assert share.error(Record({}, result | {"data": {}}, "x")) is None
    assert Measure("x", "test.x").error(Record({}, result, "x")) is None
    assert Measure("x", "test.x").of(Record({}, {"test": {"x": 10**400}}, "x")) is None
    harness = {"test": {"arc/acc": 0.5, "arc/acc_stderr": 0.07}}
    assert Measure("arc", "test.arc/acc", 100.0).error(Record({}, harness, "x")) == pytest.approx(7)


def test_errors_of_tasks_add_as_squares_and_seeds_do_not_help():
    made = table.build("x", SPEC, runs(data=lambda c: {"sizes": {"test": 100}}))
    found = entries(made, "LoRA")
    each = [found[task].error for task in "abc"]
    shares = [np.mean([(p * (1 - p) / 100) ** 0.5 for p in by_seed]) for by_seed in SCORES[METHODS.index("LoRA")]]
    assert each == pytest.approx([100 * s for s in shares])
    assert found["ab"].error == pytest.approx(np.hypot(*each[:2]) / 2)
    assert found["groups"].error == pytest.approx(np.hypot(found["ab"].error, each[2]) / 2)
    assert found["mean"].error == pytest.approx(np.linalg.norm(each) / 3)


def test_two_seeds_are_said_to_be_too_few():
    paper = {"file": TAB07, "where": {"metric": "top1"}, "columns": {"a": "CIFAR-100"}}
    two = runs(lambda c: c["seed"] != "2", data=lambda c: {"sizes": {"test": 10**6}})
    made = table.build("x", SPEC | {"paper": paper}, Runs(two.records, [c for c in two.cells if c["seed"] != "2"], {}))
    assert "No pair of a is called clear: that takes 3 seeds, and here are 2." in made.notes
