"""experiments/leaderboard: figures and the page's tables, from the runs of leaderboard/joint and leaderboard/adapt.

    python -m recombine.report leaderboard/joint --save && python scripts/leaderboard.py

Compared are the tasks and seeds that every row of a budget has run. A row with less than half of the others is left out
and named, and so is a task with fewer than three seeds where another has them. Intervals are over seeds and test
pictures; the training pictures are the same for all seeds. Nothing here imports torch.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt

from recombine import report
from recombine.report import words
from recombine.report.paired import Paired, right
from recombine.report.plot_drawing import STYLE
from recombine.report.plots import as_svg
from recombine.report.records import EVIDENCE, Record

sys.path.insert(0, str(EVIDENCE.parent))  # python scripts/leaderboard.py has its own folder there
from scripts.leaderboard_figures import AT_ONCE, against_bytes, differences, figure  # noqa: E402

FOLDER = EVIDENCE / "leaderboard"
FEW = 3  # seeds below which nothing is decided
COLUMNS = {  # what a table shows of a method beside its accuracy: heading -> (path in a record, factor, digits)
    "MiB of weights": ("account.bytes_weights", 2**-20, 1),
    "trained (k)": ("account.trained_without_head", 1e-3, 0),
    "MiB to train it": ("account.memory_mib", 1, 1),
    "seconds": ("seconds.total", 1, 0),
}


@dataclass
class Board:
    """The methods of one budget, on the cells that all of them have. missing: rows that have too few or no runs."""

    budget: str
    records: dict[str, list[Record]]  # by method
    paired: Paired
    missing: list[str]  # and tasks

    @property
    def order(self) -> list[str]:
        """The methods, the best first."""
        return sorted(self.paired.methods, key=lambda method: -self.paired.accuracy(method).mean)

    def best(self, at_once: bool) -> str | None:
        """The best of those that work at once, or of the chains, by validation; None: there is none."""
        return max(
            (method for method in self.order if (method in AT_ONCE) == at_once),
            key=lambda method: self.mean(method, "val.acc"),
            default=None,
        )

    @property
    def decides(self) -> bool:
        """Whether there are seeds enough for a verdict."""
        return min(map(len, self.paired.seeds.values())) >= FEW

    @property
    def heading(self) -> str:
        """What was compared."""
        tasks = ", ".join(words.label("data.task", task) for task in self.paired.tasks)
        seeds = min(map(len, self.paired.seeds.values()))
        rest = f"; too few runs of {', '.join(self.missing)}" if self.missing else ""
        return f"{words.budget(self.budget)}: {tasks}, {seeds} seed{'s' * (seeds > 1)}{rest}"

    def mean(self, method: str, path: str) -> float:
        """The mean of a value over the method's runs."""
        values = [record.get(path) for record in self.records[method]]
        return sum(values) / len(values)


