"""The report of an experiment: its runs as slim records, its table beside the paper's, its plots.

    report = load("cersa/tab09")
    print(render.text(report.table))
    save(report)

Nothing here imports torch, so a thousand results take about a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recombine import results
from recombine.errors import UsageError
from recombine.report import records, render, table
from recombine.report.records import CONFIG, RUNS, Runs
from recombine.report.table import Table
from recombine.runner import grid
from recombine.runner.grid import Experiment
from recombine.runtime.atomic import atomic_write


@dataclass(frozen=True)
class Report:
    """An experiment, the runs that exist of its cells, and its table. `experiment.report` is the YAML's `report`."""

    experiment: Experiment
    runs: Runs
    table: Table

    @property
    def folder(self) -> Path:
        """The folder of its committed evidence."""
        return records.EVIDENCE / self.experiment.name

    @property
    def committed(self) -> bool:
        """Whether these runs are those of the committed evidence, which the READMEs speak of."""
        path = self.folder / RUNS
        return path.is_file() and path.read_text() == records.dump(self.runs.records)


def load(name: str, overrides: Sequence[str] = ()) -> Report:
    """The report of an experiment, from what has been run so far.

    Args:
        name: a file of conf/experiment, for example "cersa/tab09".
        overrides: further key=value, as the runs were started with.

    Raises:
        UsageError: there is no such experiment, it has no grid or report, or a file cannot be read.
    """
    return build(grid.load(name, overrides))


def build(experiment: Experiment) -> Report:
    """The report of an experiment that is composed already."""
    if not experiment.grid or not experiment.report:
        raise UsageError(f"experiment={experiment.name}: has no grid and report, so there is no table to show")
    runs = records.read(experiment)
    return Report(experiment, runs, table.build(experiment.name, experiment.report, runs))


def save(report: Report) -> list[Path]:
    """Writes the evidence into experiments/<name>: the records, the table in three formats, the plots, and a sheet of
    what models drew.

    Raises:
        UsageError: the report covers a part of the grid only, or there are no results yet.
    """
    if report.experiment.overrides:
        raise UsageError(
            f"--save {' '.join(report.experiment.overrides)}: the evidence is the whole grid; leave these out"
        )
    if not report.runs.records:
        raise UsageError(
            f"--save: {report.experiment.name} has no results yet; python run.py experiment=... makes them"
        )
    kept = {record["cell"] for record in records.lines(report.folder / RUNS)}
    for cell, why in {**report.runs.unread, **report.runs.other}.items():
        path = report.experiment.folder / cell / "result.json"
        if cell in kept and path.is_file():
            lost = "the committed result of that cell would be lost"
            raise UsageError(f"--save: {path} is left out ({why}), and {lost}; move it")
    from recombine.report import contact_sheet, plots  # matplotlib takes a second

    texts = {
        RUNS: records.dump(report.runs.records),
        CONFIG: results.dumps(records.common(report.experiment)[0], indent=1, ensure_ascii=False) + "\n",
        "table.md": render.markdown(report.table),
        "table.tex": render.latex(report.table),
        "table.csv": render.as_csv(report.table),
    }
    report.folder.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        with atomic_write(report.folder / name) as temporary:
            temporary.write_text(content)
    drawn = contact_sheet.save(report.experiment, report.runs.records, report.folder)
    return (
        [report.folder / name for name in texts]
        + drawn
        + plots.save(report.experiment.report.get("plots") or {}, report.runs, report.folder)
    )
