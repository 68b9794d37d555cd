"""Data sets as rows of a table, which one class reads.

Three ways in, the same for each row: its hub repository at its commit; ``root/<task>`` with that repository's parquet
files, or what ``datasets`` saved of it; ``root/<task>`` with train/<class>/*, test/<class>/* and perhaps val/<class>/*.

Protocols, none of which the papers print: ``split="official"`` takes the set's own splits, and a tenth of train for
validation where it has none; ``split="80/20"`` is RECAST's, everything pooled and a fifth of every class for test.
``select="val"`` keeps the epoch that validation likes best; ``select="last"`` trains on train and validation together
and keeps the last. Cuts are stratified and drawn with seed 0 whatever the run's seed: runs share their data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from recombine.data import hub
from recombine.data.base import require_known
from recombine.data.sampling import cut_sizes, shuffled, stratified
from recombine.data.vision import parquet
from recombine.data.vision.base import VisionData
from recombine.data.vision.folder import OFFICIAL, is_tree, splits, stamp
from recombine.data.vision.source import Part, Source, decoded, join
from recombine.errors import UsageError
from recombine.runtime.kinds import Name, Place, Word

HOLDOUT = 0.1  # of train, for validation
NORMS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "model": (None, None)}
NORMS |= {"0.5": ((0.5,) * 3, (0.5,) * 3)}


@dataclass(frozen=True)
class Row:
    """A data set as its hub repository holds it."""

    classes: int
    repository: str
    revision: str  # a commit, or a branch, whose commit a result then names
    sizes: Mapping[str, int]  # pictures in each of the repository's splits
    files: str = "data/{split}-*.parquet"
    image: str = "image"
    label: str = "label"
    splits: Mapping[str, str] = field(default_factory=lambda: OFFICIAL)  # ours -> the repository's
    share: float = 1.0  # of train that is used
    licence: str = "as the repository says"
    note: str = ""


class Suite(VisionData):
    """A row of ``rows``; a subclass is one table.

    Args (besides those of `VisionData`):
        task: the row.
        root: a folder of the user's; None: the hub.
        revision: a commit of the hub's repository; None: the row's.
        split: "official" or "80/20".
        select: "val" or "last".
        normalize: "model", "imagenet" or "0.5".

    Raises:
        UsageError: a value that is none of these; and, once the pictures are looked for, what is wrong with them.
    """

    rows: ClassVar[dict[str, Row]]
    papers: ClassVar[dict[str, tuple[str, int, int]]] = {}  # task -> a paper's table, its classes, its pictures
    protocols: ClassVar[tuple[str, ...]] = ("official", "80/20")
    complete = True  # every class must be in train and in test
    expects = "expected"  # how many pictures a split should have, in words

    def __init__(
        self,
        *,
        task: Word,
        root: Place | None = None,
        revision: Name | None = None,
        split: Word = "official",
        select: Literal["val", "last"] = "val",
        normalize: Word = "model",
        **kwargs,
    ):
        require_known("data.task", f"{self.name} task", task, self.rows, ", all")
        for key, value, known in (
            ("split", split, self.protocols), ("select", select, ("val", "last")), ("normalize", normalize, NORMS),
        ):  # fmt: skip
            if str(value) not in known:
                raise UsageError(f"data.{key}={value}: must be one of {', '.join(known)}")
        self.split, self.select, self.norm = str(split), select, str(normalize)
        mean, std = NORMS[self.norm]
        super().__init__(task=task, **{"mean": mean, "std": std} | kwargs)
        self.root = None if root is None else Path(root).expanduser()
        self.row = self.rows[task]
        self.revision = revision or self.row.revision
        self.commit = self.revision if len(self.revision) == 40 else None
        self.group, self.num_classes = self.suite[task], self.row.classes
        self.merge_train_val = select == "last"
        self.cutting = self.split  # what the pictures of train, val and test depend on
        self._listing: tuple[list[str], dict[str, Part], str, tuple[str, ...]] | None = None

    # Where the pictures are

    def folder(self) -> Path:
        """The user's folder of the task, or the hub's snapshot."""
        if self.root is not None:
            folder = self.root / self.task
            if not folder.is_dir() and len(self.rows) == 1:
                folder = self.root
            if not folder.is_dir():
                raise UsageError(self.ways(f"there is no folder {folder}"))
            return folder
        return self.snapshot(self.patterns())

    def pinned(self) -> str:
        """The commit of the hub's repository. A branch is asked for once, or is where it was when it last was."""
        try:
            self.commit = self.commit or hub.commit(self.row.repository, self.revision)
        except UsageError as error:
            raise UsageError(self.ways(f"the hub gives nothing ({error})")) from error
        return self.commit

    def snapshot(self, patterns: list[str]) -> Path:
        """The files of the hub's repository that the patterns name."""
        at = self.pinned()
        try:
            return hub.download(self.row.repository, at, patterns)
        except UsageError as error:
            raise UsageError(self.ways(f"the hub gives nothing ({error})")) from error

    def patterns(self) -> list[str]:
        """What the row's files are called."""
        return [self.row.files.format(split=split) for split in self.row.sizes]

    def ways(self, trouble: str) -> str:
        """The error line for pictures that are not there: the trouble, and the three ways to have them."""
        at = self.revision[:12] if len(self.revision) == 40 else self.revision
        return (
            f"no pictures for {self.task}: {trouble}; three ways in: the hub's {self.row.repository} at "
            f"{at} (network, and a login where it is gated), data.root=FOLDER where {self.task}/ holds "
            f"its parquet or arrow files, or data.root=FOLDER with {self.task}/train/<class>/*, {self.task}/"
            f"{self.row.splits['test']}/<class>/*"
        )

    def read(self, folder: Path) -> tuple[list[str] | None, dict[str, Part], list[Path]]:
        """Class names if the files have them, the pictures of every split there is, and files to watch for changes."""
        if is_tree(folder):
            return *splits(folder, self.row.splits), []
        if files := parquet.tables(folder, self.patterns()):
            wanted = {ours: files[theirs] for ours, theirs in self.row.splits.items() if theirs in files}
            classes, parts = parquet.read(folder, wanted, self.row.image, self.row.label)
            return classes, parts, [path for paths in wanted.values() for path in paths]
        raise UsageError(self.ways(f"{folder} has neither parquet or arrow files nor class folders in train"))

    # What a run uses of them

    def listing(self) -> tuple[list[str], dict[str, Part], str, tuple[str, ...]]:
        """Class names, the pictures of train, val and test, what identifies them, and differences from the papers."""
        if self._listing is None:
            folder = self.folder()
            names, parts, watched = self.read(folder)
            classes = self.checked(names, parts, folder)
            differences = tuple(self.differences(parts))
            parts = self.cut(parts)
            mark = f"{self.row.repository}@{self.commit}" if self.root is None else stamp(parts, watched)
            self._listing = classes, parts, mark, differences
        return self._listing

    def checked(self, names: list[str] | None, parts: dict[str, Part], folder: Path) -> list[str]:
        """The class names, once there are as many as there should be and every label is one of them."""
        count = self.row.classes
        for ours in ("train", "test"):
            if ours not in parts:
                raise UsageError(self.ways(f"{folder} has no {self.row.splits[ours]} split"))
        if names is not None and len(names) != count:
            raise UsageError(f"{folder} has {len(names)} classes, {self.task} has {count}: give the whole set")
        for split, part in parts.items():
            if len(wrong := np.flatnonzero((part.labels < 0) | (part.labels >= count))):
                where = f"label {part.labels[wrong[0]]} of picture {wrong[0]} in {split} of {folder}"
                raise UsageError(f"{where} is out of range: use 0 .. {count - 1}")
            gone = np.flatnonzero(np.bincount(part.labels, minlength=count) == 0)
            if self.complete and split != "val" and len(gone):
                missing = repr(names[gone[0]]) if names else gone[0]
                raise UsageError(
                    f"{folder}: no picture of class {missing} in {split} ({len(gone)} missing): restore it"
                )
        return names or [str(i) for i in range(count)]

    def differences(self, parts: dict[str, Part]) -> list[str]:
        """One line for what the repository or a paper says otherwise."""
        lines = [
            f"{len(parts[ours])} pictures in {ours}, {self.expects} {expected}"
            for ours, theirs in self.row.splits.items()
            if ours in parts and len(parts[ours]) != (expected := self.row.sizes[theirs])
        ]
        if self.task in self.papers:
            table, classes, pictures = self.papers[self.task]
            total = sum(map(len, parts.values()))
            if (classes, pictures) != (self.num_classes, total):
                here = f"here {self.num_classes} and {total}"
                note = f" ({self.row.note})" if self.row.note else ""
                lines.append(f"{table} prints {classes} classes and {pictures} pictures, {here}{note}")
        return lines

    def cut(self, parts: dict[str, Part]) -> dict[str, Part]:
        """Train, val and test, out of the set's own splits, by the protocol."""
        train = parts["train"]
        if self.split == "80/20":
            rest, test = _divide(join(list(parts.values())), 0.2)
            train, val = _divide(rest, HOLDOUT)
            return {"train": train, "val": val, "test": test}
        if self.row.share < 1:
            train = train.take(np.sort(shuffled(len(train), 0)[: math.ceil(self.row.share * len(train))]))
        val = parts.get("val")
        if val is None:
            train, val = _divide(train, HOLDOUT)
        return {"train": train, "val": val, "test": parts["test"]}

    @property
    def foreseen(self) -> dict[str, int]:
        known = {ours: self.row.sizes[theirs] for ours, theirs in self.row.splits.items() if theirs in self.row.sizes}
        cut = cut_sizes(known, self.split == "80/20", self.row.share, HOLDOUT, self.merge_train_val)
        return {split: min(size, self.limit or size) for split, size in cut.items()}

    def identity(self) -> str:
        """On the hub it needs no files, and at a commit no network."""
        mark = f"{self.row.repository}@{self.pinned()}" if self.root is None else self.listing()[2]
        mark += " stratified" * (self.limit is not None)
        return f"{self.name} {self.task} {self.row.image} {self.row.label} {mark} {self.cutting} {self.row.share}"

    def source(self) -> Source:
        classes, parts, _, differences = self.listing()
        return Source(classes, self.row.licence, decoded(parts, self.limit), self.row.note, differences)

    @property
    def info(self) -> dict[str, Any]:
        hub = {"hub": self.row.repository, "commit": self.commit}
        protocol = {"split": self.split, "select": self.select, "normalize": self.norm}
        return super().info | (hub if self.root is None else {"root": str(self.root)}) | protocol


def _divide(part: Part, share: float) -> tuple[Part, Part]:
    """(the rest, a stratified share), both in their old order."""
    if not (count := round(share * len(part))):
        raise UsageError(f"{len(part)} pictures are too few to hold out {share:.0%} of them: give the whole set")
    taken = np.zeros(len(part), bool)
    taken[stratified(part.labels, count, 0)] = True
    return part.take(np.flatnonzero(~taken)), part.take(np.flatnonzero(taken))
