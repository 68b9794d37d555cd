"""The SVG files of an experiment's plots, and whether they show what there is now. Nothing here imports matplotlib."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recombine.report import records
from recombine.report.records import Runs


def digest(name: str, given: Mapping[str, Any], runs: Runs) -> str:
    """What a plot is drawn from, as 16 digits: its name, its options, the grid and the records."""
    drawn_from = json.dumps([name, given, runs.cells], sort_keys=True) + records.dump(runs.records)
    return hashlib.sha256(drawn_from.encode()).hexdigest()[:16]


def kept(path: Path, key: str) -> str | None:
    """The SVG in a file, if it was drawn from what `key` stands for; else None."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None
    return text if text.rstrip().endswith(closing(key)) else None


def closing(key: str) -> str:
    """The last line of a file with the SVG of that digest."""
    return f"<!-- drawn from {key} -->"
