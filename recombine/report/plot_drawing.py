"""What all kinds of plot share: the options, the items that a plot shows with their order and means, and the panels."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recombine.report import words
from recombine.report.aggregate import labels as labels_of
from recombine.report.records import Record, Runs

# Okabe and Ito's colours stay apart for colour-blind readers; their yellow is too pale for a line
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
ROLES = tuple(words.ROLES)
SPEAKING = (None, "method", "model", "role", "value")  # axes whose labels need no title in a legend
WIDTH, HEIGHT = 6.8, 2.3  # inches, of a figure and of one of several rows of panels
STYLE = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "axes.edgecolor": "#555555",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
}


@dataclass(kw_only=True)
class Options:
    """What a plot may say. Axes: line (one colour a label), panel (one panel a label), point (one point a label)."""

    kind: str
    y: str | dict[str, str]
    x: str | None = None
    line: str | None = None
    panel: str | None = None
    point: str | None = None
    where: dict[str, Any] = field(default_factory=dict)  # axis -> the label or labels to show
    seed: str = "seed"  # the axis of the replicates
    scale: float = 1.0  # of y
    xscale: float = 1.0
    xlog: bool = False
    ylog: bool = False
    nines: bool = False  # heat: colours by -log10(1 - y), for numbers close to 1
    reference: str | dict[str, str] | None = None  # bars: path of a grey bar, or label of x -> path
    before: str = "before"  # what the legend calls the grey bar
    hline: dict[str, float] = field(default_factory=dict)  # label -> a dashed line across
    title: str = ""
    xlabel: str | None = None
    ylabel: str | None = None
    columns: int = 3  # of panels

    @property
    def paths(self) -> dict[str, str]:
        return self.y if isinstance(self.y, dict) else {"": self.y}


class Item(NamedTuple):
    """A number or a list with the labels of its run, and of its path (`value`) or its layers (`role`)."""

    labels: Mapping[str, str]
    value: Any
    record: Record


class Mean(NamedTuple):
    """A mean over seeds and its sample standard deviation; None: of one seed."""

    value: float
    spread: float | None


class Drawing:
    """One plot on its way: its options, what it shows, and the order and colour of every label."""

    def __init__(self, name: str, options: Options, runs: Runs):
        self.name, self.options, self.runs = name, options, runs
        self.cells = [cell for cell in runs.cells if fits(cell, options.where)]
        records = [record for record in runs.records if fits(record.labels, options.where)]
        self.items = [item for record in records for item in self.of(record) if fits(item.labels, options.where)]
        if options.kind == "heat":  # one mean over all of them
            self.items = [item for same in self.whole(self.items, {}) for item in same]

    def of(self, record: Record) -> Iterable[Item]:
        """What the plot shows of a run: one item for each path, and in a plot of ranks for each role."""
        for label, path in self.options.paths.items():
            if self.options.kind == "ranks":
                for role, columns in (record.get("layers") or {}).items():
                    if any(v is not None for v in columns.get(path, ())):
                        yield Item(record.labels | {"value": label, "role": role}, columns[path], record)
            elif (value := record.get(path)) is not None:
                yield Item(record.labels | {"value": label}, value, record)

    def order(self, axis: str | None) -> list[str]:
        """The labels of an axis, all that the grid has."""
        if axis is None:
            return [""]
        if axis == "value":
            return list(self.options.paths)
        if axis == "role":
            roles = dict.fromkeys(item.labels["role"] for item in self.items)
            return sorted(roles, key=lambda role: ROLES.index(role) if role in ROLES else len(ROLES))
        return labels_of(self.cells, axis)

    def split(self, items: Sequence[Item], axis: str | None) -> dict[str, list[Item]]:
        """The items by their label, in order; the labels that none has are left out."""
        if axis is None:
            return {"": list(items)} if items else {}
        parts = {label: [item for item in items if item.labels[axis] == label] for label in self.order(axis)}
        return {label: part for label, part in parts.items() if part}

    def lines(self, panel: str) -> dict[str, list[Item]]:
        """The items of a panel by their line."""
        return self.split(self.split(self.items, self.options.panel)[panel], self.options.line)

    def colours(self, axis: str | None) -> dict[str, Any]:
        """One colour a label: shades where the labels are numbers or too many, else colours that stay apart."""
        names = self.order(axis)
        if len(names) > len(COLOURS) or len(names) > 2 and all(number(name) is not None for name in names):
            return dict(zip(names, plt.get_cmap("viridis")(np.linspace(0.0, 0.88, len(names))), strict=True))
        return dict(zip(names, COLOURS, strict=False))

    def markers(self, axis: str | None) -> dict[str, str]:
        return {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(self.order(axis))}

    def mean(self, items: Sequence[Item], what: Callable[[Item], Any], same: Mapping[str | None, str]) -> Mean | None:
        """Mean and deviation over the seeds that have all their runs. same: axis -> label that the items share."""
        measured = [item for item in items if isinstance(what(item), int | float)]
        each = [statistics.fmean(map(what, group)) for group in self.whole(measured, same)]
        return Mean(statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else None) if each else None

    def whole(self, items: Sequence[Item], same: Mapping[str | None, str]) -> list[list[Item]]:
        """The items of every seed that has all its runs. same: axis -> label that the items share."""
        axis = self.options.seed
        wanted = Counter(cell.get(axis) for cell in self.cells if fits(cell, same))
        groups = defaultdict(list)
        for item in items:
            groups[item.labels.get(axis)].append(item)
        return [group for seed, group in groups.items() if len(group) == wanted[seed]]

    def panels(self, xlabel: str = "", ylabel: str = "", share: bool = True) -> tuple[Figure, dict[str, Axes]]:
        """A figure with a panel for every label of the panel axis.

        Args:
            xlabel, ylabel: where the options say none; for y what the paths are in words.
            share: one scale of y for all panels.
        """
        options, names = self.options, list(self.split(self.items, self.options.panel))
        columns = min(len(names), options.columns)
        rows = math.ceil(len(names) / columns)
        size = (WIDTH, 0.5 + HEIGHT * rows) if len(names) > 1 else (4.8, 3.3)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=share)
        for spare in axes.flat[len(names) :]:
            spare.remove()
        if options.title:
            figure.suptitle(options.title, fontsize=10)
        panels = dict(zip(names, axes.flat, strict=False))
        for i, (label, ax) in enumerate(panels.items()):
            ax.set_title(words.label(options.panel, label))
            ax.set_xlabel(options.xlabel or xlabel)
            if i % columns == 0:
                ax.set_ylabel(options.ylabel or ylabel or self.measured())
            if options.xlog:
                ax.set_xscale("log")
            if options.ylog:
                ax.set_yscale("log")
        return figure, panels

    def measured(self) -> str:
        """What y is, in words."""
        names = ", ".join(dict.fromkeys(map(words.heading, self.options.paths.values())))
        return names + (" (%)" if self.options.scale == 100 else "")

    def finish(self, figure: Figure, axes: Iterable[Axes]) -> Figure:
        """Reference lines, and one legend outside the panels."""
        axes = list(axes)
        handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True) if label}
        for ax in axes:
            for label, height in self.options.hline.items():
                handles[label] = ax.axhline(height, color="#555555", linestyle="--", linewidth=1)
        if handles:
            fit = max(1, int(figure.get_figwidth() * 13) // (max(map(len, handles)) + 7))
            across = math.ceil(len(handles) / math.ceil(len(handles) / fit))  # in rows of the same length
            place = {"loc": "outside lower center", "ncols": across}
            title = None if self.options.line in SPEAKING else words.heading(self.options.line)
            figure.legend(handles.values(), handles.keys(), title=title, title_fontsize=9, **place)
        return figure


def fits(labels: Mapping[str, str], wanted: Mapping[str | None, Any]) -> bool:
    """Whether these labels are among the wanted ones; axes that they lack do not matter."""
    return all(
        labels[axis] in (list(map(str, value)) if isinstance(value, list) else [str(value)])
        for axis, value in wanted.items()
        if axis in labels
    )


def number(label: str) -> float | None:
    """A label as a number; None where it is none."""
    try:
        return float(label)
    except ValueError:
        return None


def columnwise(lists: Sequence[Sequence[float | None]]) -> list[float]:
    """The means of the first, the second, ... numbers; as long as the shortest list; nan where there is none."""
    columns = [[v for v in values if v is not None] for values in zip(*lists, strict=False)]
    return [statistics.fmean(values) if values else math.nan for values in columns]
