"""Plots of an experiment's records. A kind is one function; options in the YAML say what of the records it shows:

    plots:                                                                # name of the PNG -> kind and options
      ranks: {kind: ranks, y: rank, line: method, panel: role}
      memory: {kind: xy, x: account.memory_mib, y: test.acc, scale: 100, point: method, xlabel: MiB to train}
      budgets: {kind: xy, x: account.trained, xlog: true, y: test.acc, scale: 100, line: method, point: budget}
      energy: {kind: xy, x: method.alpha, y: account.retained, line: model, hline: {LoRA r=32: 1.03}}
      losses: {kind: curves, y: {train: curves.train/loss, val: curves.val/loss}, line: method, panel: value}
      forgetting: {kind: bars, x: value, line: method, y: {CIFAR-10: ood.cifar10}, reference: {CIFAR-10: ood.before}}
      subspaces: {kind: heat, y: subspace.u, nines: true}

| kind | shows | papers |
|---|---|---|
| ranks | a field of the layers (rank, core, held, ...) by depth; has an axis `role` | CERSA Fig. 3, JACTUS Fig. 3 |
| xy | y against x: scatter, budget curves, a metric against a knob | CERSA Fig. 2, 7; CRISP Fig. 3, 5 |
| curves | a list by epoch, with the spread over the seeds | CERSA Fig. 6 |
| bars | bars in groups | CERSA Fig. 10, CRISP Fig. 6-8 |
| heat | a matrix, or {panel: matrix}, or {row: {column: matrix}} | CERSA Fig. 11, 12 |

x and y are dotted paths into a record, x may be an axis. A y of several paths, {label: path}, makes an axis `value`.
What no option names is averaged: first within a seed, then over the seeds, with the sample standard deviation as error
bar; a seed counts only with all its runs, as a mean over what happens to be there would move with what is missing.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import FuncNorm, Normalize  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patheffects import withStroke  # noqa: E402
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator  # noqa: E402
from matplotlib.transforms import Bbox  # noqa: E402

from recombine.errors import UsageError  # noqa: E402
from recombine.report.records import Record, Runs  # noqa: E402
from recombine.report.table import labels as labels_of  # noqa: E402

# Okabe and Ito's colours stay apart for colour-blind readers; their yellow is too pale for a line
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "down")
WIDTH, HEIGHT = 6.6, 2.1  # inches, of a figure and of one of several rows of panels
STYLE = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "legend.fontsize": 7.5,
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
    value: float
    spread: float | None


def save(spec: Mapping[str, Mapping], runs: Runs, folder: Path) -> list[Path]:
    """Writes every plot as <folder>/<name>.png; one that no record has numbers for is left out."""
    written = []
    for name, figure in figures(spec, runs).items():
        figure.savefig(path := folder / f"{name}.png", metadata={"Software": None})
        written.append(path)
    return written


def figures(spec: Mapping[str, Mapping], runs: Runs) -> dict[str, Figure]:
    """name -> figure.

    Raises:
        UsageError: a plot names a kind, an option or an axis that does not exist.
    """
    made = {}
    for name, given in spec.items():
        drawn = Drawing(name, check(name, given, runs), runs)
        if drawn.items:
            with plt.rc_context(STYLE):
                made[name] = KINDS[drawn.options.kind](drawn)
                plt.close(made[name])
    return made


def check(name: str, given: Mapping, runs: Runs) -> Options:
    known = {f.name for f in fields(Options)}
    if unknown := set(given) - known:
        raise UsageError(
            f"report.plots.{name}.{unknown.pop()}: there is no such option; take {', '.join(sorted(known))}"
        )
    if missing := {"kind", "y"} - set(given):
        raise UsageError(f"report.plots.{name}: needs {' and '.join(sorted(missing))}")
    options = Options(**given)
    if options.kind not in KINDS:
        raise UsageError(f"report.plots.{name}.kind={options.kind}: must be one of {', '.join(KINDS)}")
    if options.kind == "xy" and options.x is None:
        raise UsageError(f"report.plots.{name}: needs x, an axis or a path")
    axes = [
        *runs.cells[0],
        *(["role"] if options.kind == "ranks" else []),
        *(["value"] if options.paths != {"": options.y} else []),
    ]
    named = [options.line, options.panel, options.point, *options.where]
    for axis in named:
        if axis is not None and axis not in axes:
            raise UsageError(f"report.plots.{name}: {axis} is no axis; choose from {', '.join(axes)}")
    if options.kind == "bars" and options.x is not None and options.x not in axes:
        raise UsageError(f"report.plots.{name}.x={options.x}: is no axis; choose from {', '.join(axes)}")
    if "value" in axes and "value" not in (options.x, *named):
        raise UsageError(f"report.plots.{name}: y has several paths; say which of x, line, panel or point is `value`")
    return options


class Drawing:
    """One plot on its way: its options, what it shows, and the order and colour of every label."""

    def __init__(self, name: str, options: Options, runs: Runs):
        self.name, self.options, self.runs = name, options, runs
        self.cells = [cell for cell in runs.cells if fits(cell, options.where)]
        records = [record for record in runs.records if fits(record.labels, options.where)]
        self.items = [item for record in records for item in self.of(record) if fits(item.labels, options.where)]
        if options.kind == "heat":  # one mean over all of them
            self.items = [item for some in self.whole(self.items, {}) for item in some]

    def of(self, record: Record) -> Iterable[Item]:
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
            found = dict.fromkeys(item.labels["role"] for item in self.items)
            return sorted(found, key=lambda role: ROLES.index(role) if role in ROLES else len(ROLES))
        return labels_of(self.cells, axis)

    def split(self, items: Sequence[Item], axis: str | None) -> dict[str, list[Item]]:
        """The items by their label, in order; the labels that none has are left out."""
        if axis is None:
            return {"": list(items)} if items else {}
        found = {label: [item for item in items if item.labels[axis] == label] for label in self.order(axis)}
        return {label: some for label, some in found.items() if some}

    def colours(self, axis: str | None) -> dict[str, Any]:
        """One colour a label: shades where the labels are numbers or too many, else colours that stay apart."""
        names = self.order(axis)
        if len(names) > len(COLOURS) or len(names) > 2 and all(number(name) is not None for name in names):
            return dict(zip(names, plt.get_cmap("viridis")(np.linspace(0.0, 0.88, len(names))), strict=True))
        return dict(zip(names, COLOURS, strict=False))

    def markers(self, axis: str | None) -> dict[str, str]:
        return {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(self.order(axis))}

    def mean(self, items: Sequence[Item], what: Callable[[Item], Any], same: Mapping[str, str]) -> Mean | None:
        """Mean and deviation over the seeds that have all their runs. same: axis -> label that the items share."""
        measured = [item for item in items if isinstance(what(item), int | float)]
        each = [statistics.fmean(map(what, some)) for some in self.whole(measured, same)]
        return Mean(statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else None) if each else None

    def whole(self, items: Sequence[Item], same: Mapping[str, str]) -> list[list[Item]]:
        """The items of every seed that has all its runs. same: axis -> label that the items share."""
        seeds = self.options.seed
        wanted = Counter(cell.get(seeds) for cell in self.cells if fits(cell, same))
        found = defaultdict(list)
        for item in items:
            found[item.labels.get(seeds)].append(item)
        return [some for seed, some in found.items() if len(some) == wanted[seed]]

    def panels(self, share: bool = True) -> tuple[Figure, dict[str, Axes]]:
        """A figure with a panel for every label of the panel axis, and their items."""
        found = self.split(self.items, self.options.panel)
        columns = min(len(found), self.options.columns)
        rows = math.ceil(len(found) / columns)
        size = (WIDTH, 0.5 + HEIGHT * rows) if len(found) > 1 else (5.2, 3.0)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=share)
        for spare in axes.flat[len(found) :]:
            spare.remove()
        if self.options.title:
            figure.suptitle(self.options.title, fontsize=9)
        drawn = dict(zip(found, axes.flat, strict=False))
        for i, (label, ax) in enumerate(drawn.items()):
            ax.set_title(label)
            ax.set_xlabel(self.options.xlabel or "")
            if i % columns == 0:
                ax.set_ylabel(self.options.ylabel or "")
            if self.options.xlog:
                ax.set_xscale("log")
            if self.options.ylog:
                ax.set_yscale("log")
        return figure, drawn

    def finish(self, figure: Figure, axes: Iterable[Axes]) -> Figure:
        """Reference lines and one legend, outside the panels."""
        axes = list(axes)
        handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True) if label}
        for ax in axes:
            for label, height in self.options.hline.items():
                handles[label] = ax.axhline(height, color="#555555", linestyle="--", linewidth=1)
        if handles:
            fit = max(1, 100 // (max(map(len, handles)) + 7))
            across = math.ceil(len(handles) / math.ceil(len(handles) / fit))  # in rows of the same length
            below = len(axes) > 1
            place = {"loc": "outside lower center", "ncols": across} if below else {"loc": "outside right upper"}
            figure.legend(handles.values(), handles.keys(), **place)
        return figure


def ranks(drawing: Drawing) -> Figure:
    """A field of the layers by depth, one panel a role unless told otherwise."""
    options = drawing.options
    if options.panel is None and options.line != "role":
        options.panel = "role"
    options.xlabel, options.ylabel = options.xlabel or "layer", options.ylabel or options.y
    colours, markers = drawing.colours(options.line), drawing.markers(options.line)
    figure, panels = drawing.panels()
    for panel, ax in panels.items():
        for label, items in drawing.split(drawing.split(drawing.items, options.panel)[panel], options.line).items():
            seeds = drawing.whole(items, {k: v for k, v in {options.panel: panel, options.line: label}.items() if k})
            if not (values := columnwise([item.value for some in seeds for item in some])):
                continue
            few = markers[label] if len(values) <= 24 else ""
            style = {"color": colours[label], "marker": few, "markersize": 3}
            ax.plot(range(len(values)), [options.scale * v for v in values], label=label, **style)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for ax in panels.values():  # when all is drawn: the panels share the axis
        ax.set_ylim(bottom=0)
    return drawing.finish(figure, panels.values())


def xy(drawing: Drawing) -> Figure:
    """y against x. Points are joined along a line; without lines the labels of `point` stand beside their points."""
    options = drawing.options
    names = drawing.order(options.x) if options.x in (*drawing.cells[0], "value") else None
    words = names is not None and any(number(name) is None for name in names)
    places = {name: i if words else number(name) for i, name in enumerate(names)} if names else None
    options.xlabel = options.xlabel or options.x
    options.ylabel = options.ylabel or ", ".join(options.paths.values())
    key = options.line or options.point
    colours, markers = drawing.colours(key), drawing.markers(key)
    figure, panels = drawing.panels()
    named = {}
    for panel, ax in panels.items():
        here = drawing.split(drawing.items, options.panel)[panel]
        named[panel] = []
        for line, items in drawing.split(here, options.line).items():
            found = dots(drawing, items, places, {options.panel: panel, options.line: line})
            if not options.line:
                named[panel] += [dot for dot in found if dot.label]
            for group in [found] if options.line or not options.point else [[dot] for dot in found]:
                label = line if options.line else group[0].label if group else ""
                x, y, spread = (np.array([getattr(dot, key) for dot in group]) for key in ("x", "y", "spread"))
                if words and options.line:  # side by side
                    x = x + 0.3 * (list(colours).index(line) / max(1, len(colours) - 1) - 0.5)
                style = {"color": colours[label], "marker": markers[label], "linestyle": "" if words else "-"}
                ax.errorbar(x, y, spread if spread.any() else None, capsize=2, elinewidth=0.8, label=line, **style)
        if words:
            name_ticks(ax, names)
        else:
            number_ticks(ax, options.xlog, places)
        if named[panel]:
            ax.margins(x=0.12, y=0.14)
    drawing.finish(figure, panels.values())
    figure.draw_without_rendering()
    for panel, ax in panels.items():
        name_points(ax, named[panel])
    return figure


class Dot(NamedTuple):
    x: float
    y: float
    spread: float
    label: str


def dots(drawing: Drawing, items: Sequence[Item], places: Mapping[str, float] | None, same: dict) -> list[Dot]:
    """The points of a line from left to right: one for each label of x, if that is an axis, and of `point`."""
    options, found = drawing.options, []
    for place, some in drawing.split(items, options.x if places else None).items():
        for label, group in drawing.split(some, options.point).items():
            fixed = {k: v for k, v in {**same, options.x: place, options.point: label}.items() if k}
            y = drawing.mean(group, lambda item: item.value, fixed)
            x = places[place] if places else None
            if not places and (mean := drawing.mean(group, lambda item: item.record.get(options.x), fixed)):
                x = mean.value * options.xscale
            if x is not None and y is not None:
                found.append(Dot(x, y.value * options.scale, (y.spread or 0.0) * options.scale, label))
    return sorted(found)


def curves(drawing: Drawing) -> Figure:
    """Lists by epoch: the mean over the runs, and a band of a standard deviation over the seeds."""
    options = drawing.options
    options.xlabel, options.ylabel = options.xlabel or "epoch", options.ylabel or ", ".join(options.paths.values())
    colours = drawing.colours(options.line)
    figure, panels = drawing.panels(share=options.panel != "value")
    for panel, ax in panels.items():
        for label, items in drawing.split(drawing.split(drawing.items, options.panel)[panel], options.line).items():
            seeds = drawing.whole(items, {k: v for k, v in {options.panel: panel, options.line: label}.items() if k})
            if not (each := [columnwise([item.value for item in some]) for some in seeds]):
                continue
            length = min(map(len, each))
            y = options.scale * np.array([one[:length] for one in each])  # (seeds, epochs)
            epochs = np.arange(1, length + 1)
            ax.plot(
                epochs, y.mean(0), color=colours[label], label=label, marker="o" if length < 12 else "", markersize=3
            )
            if len(y) > 1:
                spread = y.std(0, ddof=1)
                ax.fill_between(epochs, y.mean(0) - spread, y.mean(0) + spread, color=colours[label], alpha=0.15, lw=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return drawing.finish(figure, panels.values())


def bars(drawing: Drawing) -> Figure:
    """Bars in groups: a group for each label of x, in it one for each line, and a wide grey one for the reference."""
    options = drawing.options
    options.ylabel = options.ylabel or ", ".join(options.paths.values())
    lines, colours = drawing.order(options.line), drawing.colours(options.line)
    figure, panels = drawing.panels()
    width = 0.8 / len(lines)
    for panel, ax in panels.items():
        groups = drawing.split(drawing.split(drawing.items, options.panel)[panel], options.x)
        for i, (place, items) in enumerate(groups.items()):
            path = options.reference.get(place) if isinstance(options.reference, dict) else options.reference
            fixed = {k: v for k, v in {options.panel: panel, options.x: place}.items() if k}
            if before := drawing.mean(items, lambda item, path=path: item.record.get(path or ""), fixed):
                ax.bar(i, options.scale * before.value, 0.92, color="#DDDDDD", label=options.before)
            for label, some in drawing.split(items, options.line).items():
                fixed = {k: v for k, v in {options.panel: panel, options.x: place, options.line: label}.items() if k}
                if mean := drawing.mean(some, lambda item: item.value, fixed):
                    at = i + (lines.index(label) - (len(lines) - 1) / 2) * width
                    error = None if mean.spread is None else options.scale * mean.spread
                    look = {"capsize": 1.5, "error_kw": {"elinewidth": 0.8}, "label": label}
                    ax.bar(at, options.scale * mean.value, 0.9 * width, yerr=error, color=colours[label], **look)
        name_ticks(ax, list(groups))
        ax.grid(axis="x", visible=False)
    return drawing.finish(figure, panels.values())


def heat(drawing: Drawing) -> Figure:
    """The mean matrix over the records, row 0 below, with one scale of colours for all panels."""
    options = drawing.options
    held = [item.value if isinstance(item.value, dict) else {"": item.value} for item in drawing.items]
    nested = all(isinstance(value, dict) for one in held for value in one.values())
    held = held if nested else [{"": one} for one in held]
    rows = [r for r in held[0] if all(r in one for one in held)]
    if not rows:
        raise UsageError(f"report.plots.{drawing.name}: its runs have no matrix in common; choose some with `where`")
    columns = [c for c in held[0][rows[0]] if all(c in one[r] for one in held for r in rows)]
    size = (min(WIDTH, 1.0 + 2.0 * len(columns)), 0.3 + 1.9 * len(rows))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False)
    means = {(r, c): options.scale * np.mean([one[r][c] for one in held], 0) for r in rows for c in columns}
    every = np.concatenate([mean.ravel() for mean in means.values()])
    low, high = float(every.min()), float(every.max())
    norm = nines(low, high) if options.nines else Normalize(low, high)
    for (r, c), mean in means.items():
        ax = axes[rows.index(r), columns.index(c)]
        image = ax.imshow(mean, norm=norm, cmap="viridis", origin="lower", aspect="auto", interpolation="nearest")
        ax.set_title(" ".join(part for part in (r, c) if part))
        ax.grid(visible=False)
        ax.set_xlabel(options.xlabel if options.xlabel and r == rows[-1] else "")
        ax.set_ylabel(options.ylabel if options.ylabel and c == columns[0] else "")
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=30)
    if options.nines:
        bar.ax.yaxis.set_major_locator(FixedLocator([v for v in (0, 0.9, 0.99, 0.999, 0.9999) if low <= v <= high]))
        bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.outline.set_visible(False)
    if options.title:
        figure.suptitle(options.title, fontsize=9)
    return figure


def nines(low: float, high: float) -> FuncNorm:
    """0.9, 0.99 and 0.999 at equal distances."""
    tiny = 1e-7
    return FuncNorm((lambda y: -np.log10(1 + tiny - y), lambda z: 1 + tiny - 10.0**-z), low, high)


def name_ticks(ax: Axes, names: Sequence[str]) -> None:
    long = sum(map(len, names)) > 28
    turned = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if long else {}
    ax.set_xticks(range(len(names)), names, **turned)
    ax.set_xlim(-0.6, len(names) - 0.4)


def number_ticks(ax: Axes, log: bool, places: Mapping[str, float] | None) -> None:
    """50k instead of 5 x 10^4; the grid's own numbers where they are few and apart."""
    at = np.sort(list((places or {}).values()))
    at = np.log(at) if log else at
    if 1 < len(at) <= 8 and np.diff(at).min() >= 0.06 * np.ptp(at):
        ax.set_xticks(list(places.values()), list(places))
        ax.xaxis.set_minor_locator(NullLocator())
        return
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if log else MaxNLocator(nbins=6))
    if log or max(map(abs, ax.get_xlim())) >= 1e4:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.xaxis.set_minor_formatter(NullFormatter())


