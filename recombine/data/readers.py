"""Rows of text out of parquet, arrow and JSON files. What is wrong with a file is said in one line that names it."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recombine.errors import UsageError, first_line


def arrow_table(path: Path) -> pa.Table:
    """A parquet file, or an arrow file as ``datasets`` writes it.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"cannot read {path}: {first_line(error)}; fetch it again") from error


def table(files: Sequence[Path], columns: tuple[str, ...], wanted: str) -> list[dict[str, str]]:
    """The rows of parquet or JSON files (an array, or a row a line).

    Args:
        files: .parquet, .json or .jsonl; their rows follow each other.
        columns: must be in every row, and must be text.
        wanted: what is missing if there are no files, e.g. "commonsense_170k.json in FOLDER".

    Raises:
        UsageError: there is no file, or one that cannot be read, or a row without these columns.
    """
    if not files:
        raise UsageError(f"no {wanted}: put it there")
    rows = []
    for path in files:
        try:
            read = _rows(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UsageError(f"cannot read {path}: {first_line(error)}; download it again") from error
        for number, row in enumerate(read):
            for column in columns:
                if not isinstance(row, dict) or column not in row:
                    has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                    raise UsageError(f"{path}, row {number} has no column {column!r} but {has}: is it another set?")
                if not isinstance(row[column], str):
                    kind = type(row[column]).__name__
                    raise UsageError(f"{path}, row {number}: column {column!r} is {kind}, not text: is it another set?")
        rows += read
    return rows


def lines(path: Path) -> Iterator[str]:
    """The column ``text`` of a gzip file with a JSON row a line, one row at a time.

    Raises:
        UsageError: there is no such file, it breaks off before its end, or a row has no text.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file):
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise UsageError(f"{path}, row {number} has no column 'text' of text: is it another set?")
                yield row["text"]
    except FileNotFoundError:
        raise UsageError(f"no {path}: put it there") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UsageError(f"cannot read {path}: {first_line(error)}; download it again") from error


def _rows(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)
