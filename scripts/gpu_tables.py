"""Numbers and tables of scripts/gpu_report.py."""

from recombine.core.account import MIB


def gigabytes(mib: float | None) -> float | None:
    """10^9 bytes."""
    return None if mib is None else mib * MIB / 1e9


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "–" if value is None else f"{value:.4g}"


def beside(value: float | None, other: float | None) -> str:
    """A number and, in brackets, the one that it is compared with."""
    return number(value) if other is None else f"{number(value)} ({number(other)})"


def slug(label: str) -> str:
    """A label as the name of a folder."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in label)


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
