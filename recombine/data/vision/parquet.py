"""Pictures out of parquet or arrow files, as the Hugging Face hub and the ``datasets`` library write them.

The files are a snapshot of a hub repository or a clone of it, or what ``save_to_disk`` or the library's cache wrote:
the name of a file or of a folder above it says which split it is of.

Rows are read where they lie, a row group or a mapped batch at a time: nothing is unpacked into a second copy, which for
ImageNet would be 150 GB. Column types and class names come from the schema that ``datasets`` leaves in every file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recombine.data.vision.source import Part
from recombine.errors import UsageError, first_line

SPLIT = re.compile(r"(?<![a-z0-9])(train|validation|valid|val|test)(?:800|200)?(?![a-z0-9])")
SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})")


def tables(folder: Path, patterns: list[str]) -> dict[str, list[Path]]:
    """split (train, validation, test) -> its files: those that the patterns name, else all parquet or arrow files.

    Raises:
        UsageError: shards are missing.
    """
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    for suffix in ("parquet", "arrow"):
        files = files or sorted(p for p in folder.rglob(f"*.{suffix}") if not p.name.startswith(("cache-", ".")))
    splits: dict[str, list[Path]] = {}
    for path in files:
        inside = path.relative_to(folder)
        names = (inside.name.removesuffix(inside.suffix), *reversed(inside.parent.parts))
        for name in names:
            if match := SPLIT.search(name.lower()):
                splits.setdefault({"valid": "validation", "val": "validation"}.get(match[1], match[1]), []).append(path)
                break
    _require_all_shards([path for paths in splits.values() for path in paths])
    return splits


def _require_all_shards(files: list[Path]) -> None:
    """Refuses a split of which a shard is missing that the other shards' names promise."""
    shards = Counter((p.parent, m[1], int(m[2])) for p in files if (m := SHARD.fullmatch(p.stem)))
    for (folder, name, of), count in shards.items():
        if count != of:
            raise UsageError(f"{folder} has {count} of the {of} shards of {name}: download the others")


def read(
    folder: Path, files: dict[str, list[Path]], image: str, label: str
) -> tuple[list[str] | None, dict[str, Part]]:
    """Class names, or None where the files have none, and the pictures of every split.

    Args:
        folder: where the files are from, for errors.
        files: of every split, as `tables` finds them.
        image, label: the columns of the pictures and of their classes.

    Raises:
        UsageError: a file cannot be read, or is of another set.
    """
    classes: list[str] | None = None
    parts = {}
    for split, paths in files.items():
        labels = []
        for path in paths:
            schema = _schema(path)
            for column in (image, label):
                if column not in schema.names:
                    raise UsageError(
                        f"{path} has no column {column!r} but {', '.join(schema.names)}: is it another set?"
                    )
            feature = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
            names = (feature.get(label) or {}).get("names")
            if classes is not None and names is not None and names != classes:
                raise UsageError(f"{path} has other class names than the files before it: they must be of one set")
            classes = classes or names
            values = _column(path, None, label)
            if not pa.types.is_integer(values.type) or values.null_count:
                kind = f"{values.type} with {values.null_count} nulls"
                raise UsageError(f"{path}: column {label!r} is {kind}, not class numbers: is it another set?")
            labels.append(values.to_numpy())
        parts[split] = Part(Rows(paths, image, f"of {split} in {folder}"), np.concatenate(labels).astype(np.int64))
    return classes, parts


class Rows(Sequence):
    """The encoded pictures of some files by row: (where it is from, bytes), or a path. Two blocks are kept, so read it
    in order."""

    def __init__(self, files: list[Path], column: str, where: str):
        self.column, self.where = column, where
        counts = [(path, block, count) for path in files for block, count in enumerate(_blocks(path))]
        self.blocks = [(path, block) for path, block, _ in counts]
        self.starts = np.array([0, *accumulate(count for *_, count in counts)])
        self._lock = Lock()
        self._block = lru_cache(2)(lambda at: _column(*self.blocks[at], column))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, row: int) -> tuple[str, bytes] | Path:
        at = int(np.searchsorted(self.starts, row, side="right")) - 1
        with self._lock:  # threads that decode wait for one reader
            cell = self._block(at)[int(row - self.starts[at])].as_py()
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str):
            return Path(cell)
        if not isinstance(cell, bytes):
            kind = type(cell).__name__
            raise UsageError(
                f"row {row} {self.where}: column {self.column!r} holds no picture but {kind}: name another"
            )
        return f"row {row} {self.where}", cell


def _guard(read):
    """A damaged file in one line."""

    def guarded(path: Path, *args):
        try:
            return read(path, *args)
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"cannot read {path}: {first_line(error)}; download it again") from error

    return guarded


@_guard
def _schema(path: Path) -> pa.Schema:
    return pq.read_schema(path) if path.suffix == ".parquet" else _stream(path).schema


@_guard
def _blocks(path: Path) -> list[int]:
    """Rows of every row group or batch."""
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return [batch.num_rows for batch in _batches(path)]


@_guard
def _column(path: Path, block: int | None, column: str) -> pa.ChunkedArray | pa.Array:
    """A column of one block, or of the whole file."""
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            table = file.read(columns=[column]) if block is None else file.read_row_group(block, columns=[column])
            return table[column]
    batches = _batches(path)
    return pa.chunked_array(
        [batch.column(column) for batch in (batches if block is None else batches[block : block + 1])]
    )


def _stream(path: Path) -> pa.RecordBatchReader:
    return pa.ipc.open_stream(pa.memory_map(str(path)))


@lru_cache(64)
def _batches(path: Path) -> list[pa.RecordBatch]:
    return list(_stream(path))
