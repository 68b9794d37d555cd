"""The table that a sweep ends with, for the terminal."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from hydra.core.utils import JobReturn, JobStatus

from recombine import results
from recombine.errors import UsageError
from recombine.runner.grid import Cell
from recombine.runner.summary import PLAIN, number, percent, worded

ALIKE = ("seed",)  # axes over which a row takes the mean
ROWS = 40  # at most; the report shows them all
COLUMNS = ("", "runs", "score", "", "trained", "of the layers")


def table(cells: Sequence[Cell], returns: Sequence[JobReturn], arguments: Sequence[str]) -> str:
    """A row for runs that differ in their seed alone: the test score, its deviation, and what trained.

    Args:
        returns: of the cells, in their order.
        arguments: the command line without the program.
    """
    rows: dict[str, list[Path]] = {}
    axes = [axis for axis in cells[0].labels if len({cell.labels[axis] for cell in cells}) > 1 and axis not in ALIKE]
    for cell, done in zip(cells, returns, strict=True):
        if done.status is JobStatus.COMPLETED:
            rows.setdefault(", ".join(cell.labels[axis] for axis in axes) or "all", []).append(Path(done.working_dir))
    found = [row for name, folders in rows.items() if (row := of_runs(name, folders)) is not None]
    if not found:
        return ""
    lines = [COLUMNS, *found[:ROWS]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = ["  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    more = [f"and {len(found) - ROWS} more"] if len(found) > ROWS else []
    return "\n".join(["", *text, *more, *report(arguments)])


def of_runs(name: str, folders: Sequence[Path]) -> tuple[str, ...] | None:
    """The row of some runs; None: they wrote no scores."""
    scores, trained, retained, what = [], set(), set(), ""
    for folder in folders:
        try:
            result = results.read(folder / "result.json")
        except UsageError:
            if (folder / "suite.json").is_file():
                scores.append(number(json.loads((folder / "suite.json").read_text())["mean"]))
                what = "mean of the groups"
            continue
        what = result["metric"] or ""
        scores += [number(result["test"][what])] if what in (result["test"] or {}) else []
        trained.add(result["account"]["trained"])
        retained.add(result["account"]["retained"])
    if not scores:
        return None
    show = (lambda value: f"{value:.3g}") if what in PLAIN else percent
    spread = f" ± {show(stdev(scores))}" if len(scores) > 1 else ""
    unit = "" if what in PLAIN else " %"
    sizes = " to ".join(f"{size:,}" for size in sorted({min(trained), max(trained)})) if trained else ""
    kept = " to ".join(f"{percent(share)} %" for share in sorted({min(retained), max(retained)})) if retained else ""
    return name, str(len(scores)), f"{show(mean(scores))}{spread}{unit}", f"test {worded(what)}", sizes, kept


def report(arguments: Sequence[str]) -> list[str]:
    """How an experiment's table is shown beside the paper's."""
    named = [a.partition("=")[2] for a in arguments if a.startswith("experiment=")]
    others = [a for a in arguments if not a.startswith(("experiment=", "hydra", "trainer.progress", "logger", "retry"))]
    return [f"beside the paper's: python -m recombine.report {shlex.join([*named, *others])}"] if named else []
