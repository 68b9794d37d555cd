"""The paper's printed numbers, from experiments/<paper>/<table>.csv: one number a line, with corrections and doubts.

    paper:
      file: experiments/cersa/tab09_vitb_8datasets.csv
      where: {metric: top1}                     # the lines that count; the keys below add to this
      rows: {"CERSA (α = 0.9)": CERSA}          # our label -> the file's `row`, or {column: value, ...}
      columns: {cifar100: CIFAR-100}            # -> `dataset`
      values: {latency (ms): latency}           # -> `metric`
      means: {mean: Avg}                        # -> `dataset`
      extra: {memory (MiB): memory}             # -> the column of the row's lines that has it, or {column: value}
      compare: order                            # compare the order of the rows only; the default is difference

A label that is not named is looked up as it is. Where a table has several `values`, one that is not named has no number
of the paper.
"""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from recombine.errors import UsageError
from recombine.runner.grid import CONF

KEYS = ("file", "where", "rows", "columns", "values", "means", "extra", "compare")
Selector = Mapping[str, Any]


class Number(NamedTuple):
    """A number of the paper, corrected where the paper contradicts itself, and why it is doubtful."""

    text: str  # its digits as printed
    value: float
    doubt: str


@dataclass
class Paper:
    """The numbers of one table. `spec` is the `paper` of an experiment's report."""

    spec: Mapping[str, Any]
    lines: list[dict[str, str]] = field(init=False)

    def __post_init__(self):
        if unknown := set(self.spec) - set(KEYS):
            raise UsageError(f"report.paper.{unknown.pop()}: there is no such key; it takes {', '.join(KEYS)}")
        if "file" not in self.spec:
            raise UsageError("report.paper: needs file, for example experiments/cersa/tab09_vitb_8datasets.csv")
        if (how := self.spec.get("compare", "difference")) not in ("difference", "order"):
            raise UsageError(f"report.paper.compare={how}: must be difference or order")
        path = CONF.parent / self.spec["file"]
        try:
            with path.open(newline="") as file:
                self.lines = list(csv.DictReader(file))
        except OSError as error:
            raise UsageError(f"report.paper.file={self.spec['file']}: {error.strerror}") from error
        self.where = self.spec.get("where", {})
        for label, selected in self.spec.get("rows", {}).items():
            if not self.find(select(selected, "row")):
                raise UsageError(f"report.paper.rows: {label}: {selected} is no row of {self.spec['file']}")

    @property
    def compares(self) -> bool:
        """Whether a difference to ours means anything."""
        return self.spec.get("compare", "difference") == "difference"

    def cell(self, row: str, column: str | None, value: str) -> Number | None:
        """The number of a row, a column (None: the table has none) and a measured value."""
        wanted = self.row(row) | (self.named("columns", column, "dataset") if column is not None else {})
        return self.look_up(wanted | self.metric(value))

    def mean(self, row: str, mean: str, value: str) -> Number | None:
        """The number of a row and a mean over columns."""
        return self.look_up(self.row(row) | self.named("means", mean, "dataset") | self.metric(value))

    def metric(self, value: str) -> dict[str, Any]:
        """How the file names a measured value; nothing where it need not."""
        return self.named("values", value, "metric") if value in self.spec.get("values", {}) else {}

    def extra(self, row: str, extra: str) -> Number | None:
        """The number of a row that stands once a row."""
        selected = self.spec.get("extra", {}).get(extra)
        if isinstance(selected, Mapping):
            return self.look_up(self.row(row) | dict(selected))
        lines = self.find(self.row(row)) if selected else []
        if selected and selected not in self.lines[0]:
            raise UsageError(f"report.paper.extra: {extra}: {self.spec['file']} has no column {selected}")
        numbers = {line[selected]: self.number(line, selected) for line in lines if line[selected]}
        return self.single(list(numbers.values()), f"{row}, {selected}")

    def row(self, label: str) -> dict[str, Any]:
        """How the file names a row."""
        return dict(self.where) | self.named("rows", label, "row")

    def named(self, kind: str, label: str, column: str) -> dict[str, Any]:
        """How the file names a label. kind: rows, columns, values or means; column: where the label stands."""
        return select(self.spec.get(kind, {}).get(label, label), column)

    def look_up(self, wanted: Selector) -> Number | None:
        return self.single([self.number(line, "value") for line in self.find(wanted)], str(dict(wanted)))

    def find(self, wanted: Selector) -> list[dict[str, str]]:
        """The lines that have these values."""
        if unknown := wanted.keys() - self.lines[0].keys():
            raise UsageError(f"report.paper: {self.spec['file']} has no column {unknown.pop()}")
        asked = {key: str(value) for key, value in wanted.items()}.items()
        return [line for line in self.lines if asked <= line.items()]

    def single(self, numbers: list[Number | None], what: str) -> Number | None:
        """The only number; None where there is none."""
        if len(numbers) > 1:
            raise UsageError(
                f"report.paper: {self.spec['file']} has {len(numbers)} lines for {what}; say more in `where`"
            )
        return numbers[0] if numbers else None

    def number(self, line: Mapping[str, str], column: str) -> Number | None:
        """The number in a column of a line, as corrected. A doubt that begins with a column's name is that column's."""
        if not (match := re.search(r"-?\d+(\.\d+)?", line[column])):
            return None
        about, doubt = re.match(r"(\w+): (.*)", line["doubt"]), line["doubt"]
        if about and about[1] in line:  # of that column, not of the value
            doubt = about[2] if about[1] == column else ""
        elif column != "value":
            doubt = ""
        text = line["corrected"] if column == "value" and line["corrected"] else match[0]
        return Number(text, float(text), doubt)


def select(selected: Any, column: str) -> dict[str, Any]:
    """{column: value, ...} of a selection that may name the value alone."""
    return dict(selected) if isinstance(selected, Mapping) else {column: selected}
