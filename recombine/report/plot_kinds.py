"""The kinds of plot, a function each: from a drawing to its figure."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from recombine.errors import UsageError
from recombine.report import words
from recombine.report.plot_axes import Dot, name_points, name_ticks, nines, number_ticks
from recombine.report.plot_drawing import WIDTH, Drawing, Item, columnwise, number


def ranks(drawing: Drawing) -> Figure:
    """A field of the layers by depth, one panel a role unless told otherwise."""
    options = drawing.options
    if options.panel is None and options.line != "role":
        options.panel = "role"
    colours, markers = drawing.colours(options.line), drawing.markers(options.line)
    figure, panels = drawing.panels("layer", options.ylabel or words.heading(options.y))
    for panel, ax in panels.items():
        for line, items in drawing.lines(panel).items():
            seeds = drawing.whole(items, {options.panel: panel, options.line: line})
            if not (values := columnwise([item.value for same in seeds for item in same])):
                continue
            style = {"color": colours[line], "marker": markers[line] if len(values) <= 24 else "", "markersize": 3}
            name = words.label(options.line, line)
            ax.plot(range(len(values)), [options.scale * v for v in values], label=name, **style)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for ax in panels.values():  # when all is drawn: the panels share the axis
        ax.set_ylim(bottom=0)
    return drawing.finish(figure, panels.values())


def xy(drawing: Drawing) -> Figure:
    """y against x. Points are joined along a line; without lines the labels of `point` stand beside their points."""
    options = drawing.options
    names = drawing.order(options.x) if options.x in (*drawing.cells[0], "value") else None
    categories = names is not None and any(number(name) is None for name in names)
    places = {name: i if categories else number(name) for i, name in enumerate(names)} if names else None
    key = options.line or options.point
    colours, markers = drawing.colours(key), drawing.markers(key)
    figure, panels = drawing.panels(words.heading(options.x))
    points = {}  # panel -> the dots that are named
    for panel, ax in panels.items():
        points[panel] = []
        for line, items in drawing.lines(panel).items():
            dots = positions(drawing, items, places, {options.panel: panel, options.line: line})
            if not options.line:
                points[panel] += [dot for dot in dots if dot.label]
            for group in [dots] if options.line or not options.point else [[dot] for dot in dots]:
                label = line if options.line else group[0].label if group else ""
                aside = 0.0
                if categories and options.line:  # side by side
                    aside = 0.3 * (list(colours).index(line) / max(1, len(colours) - 1) - 0.5)
                style = {"color": colours[label], "marker": markers[label], "linestyle": "" if categories else "-"}
                joined(ax, group, words.label(options.line, line), aside, style)
        if categories:
            name_ticks(ax, [words.label(options.x, name) for name in names])
        else:
            number_ticks(ax, options.xlog, places)
        if points[panel]:
            ax.margins(x=0.12, y=0.14)
    drawing.finish(figure, panels.values())
    figure.draw_without_rendering()
    for panel, ax in panels.items():
        name_points(ax, [dot._replace(label=words.label(options.point, dot.label)) for dot in points[panel]])
    return figure


def joined(ax: Axes, dots: Sequence[Dot], label: str, aside: float, style: Mapping) -> None:
    """Points with error bars. aside: how far they are moved to the right."""
    x, y, spread = (np.array([getattr(dot, key) for dot in dots]) for key in ("x", "y", "spread"))
    ax.errorbar(x + aside, y, spread if spread.any() else None, capsize=2, elinewidth=0.8, label=label, **style)


def positions(
    drawing: Drawing, items: Sequence[Item], places: Mapping[str, float] | None, same: Mapping[str | None, str]
) -> list[Dot]:
    """The points of a line from left to right: one for each label of x, if that is an axis, and of `point`.

    Args:
        places: label of x -> its number, where x is an axis.
        same: axis -> label that the items share.
    """
    options, dots = drawing.options, []
    for place, at in drawing.split(items, options.x if places else None).items():
        for label, group in drawing.split(at, options.point).items():
            shared = {**same, options.x: place, options.point: label}
            y = drawing.mean(group, lambda item: item.value, shared)
            x = places[place] if places else None
            if not places and (mean := drawing.mean(group, lambda item: item.record.get(options.x), shared)):
                x = mean.value * options.xscale
            if x is not None and y is not None:
                dots.append(Dot(x, y.value * options.scale, (y.spread or 0.0) * options.scale, label))
    return sorted(dots)


def curves(drawing: Drawing) -> Figure:
    """Lists by epoch: the mean over the runs, and a band of a standard deviation over the seeds."""
    options = drawing.options
    colours = drawing.colours(options.line)
    figure, panels = drawing.panels("epoch", share=options.panel != "value")
    for panel, ax in panels.items():
        for line, items in drawing.lines(panel).items():
            seeds = drawing.whole(items, {options.panel: panel, options.line: line})
            if not (each := [columnwise([item.value for item in same]) for same in seeds]):
                continue
            length = min(map(len, each))
            y = options.scale * np.array([values[:length] for values in each])  # (seeds, epochs)
            epochs, middle = np.arange(1, length + 1), y.mean(0)
            style = {"color": colours[line], "marker": "o" if length < 12 else "", "markersize": 3}
            ax.plot(epochs, middle, label=words.label(options.line, line), **style)
            if len(y) > 1:
                spread = y.std(0, ddof=1)
                ax.fill_between(epochs, middle - spread, middle + spread, color=colours[line], alpha=0.15, lw=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return drawing.finish(figure, panels.values())


def bars(drawing: Drawing) -> Figure:
    """Bars in groups: a group for each label of x, in it one for each line, and a wide grey one for the reference."""
    options = drawing.options
    lines, colours = drawing.order(options.line), drawing.colours(options.line)
    figure, panels = drawing.panels()
    width = 0.8 / len(lines)
    for panel, ax in panels.items():
        groups = drawing.split(drawing.split(drawing.items, options.panel)[panel], options.x)
        for i, (place, items) in enumerate(groups.items()):
            path = options.reference.get(place) if isinstance(options.reference, dict) else options.reference
            shared = {options.panel: panel, options.x: place}
            if before := drawing.mean(items, lambda item, path=path: item.record.get(path or ""), shared):
                ax.bar(i, options.scale * before.value, 0.92, color="#DDDDDD", label=options.before)
            for line, group in drawing.split(items, options.line).items():
                if mean := drawing.mean(group, lambda item: item.value, {**shared, options.line: line}):
                    at = i + (lines.index(line) - (len(lines) - 1) / 2) * width
                    error = None if mean.spread is None else options.scale * mean.spread
                    style = {"capsize": 1.5, "error_kw": {"elinewidth": 0.8}, "label": words.label(options.line, line)}
                    ax.bar(at, options.scale * mean.value, 0.9 * width, yerr=error, color=colours[line], **style)
        name_ticks(ax, [words.label(options.x, place) for place in groups])
        ax.grid(axis="x", visible=False)
    return drawing.finish(figure, panels.values())


def heat(drawing: Drawing) -> Figure:
    """The mean matrix over the records, row 0 below, with one scale of colours for all panels."""
    options = drawing.options
    means = {place: options.scale * np.mean(same, 0) for place, same in matrices(drawing).items()}
    rows, columns = (list(dict.fromkeys(place[i] for place in means)) for i in (0, 1))
    size = (min(WIDTH, 1.0 + 2.0 * len(columns)), 0.3 + 1.9 * len(rows))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False)
    every = np.concatenate([mean.ravel() for mean in means.values()])
    low, high = float(every.min()), float(every.max())
    norm = nines(low, high) if options.nines else Normalize(low, high)
    for (row, column), mean in means.items():
        ax = axes[rows.index(row), columns.index(column)]
        image = ax.imshow(mean, norm=norm, cmap="viridis", origin="lower", aspect="auto", interpolation="nearest")
        ax.set_title(" ".join(words.label("role", name) for name in (row, column) if name))
        ax.grid(visible=False)
        ax.set_xlabel(options.xlabel if options.xlabel and row == rows[-1] else "")
        ax.set_ylabel(options.ylabel if options.ylabel and column == columns[0] else "")
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=30)
    if options.nines:
        bar.ax.yaxis.set_major_locator(FixedLocator([v for v in (0, 0.9, 0.99, 0.999, 0.9999) if low <= v <= high]))
        bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.outline.set_visible(False)
    if options.title:
        figure.suptitle(options.title, fontsize=9)
    return figure


def matrices(drawing: Drawing) -> dict[tuple[str, str], list]:
    """(row, column) -> that matrix of every record, of the places that all records have.

    Raises:
        UsageError: the records have no matrix in common.
    """
    each = [item.value if isinstance(item.value, dict) else {"": item.value} for item in drawing.items]
    nested = all(isinstance(value, dict) for rows in each for value in rows.values())
    each = each if nested else [{"": columns} for columns in each]
    rows = [row for row in each[0] if all(row in other for other in each)]
    if not rows:
        raise UsageError(f"report.plots.{drawing.name}: its runs have no matrix in common; choose some with `where`")
    columns = [c for c in each[0][rows[0]] if all(c in other[row] for other in each for row in rows)]
    return {(row, c): [other[row][c] for other in each] for row in rows for c in columns}


KINDS: dict[str, Callable[[Drawing], Figure]] = {"ranks": ranks, "xy": xy, "curves": curves, "bars": bars, "heat": heat}
