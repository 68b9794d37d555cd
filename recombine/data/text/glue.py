"""GLUE (arXiv 1804.07461): the eight tasks of CERSA Tab. 8, out of parquet files.

hub id nyu-mll/glue, revision bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c: ``<task>/<split>-00000-of-00001.parquet`` with
the columns below, ``label`` (a ClassLabel with these names in this order; float32 for stsb) and ``idx``. ``data.root``
takes a copy of that repository, the hub's own conversion (``<task>/<split>/0000.parquet``), or ``<task>`` folders that
``datasets`` wrote with ``save_to_disk``.

The test labels are hidden (-1), so papers report on validation, which is ``test`` here. Paper (CERSA): does not say
what chooses the epoch. Here: a seeded tenth of train; ``data.select=test`` is the usual, optimistic way, ``last`` none.
MNLI's test is matched and mismatched: one run gives ``acc_m``, ``acc_mm``, their mean ``m+mm`` and ``acc`` over all
rows. Paper: "overall matched and mismatched accuracy", the mean or all rows. Here: the mean is the metric; on the whole
sets the two differ by less than a thousandth of acc_m - acc_mm. ``task=mnli_matched``, ``mnli_mismatched``: one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recombine.data import hub
from recombine.data.base import require_known
from recombine.data.readers import arrow_table
from recombine.data.text.base import HELD_OUT, TextData, TextSource
from recombine.errors import UsageError
from recombine.runtime.kinds import Name, Place, Word

REPOSITORY, REVISION = "nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
LICENCE = "each task its own, see the GLUE data sets' pages"


@dataclass(frozen=True)
class Task:
    """What GLUE says of a task."""

    columns: tuple[str, ...]
    classes: tuple[str, ...]  # (): a number
    scores: tuple[str, ...]
    sizes: dict[str, int]  # rows of train and of the validation sets
    folder: str | None = None  # of its files, where it is not the task's name


PAIR = ("sentence1", "sentence2")
ACC = ("acc", "balanced_acc")
NLI = Task(
    ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("m+mm", "acc", "acc_m", "acc_mm"),
    {"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832}, "mnli",
)  # fmt: skip
TASKS = {
    "mnli": NLI,
    "mrpc": Task(PAIR, ("not_equivalent", "equivalent"), (*ACC, "f1"), {"train": 3668, "validation": 408}),
    "stsb": Task(PAIR, (), ("pearson", "spearman"), {"train": 5749, "validation": 1500}),
    "rte": Task(PAIR, ("entailment", "not_entailment"), ACC, {"train": 2490, "validation": 277}),
    "sst2": Task(("sentence",), ("negative", "positive"), ACC, {"train": 67349, "validation": 872}),
    "qnli": Task(
        ("question", "sentence"), ("entailment", "not_entailment"), ACC, {"train": 104743, "validation": 5463}
    ),
    "qqp": Task(
        ("question1", "question2"), ("not_duplicate", "duplicate"), (*ACC, "f1"), {"train": 363846, "validation": 40430}
    ),
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("mcc", *ACC), {"train": 8551, "validation": 1043}),
}
SUITE = tuple(TASKS)
for part, other in (("matched", "mismatched"), ("mismatched", "matched")):
    sizes = {split: count for split, count in NLI.sizes.items() if split != f"validation_{other}"}
    TASKS[f"mnli_{part}"] = replace(NLI, scores=ACC, sizes=sizes)


class Glue(TextData):
    """A task of TASKS.

    Args (besides those of `TextData`):
        root: a folder of the user's; None: the hub.
        revision: a commit of the hub's repository; None: REVISION.

    Raises:
        UsageError: an unknown task; and, once the rows are read, what is wrong with their files.
    """

    name = group = "glue"
    label, experiment = "GLUE", "cersa/tab08"
    task_labels = {
        "mnli": "MNLI", "mrpc": "MRPC", "stsb": "STS-B", "rte": "RTE", "sst2": "SST-2", "qnli": "QNLI", "qqp": "QQP",
        "cola": "CoLA", "mnli_matched": "MNLI matched", "mnli_mismatched": "MNLI mismatched",
    }  # fmt: skip
    suite = dict.fromkeys(SUITE, "glue")

    def __init__(self, *, task: Word, root: Place | None = None, revision: Name | None = None, **kwargs):
        require_known("data.task", "GLUE task", task, TASKS)
        super().__init__(task=task, **kwargs)
        self.row = TASKS[task]
        self.classes, self.scores = list(self.row.classes) or None, self.row.scores
        self.root, self.revision = None if root is None else Path(root).expanduser(), revision or REVISION

    @property
    def foreseen(self) -> dict[str, int]:
        train, *tests = [min(size, self.limit or size) for size in self.row.sizes.values()]
        held = max(1, round(HELD_OUT * train)) if self.select == "val" else 0
        val = {"val": held or sum(tests)} if self.select != "last" else {}
        return {"train": train - held, "test": sum(tests)} | val

    @property
    def folder(self) -> Path:
        """Where the splits of the task lie."""
        inside = self.row.folder or self.task
        if self.root is not None:
            return self.root / inside if (self.root / inside).is_dir() else self.root
        ways = f"connect once, or give data.root=FOLDER with {inside}/train-*.parquet, or take data=sentences"
        return (
            hub.local_or_hub(f"glue {self.task}", None, REPOSITORY, self.commit, [f"{inside}/*.parquet"], ways) / inside
        )

    @cached_property
    def commit(self) -> str:
        """Of the hub's repository."""
        try:
            return hub.commit(REPOSITORY, self.revision)
        except UsageError as error:
            raise UsageError(f"data.revision={self.revision}: {error}") from error

    def identity(self) -> str:
        if self.root is None:
            return f"glue {self.task} {self.commit}"
        digest = hashlib.sha256()
        for split in self.row.sizes:
            for path in files(self.folder, split):
                stat = path.stat()
                digest.update(f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return f"glue {self.task} {digest.hexdigest()}"

    def source(self) -> TextSource:
        parts = {split: self._read(split) for split in self.row.sizes}
        sizes = {split: len(labels) for split, (_, labels) in parts.items()}
        differences = tuple(
            f"{split} has {sizes[split]} rows, GLUE's has {count}: no number on it is GLUE's"
            for split, count in self.row.sizes.items()
            if sizes[split] != count
        )
        named = dict(zip(("train", "test", "test_more"), parts.values(), strict=False))
        counted = ", ".join(f"{split} {count}" for split, count in sizes.items())
        note = f"{self.root or f'{REPOSITORY}@{self.commit[:8]}'}: {counted}; test is {' + '.join(list(parts)[1:])}"
        return TextSource(LICENCE, named, note, differences)

    @property
    def info(self) -> dict[str, Any]:
        hub_or_folder = {"hub": REPOSITORY, "commit": self.commit} if self.root is None else {"root": str(self.root)}
        return super().info | hub_or_folder

    def _read(self, split: str) -> tuple[list[tuple[str, ...]], np.ndarray]:
        """Rows and labels of a split; what is wrong with its files in one line."""
        folder = self.folder
        if not (paths := files(folder, split)):
            raise UsageError(
                f"glue {self.task}: no {split} in {folder}: there must be {split}-00000-of-00001.parquet, or what "
                f"save_to_disk writes"
            )
        tables = [self._table(path) for path in paths]
        texts = ([text for table in tables for text in table[c].to_pylist()] for c in self.row.columns)
        labels = np.concatenate([table["label"].to_numpy() for table in tables])
        return list(zip(*texts, strict=True)), labels.astype(np.int64 if self.classes else np.float32)

    def _table(self, path: Path) -> pa.Table:
        """A file with the task's columns, or what is wrong with it in one line."""
        table = arrow_table(path)
        for column in (*self.row.columns, "label"):
            if column not in table.column_names:
                has = ", ".join(table.column_names)
                raise UsageError(f"{path} has no column {column!r} but {has}: is it another task's?")
            if nulls := table[column].null_count:
                raise UsageError(f"{path}: column {column!r} has {nulls} empty cells: fetch it again")
        for column in self.row.columns:
            if not (pa.types.is_string(table[column].type) or pa.types.is_large_string(table[column].type)):
                raise UsageError(f"{path}: column {column!r} is {table[column].type}, not text")
        number = pa.types.is_integer if self.classes else pa.types.is_floating
        if not number(kind := table["label"].type):
            raise UsageError(f"{path}: column 'label' is {kind}: must be {'class numbers' if self.classes else 'real'}")
        schema = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        names = (schema.get("features", {}).get("label") or {}).get("names")
        if self.classes and names is not None and names != self.classes:
            raise UsageError(f"{path} numbers its classes {', '.join(names)}: GLUE's are {', '.join(self.classes)}")
        return table


def files(folder: Path, split: str) -> list[Path]:
    """The files of a split in any of the three layouts."""
    paths = sorted(folder.glob(f"{split}-*.parquet")) or sorted((folder / split).glob("*.parquet"))
    paths = paths or [path for path in (folder / f"{split}.parquet",) if path.is_file()]
    return paths or sorted((folder / split).glob("data-*.arrow"))  # save_to_disk