def name_points(ax: Axes, found: Sequence[Dot]) -> None:
    """Writes each point's label beside it, where it hides the least of the other labels, points and error bars."""
    renderer = ax.figure.canvas.get_renderer()
    hidden = [Bbox(ax.transData.transform([(d.x, d.y - d.spread), (d.x, d.y + d.spread)])).padded(3) for d in found]
    sides = [(x, y) for x in (7, -7, 0) for y in (0, 7, -7, 14, -14) if (x, y) != (0, 0)]
    for dot in found:
        texts = []
        for x, y in sides:
            side = {"ha": "left" if x > 0 else "right" if x < 0 else "center", "va": "center", "fontsize": 7}
            text = ax.annotate(dot.label, (dot.x, dot.y), (x, y), textcoords="offset points", **side)
            box = text.get_window_extent(renderer)
            outside = box.x0 < ax.bbox.x0 or box.x1 > ax.bbox.x1
            texts.append((10 * outside + sum(box.overlaps(other) for other in hidden), len(texts), text, box))
        (_, _, kept, box), *rest = sorted(texts, key=lambda found: found[:2])
        for _, _, text, _ in rest:
            text.remove()
        kept.set_path_effects([withStroke(linewidth=2, foreground="white")])
        hidden.append(box)


def fits(found: Mapping[str, str], wanted: Mapping[str, Any]) -> bool:
    """Whether these labels are among the wanted ones; axes that they lack do not matter."""
    return all(
        found[axis] in (list(map(str, value)) if isinstance(value, list) else [str(value)])
        for axis, value in wanted.items()
        if axis in found
    )


def number(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None


def columnwise(lists: Sequence[Sequence[float | None]]) -> list[float]:
    """The means of the first, the second, ... numbers; as long as the shortest list; nan where there is none."""
    found = [[v for v in values if v is not None] for values in zip(*lists, strict=False)]
    return [statistics.fmean(values) if values else math.nan for values in found]


KINDS: dict[str, Callable[[Drawing], Figure]] = {"ranks": ranks, "xy": xy, "curves": curves, "bars": bars, "heat": heat}
