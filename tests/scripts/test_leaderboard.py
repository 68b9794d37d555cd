"""The leaderboard's tables: what they decide, what they leave out, and that the page holds what the script prints."""

import base64

import numpy as np
import pytest

from recombine.report.records import EVIDENCE, Record
from scripts import leaderboard as script
from scripts import leaderboard_figures as figures

ROWS = {"CRISP": 0.7, "JACTUS": 0.6, "SVD-LLM + LoRA": 0.5, "BALF + LoRA": 0.5}  # and how much each tells right


def record(
    method: str, task: str, seed: int, val: float | None = None, count: int = 2000, budget: str = "bytes_50"
) -> Record:
    """A run that was never made."""
    told = np.random.default_rng([seed, *map(ord, method + task)]).random(count) < ROWS[method]
    result = {
        "cell": f"{budget},{method},{task},{seed}",
        "budget": budget,
        "seed": seed,
        "val": {"acc": ROWS[method] if val is None else val},
        "test_right": base64.b64encode(np.packbits(told)).decode(),
        "data": {"task": task, "sizes": {"test": count}},
        "account": {
            "bytes_weights": 2**20 * int(budget[-2:]),
            "trained_without_head": 1000,
            "memory_mib": 3.0,
            "trained": 1000,
        },
        "seconds": {"total": 60.0},
    }
    return Record({"method": method}, result, result["cell"])


def made(seeds: dict[str, int], skip: tuple[str, ...] = (), **val: float) -> script.Board:
    records = [
        record(method, task, seed, val.get(method))
        for method in ROWS
        for task, count in seeds.items()
        for seed in range(count)
        if method not in skip or seed == 0
    ]
    (found,) = script.boards(list(ROWS), records)
    return found


def test_three_seeds_decide():
    board = made({"dsprites_loc": 3, "fashion_mnist": 3})
    assert board.order[:2] == ["CRISP", "JACTUS"] and board.best(at_once=True) == "CRISP" and not board.missing
    shown = script.verdicts(board).splitlines()
    assert [line.split(" | ")[-1] for line in shown[2:]] == ["2 / 0 / 0 |"] * 2 and "| win | win |" in shown[2]
    assert "CRISP is ahead of the best chain" in script.finding(board)
    first, second = script.table(board).splitlines()[2:4]
    assert first.startswith("| CRISP | ") and "| **" in first and "**" not in second and "| 1.0 | 50.0 | 1 |" in first


def test_two_seeds_decide_nothing():
    board = made({"dsprites_loc": 2})
    assert all(line.endswith("| — | — |") for line in script.verdicts(board).splitlines()[2:])
    assert "has too few seeds to be told apart" in script.finding(board) and "2 seeds" in board.heading


def test_what_has_too_few_runs_is_left_out_and_named():
    board = made({"dsprites_loc": 3}, skip=("BALF + LoRA",))
    assert board.order == ["CRISP", "JACTUS", "SVD-LLM + LoRA"] and board.missing == ["BALF + LoRA"]
    board = made({"dsprites_loc": 3, "fashion_mnist": 1})
    assert board.paired.tasks == ["dsprites_loc"] and board.heading.endswith("too few runs of Fashion-MNIST")
    assert script.boards(list(ROWS), [record("CRISP", "dsprites_loc", 0)]) == []


def test_the_best_of_a_side_is_the_one_that_validation_chooses():
    board = made({"dsprites_loc": 3}, **{"BALF + LoRA": 0.9, "JACTUS": 0.9})
    assert board.best(at_once=True) == "JACTUS" and board.best(at_once=False) == "BALF + LoRA"
    board = made({"dsprites_loc": 3})
    assert all(len(made.axes) == 1 for made in (script.figure([board]), script.differences([board])))


@pytest.mark.parametrize("part", [script.table, script.verdicts])
def test_the_page_holds_the_tables_of_the_committed_runs(part):
    page = (EVIDENCE / "leaderboard/README.md").read_text()
    assert (boards := script.load("leaderboard/joint")) and all(part(board) in page for board in boards)


def test_accuracy_against_bytes_is_of_the_tasks_that_all_budgets_have():
    both = [("bytes_50", "dsprites_loc"), ("bytes_50", "fashion_mnist"), ("bytes_25", "dsprites_loc")]
    records = [
        record(method, task, seed, budget=budget)
        for budget, task in both
        for method in ROWS
        for seed in range(3)
        if (budget, method) != ("bytes_25", "BALF + LoRA")
    ]
    found = script.boards(list(ROWS), records)
    (ax,) = figures.against_bytes(found).axes
    assert ax.get_title() == "dSprites location"
    assert {text.get_text() for text in ax.texts} == {*ROWS} and len(ax.containers) == 4
    assert len({text.xy[1] for text in ax.texts}) == 4 and figures.apart([0, 0, 5], 1) == [0, 1, 5]
