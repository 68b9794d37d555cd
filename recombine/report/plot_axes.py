"""Scales, ticks and labels of a plot's axes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox


class Dot(NamedTuple):
    """A point of a plot. spread: the length of its error bar to either side."""

    x: float
    y: float
    spread: float
    label: str


def nines(low: float, high: float) -> FuncNorm:
    """A scale of colours with 0.9, 0.99 and 0.999 at equal distances."""
    tiny = 1e-7
    return FuncNorm((lambda y: -np.log10(1 + tiny - y), lambda z: 1 + tiny - 10.0**-z), low, high)


def name_ticks(ax: Axes, names: Sequence[str]) -> None:
    """Names at 0, 1, 2, ...; turned where they would overlap."""
    long = sum(map(len, names)) > 28
    turned = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if long else {}
    ax.set_xticks(range(len(names)), names, **turned)
    ax.set_xlim(-0.6, len(names) - 0.4)


def number_ticks(ax: Axes, log: bool, places: Mapping[str, float] | None) -> None:
    """50k instead of 5 x 10^4; the grid's own numbers where they are few and apart. places: label -> its number."""
    at = np.sort(list((places or {}).values()))
    at = np.log(at) if log else at
    if 1 < len(at) <= 8 and np.diff(at).min() >= 0.06 * np.ptp(at):
        ax.set_xticks(list(places.values()), list(places))
        ax.xaxis.set_minor_locator(NullLocator())
        return
    low, high = ax.get_xlim()
    subs = (1, 2, 5) if high < 1000 * low else (1,)
    ax.xaxis.set_major_locator(LogLocator(subs=subs) if log else MaxNLocator(nbins=6, steps=(1, 2, 2.5, 5, 10)))
    if log or max(map(abs, ax.get_xlim())) >= 1e4:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.xaxis.set_minor_formatter(NullFormatter())


def name_points(ax: Axes, dots: Sequence[Dot]) -> None:
    """Writes each point's label beside it, where it hides the least of the other labels, points and error bars."""
    renderer = ax.figure.canvas.get_renderer()
    taken = [Bbox(ax.transData.transform([(d.x, d.y - d.spread), (d.x, d.y + d.spread)])).padded(3) for d in dots]
    sides = [(x, y) for x in (7, -7, 0) for y in (0, 7, -7, 14, -14) if (x, y) != (0, 0)]
    for dot in dots:
        tried = []
        for x, y in sides:
            side = {"ha": "left" if x > 0 else "right" if x < 0 else "center", "va": "center", "fontsize": 8.5}
            text = ax.annotate(dot.label, (dot.x, dot.y), (x, y), textcoords="offset points", **side)
            box = text.get_window_extent(renderer)
            outside = box.x0 < ax.bbox.x0 or box.x1 > ax.bbox.x1
            tried.append((10 * outside + sum(box.overlaps(other) for other in taken), len(tried), text, box))
        (_, _, kept, box), *rest = sorted(tried, key=lambda attempt: attempt[:2])
        for _, _, text, _ in rest:
            text.remove()
        kept.set_path_effects([withStroke(linewidth=2, foreground="white")])
        taken.append(box)
