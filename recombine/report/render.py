"""A `Table` as text for the terminal, Markdown, LaTeX (booktabs) or CSV.

Below a row that the paper has numbers for stands a row with those numbers and our difference to them. A cell without a
result is a long dash. CSV keeps the labels and axes of the grid; the other formats show words for them.
"""

import csv
import io
import re
import textwrap
from collections.abc import Callable

from recombine.report.table_data import Column, Entry, Table, shown

MISSING = "—"
GREEK = dict(α="alpha", β="beta", γ="gamma", δ="delta", ε="varepsilon", λ="lambda", μ="mu", ρ="rho", σ="sigma")
TEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{letter: rf"$\{name}$" for letter, name in GREEK.items()},
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "→": r"$\rightarrow$",
    "—": "---",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "…": r"\dots{}",
}
MARKED = re.compile(r"[\\`*_\[\]|~]")  # what Markdown would read inside a cell
Strong = Callable[[str], str]


def ours(table: Table, column: Column, entry: Entry, strong: Strong) -> str:
    """81.2 ± 1.6, the best one emphasised; with (n) where the table's entries differ in it."""
    if entry.mean is None:
        return MISSING
    spread = "" if entry.spread is None else f" ± {shown(entry.spread, entry.digits)}"
    n = "" if table.even or column.kind == "extra" else f" ({entry.n})"
    return (strong(entry.text) if entry.best else entry.text) + spread + n


def theirs(table: Table, entry: Entry) -> str:
    """80.7 (+0.5): what the paper prints, and ours less that."""
    if entry.paper is None:
        return ""
    if not table.compares or entry.difference is None:
        return entry.paper.text
    return f"{entry.paper.text} ({entry.difference:+.{max(entry.digits, 1)}f})".replace("(-", "(−")


def lines_of(table: Table, strong: Strong, paper: str) -> list[list[str]]:
    """The rows as text; the first is the head. `paper` labels the rows of the paper's numbers."""
    lines = [[*table.heads, *(column.title for column in table.columns)]]
    for row in table.rows:
        both = zip(table.columns, row.entries, strict=True)
        lines.append([*row.names, *(ours(table, column, entry, strong) for column, entry in both)])
        if any(entry.paper for entry in row.entries):
            lead = [*[""] * (len(table.axes) - 1), paper]
            lines.append([*lead, *(theirs(table, entry) for entry in row.entries)])
    return lines


def text(table: Table, colour: bool = False, width: int = 160) -> str:
    """For the terminal; without colour an asterisk marks what is best. A wider table is folded into parts, each with
    the labels of its rows."""
    lines = lines_of(table, (lambda best: f"\0{best}"), "  paper")
    n = len(table.axes)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    parts = []
    for part in fold(widths, n, width):
        columns = [*range(n), *part]
        shown = [line for line in lines if any(line[i] for i in part)]  # the paper may have nothing in these columns
        cells = [[line[i].ljust(widths[i]) if i < n else line[i].rjust(widths[i]) for i in columns] for line in shown]
        parts.append(["  ".join(line).rstrip() for line in cells])
    rule = "─" * max(len(line) for part in parts for line in part)
    shown = [line for head, *rest in parts for line in (rule, head, rule, *rest)]
    notes = [line for note in table.notes for line in textwrap.wrap(note, width, subsequent_indent="  ")]
    body = "\n".join([*textwrap.wrap(table.title, width), *shown, rule, *notes]) + "\n"
    return re.sub("\0([-0-9.]+)", "\033[1m \\1\033[0m" if colour else r"*\1", body)


def fold(widths: list[int], n: int, width: int) -> list[list[int]]:
    """The columns after the first n in parts of which each fits into the width beside those n."""
    parts: list[list[int]] = [[]]
    for i in range(n, len(widths)):
        if parts[-1] and sum(widths[j] + 2 for j in (*range(n), *parts[-1], i)) - 2 > width:
            parts.append([])
        parts[-1].append(i)
    return parts


def markdown(table: Table) -> str:
    """A table in Markdown, with its title above and its notes below."""
    lines = [[plain(cell) for cell in line] for line in lines_of(table, "\0{}\0".format, "\1paper\1")]
    lines = [[cell.replace("\0", "**").replace("\1", "*") for cell in line] for line in lines]
    n = len(table.axes)
    rule = ["---"] * n + ["---:"] * (len(lines[0]) - n)
    body = "\n".join(f"| {' | '.join(row)} |" for row in (lines[0], rule, *lines[1:]))
    notes = "\n".join(f"- {plain(note)}" for note in table.notes)
    return f"**{plain(table.title)}**\n\n{body}\n\n{notes}\n"


def plain(content: str) -> str:
    """Text as Markdown that shows just that text, on one line: no HTML, no links, no cells of its own."""
    return MARKED.sub(r"\\\g<0>", " ".join(content.split())).replace("&", "&amp;").replace("<", "&lt;")


def latex(table: Table) -> str:
    """A booktabs tabular in a table; needs \\usepackage{booktabs}."""
    bold = "\0{}\1"  # survives the escaping
    lines = lines_of(table, bold.format, r"  paper")
    n = len(table.axes)

    def cell(content: str) -> str:
        safe = "".join(TEX.get(c, c if c.isascii() else "?") for c in content)
        safe = safe.replace("\0", r"\textbf{").replace("\1", "}")
        return "{}" + safe if safe[:1] in ("[", "*") else safe  # which a line break would take for its own

    def row(line: list[str]) -> str:
        small = line[n - 1] == "  paper"
        cells = [cell(c.strip()) for c in line]
        if small:
            cells = [rf"\footnotesize {c}" if c else "" for c in cells]
            cells[n - 1] = rf"\quad {cells[n - 1]}"
        return " & ".join(cells) + r" \\"

    head, *rest = lines
    notes = "\n\n".join(cell(note) for note in table.notes)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{cell(table.title)}}}",
            rf"\begin{{tabular}}{{{'l' * n}{'r' * (len(head) - n)}}}",
            r"\toprule",
            row(head),
            r"\midrule",
            *map(row, rest),
            r"\bottomrule",
            r"\end{tabular}",
            "",
            r"\smallskip\footnotesize",
            notes,
            r"\end{table}",
            "",
        ]
    )


def as_csv(table: Table) -> str:
    """One number a line, with six digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["kind", "column", "measure", "mean", "stdev", "n", "wanted", "best", "paper", "difference", "doubt"]
    writer.writerow([*table.axes, *head])
    for row in table.rows:
        for column, entry in zip(table.columns, row.entries, strict=True):
            measured = column.measure.label if column.measure else row.labels[-1]
            paper, difference, doubt = None, None, None
            if entry.paper is not None:
                paper, doubt = entry.paper.value, entry.paper.doubt
                difference = entry.difference if table.compares else None
            ours = [None if value is None else f"{value:.6g}" for value in (entry.mean, entry.spread)]
            counts = [entry.n, entry.wanted, int(entry.best)]
            writer.writerow(
                [*row.labels, column.kind, column.label, measured, *ours, *counts, paper, difference, doubt]
            )
    return out.getvalue()


FORMATS: dict[str, Callable[[Table], str]] = {"text": text, "markdown": markdown, "latex": latex, "csv": as_csv}
