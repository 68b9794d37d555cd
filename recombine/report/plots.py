"""Plots of an experiment's records. A kind is one function; options in the YAML say what of the records it shows:

    plots:                                                                # name of the SVG -> kind and options
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

import io
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from recombine.errors import UsageError
from recombine.report import drawn
from recombine.report.plot_drawing import STYLE, Drawing, Options
from recombine.report.plot_kinds import KINDS
from recombine.report.records import Runs

plt.switch_backend("Agg")  # files, no windows


def save(spec: Mapping[str, Mapping], runs: Runs, folder: Path) -> list[Path]:
    """Writes every plot as <folder>/<name>.svg; one that no record has numbers for is left out."""
    kept = replace(runs, records=[replace(record, result=record.data) for record in runs.records])  # as it is committed
    written = []
    for name, figure in figures(spec, kept).items():
        text = f"{as_svg(figure, name)}{drawn.closing(drawn.digest(name, spec[name], runs))}\n"
        (path := folder / f"{name}.svg").write_text(text, encoding="utf-8")
        written.append(path)
    return written


def as_svg(figure: Figure, name: str) -> str:
    """A figure as SVG: text as text, two digits behind the point, the same bytes for the same figure."""
    out = io.StringIO()
    for text in figure.findobj(lambda artist: artist.get_path_effects()):  # would be drawn as outlines
        text.set_path_effects([])
        text.set_gid("halo")
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", facecolor="white", metadata=nothing)
    text = re.sub(r'(?<= (?:d|x|y)=")[^"]*', lambda match: re.sub(r"(\.\d\d)\d+|\s+$", r"\1", match[0]), out.getvalue())
    return re.sub(r"[ \t]+$|^[ \t]+", "", text, flags=re.M)


def figures(spec: Mapping[str, Mapping], runs: Runs) -> dict[str, Figure]:
    """name -> figure.

    Raises:
        UsageError: a plot names a kind, an option or an axis that does not exist.
    """
    made = {}
    for name, given in spec.items():
        drawing = Drawing(name, check(name, given, runs), runs)
        if drawing.items:
            with plt.rc_context(STYLE):
                made[name] = KINDS[drawing.options.kind](drawing)
                plt.close(made[name])
    return made


def check(name: str, given: Mapping, runs: Runs) -> Options:
    """The options of a plot.

    Raises:
        UsageError: a kind, an option or an axis does not exist, or one is missing.
    """
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
