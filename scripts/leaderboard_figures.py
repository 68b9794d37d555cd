"""The figures of scripts/leaderboard.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from recombine.report import words
from recombine.report.plot_drawing import COLOURS

if TYPE_CHECKING:
    from scripts.leaderboard import Board

AT_ONCE = ("CRISP", "JACTUS", "CERSA", "SVD + its values")


def panels_of(found: list[Board]) -> tuple[Figure, Iterable]:
    """A figure with a panel for each board, and the two together."""
    count = max(len(board.order) for board in found)
    made, axes = plt.subplots(1, len(found), figsize=(3.6 * len(found) + 1.2, 0.27 * count + 1.1), squeeze=False)
    return made, zip(axes[0], found, strict=True)


def colour_of(method: str) -> str:
    """Orange for what works at once, blue for a chain."""
    return COLOURS[1] if method in AT_ONCE else COLOURS[0]


def name_rows(ax, order: list[str]) -> None:
    """The methods along the vertical axis."""
    ax.set_yticks(range(len(order)), order, fontsize=8)
    for label in ax.get_yticklabels():
        label.set_color(colour_of(label.get_text()))


def figure(found: list[Board]) -> Figure:
    """A panel for each budget: accuracies with their intervals, the best on top."""
    made, panels = panels_of(found)
    for ax, board in panels:
        for y, method in enumerate(reversed(board.order)):
            value = board.paired.accuracy(method)
            errors = [[100 * (value.mean - value.low)], [100 * (value.high - value.mean)]]
            ax.errorbar(100 * value.mean, y, xerr=errors, marker="o", color=colour_of(method))
        name_rows(ax, list(reversed(board.order)))
        size = board.mean(board.order[0], "account.bytes_weights") / 2**20
        ax.set_title(f"{words.budget(board.budget)} ({size:.0f} MiB)")
        ax.set_xlabel("test accuracy (%)")
    return made


def differences(found: list[Board]) -> Figure:
    """A panel for each budget: mean ranks, the best on top; what lies in the band is not told apart from the best."""
    made, panels = panels_of(found)
    for ax, board in panels:
        ranks, wide = board.paired.ranks(), board.paired.critical_difference()
        order = sorted(ranks, key=ranks.get, reverse=True)
        best = ranks[order[-1]]
        ax.axvspan(best, best + wide, color="0.85", lw=0)
        for y, method in enumerate(order):
            ax.plot(ranks[method], y, marker="o", color=colour_of(method))
        name_rows(ax, order)
        ax.set_title(f"{words.budget(board.budget)}, {len(board.paired.cells)} runs a row")
        ax.set_xlabel("mean rank (band: critical difference, at least)")
    return made


def against_bytes(found: list[Board]) -> Figure:
    """A panel for each task that all budgets have: accuracies with their intervals over the bytes of the model."""
    found = sorted(found, key=lambda board: board.mean(board.order[0], "account.bytes_weights"))
    tasks = [task for task in found[0].paired.tasks if all(task in board.paired.tasks for board in found)]
    made, axes = plt.subplots(1, len(tasks), figsize=(5.4 * len(tasks), 4.2), squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        ends = []
        for method in found[-1].order:
            run = [board for board in found if method in board.records]
            values = [board.paired.accuracy(method, task) for board in run]
            sizes = [board.mean(method, "account.bytes_weights") / 2**20 for board in run]
            errors = [[100 * (v.mean - v.low) for v in values], [100 * (v.high - v.mean) for v in values]]
            ax.errorbar(sizes, [100 * v.mean for v in values], yerr=errors, marker="o", color=colour_of(method))
            ends.append((100 * values[-1].mean, method))
        low, high = ax.get_ylim()
        ends.sort()
        heights = apart([end[0] for end in ends], (high - low) / 22)
        for y, (_, method) in zip(heights, ends, strict=True):
            where = {"xycoords": ("axes fraction", "data"), "va": "center"}
            ax.annotate(method, (1.02, y), **where, color=colour_of(method), fontsize=8)
        ax.set_title(words.label("data.task", task))
        ax.set_xlabel("MiB of weights")
        ax.set_ylabel("test accuracy (%)")
    return made


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, each moved up until it lies at least the gap above the one before."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    return placed