def boards(methods: Sequence[str], records: Iterable[Record]) -> list[Board]:
    """A board for each budget of the records of which these methods, or most of them, have a run in common."""
    found: dict[str, dict[str, dict[tuple[str, int], Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        cell = record.get("data.task"), record.get("seed")
        found[record.get("budget")][record.labels["method"]][cell] = record
    made = []
    for budget, runs in found.items():
        most = max(map(len, runs.values()))
        run = [method for method in methods if 2 * len(runs.get(method, ())) >= most]
        common = sorted(set.intersection(*(set(runs[method]) for method in run)))
        seeds = Counter(task for task, _ in common)
        few = [task for task, count in seeds.items() if count < FEW <= max(seeds.values())]
        common = [(task, seed) for task, seed in common if task not in few]
        if len(run) > 1 and common:
            told = {method: {cell: right(runs[method][cell]) for cell in common} for method in run}
            kept = {method: [runs[method][cell] for cell in common] for method in run}
            missing = [method for method in methods if method not in run]
            made.append(Board(budget, kept, Paired(told), missing + [words.label("data.task", task) for task in few]))
    return made


def share(value: float) -> str:
    """A share as per cent."""
    return f"{100 * value:.1f}"


def table(board: Board, chains: bool = True) -> str:
    """The board as Markdown. What is level with the best is bold.

    Args:
        chains: what is not of `AT_ONCE` is a chain.
    """
    paired, level = board.paired, board.paired.level_with_best()
    ranks = paired.ranks()
    head = ["method", *(words.label("data.task", task) for task in paired.tasks), "mean (95 %)", "mean rank", *COLUMNS]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in board.order:
        i, found = paired.methods.index(method), paired.accuracy(method)
        tasks = [share(paired.by_task[task][0][i]) for task in paired.tasks]
        mean = share(found.mean)
        mean = f"**{mean}**" if method in level else mean
        costs = [f"{board.mean(method, path) * by:,.{digits}f}" for path, by, digits in COLUMNS.values()]
        if not board.mean(method, "account.trained"):  # it trained before it was compressed
            costs[1:3] = ["—", "—"]
        kind = " (chain)" if chains and method not in AT_ONCE else ""
        cells = [
            method + kind,
            *tasks,
            f"{mean} ({share(found.low)} to {share(found.high)})",
            f"{ranks[method]:.1f}",
            *costs,
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def verdicts(board: Board) -> str:
    """How often each that works at once wins against the best chain, ties with it and loses, by task, as Markdown."""
    chain, at_once = board.best(at_once=False), [m for m in board.order if m in AT_ONCE]
    if chain is None or not at_once:
        return ""
    rows = [
        f"| against {chain} | difference (95 %) | "
        + " | ".join(words.label("data.task", t) for t in board.paired.tasks)
        + " | wins / ties / losses |"
    ]
    rows.append("|---" * (3 + len(board.paired.tasks)) + "|")
    for method in at_once:
        whole = board.paired.difference(method, chain)
        parts = [board.paired.difference(method, chain, task).verdict for task in board.paired.tasks]
        says = f"{100 * whole.mean:+.1f} ({100 * whole.low:+.1f} to {100 * whole.high:+.1f})"
        parts = parts if board.decides else ["—"] * len(parts)
        counted = " / ".join(str(parts.count(kind)) for kind in ("win", "tie", "loss"))
        rows.append("| " + " | ".join([method, says, *parts, counted if board.decides else "—"]) + " |")
    return "\n".join(rows)


def finding(board: Board) -> str:
    """One sentence: the best that works at once against the best chain, both chosen by validation."""
    one, chain = board.best(True), board.best(False)
    if one is None or chain is None:
        return "only one of the two sides has run."
    found = board.paired.difference(one, chain)
    words_for = {"win": "is ahead of", "tie": "is level with", "loss": "is behind"}[found.verdict]
    words_for = words_for if board.decides else "has too few seeds to be told apart from"
    size = f"{100 * found.mean:+.1f} points, 95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return f"{words.budget(board.budget)}: {one} {words_for} the best chain, {chain} ({size})."


def load(name: str) -> list[Board]:
    """The boards of an experiment."""
    runs = report.load(name).runs
    return boards(list(dict.fromkeys(cell["method"] for cell in runs.cells)), runs.records)


def main() -> None:
    """Writes the figures and prints the tables and findings that the README holds."""
    if not (found := load("leaderboard/joint")):
        sys.exit("leaderboard: no task and seed that two methods have run; python run.py experiment=leaderboard/joint")
    adapters = load("leaderboard/adapt")
    with plt.rc_context(STYLE):
        drawn = {"joint": figure(found), "ranks": differences(found)}
        if adapters:
            drawn["adapt"] = figure(adapters)
        if len(found) > 1 and set.intersection(*(set(board.paired.tasks) for board in found)):
            drawn["bytes"] = against_bytes(found)
        for name, made in drawn.items():
            (FOLDER / f"{name}.svg").write_text(as_svg(made, name), encoding="utf-8")
    for board in found:
        print(f"\n### {board.heading}\n\n{finding(board)}\n\n{table(board)}\n\n{verdicts(board)}")
    for board in adapters:
        print(f"\n### {board.heading}\n\n{table(board, chains=False)}")


if __name__ == "__main__":
    main()
