"""The papers' picture sets as tables: one row a data set, one reader for all.

    fgvc      CRISP's six (arXiv text: Tab. 2, 7-9)
    vision8   CERSA's and JACTUS's eight (arXiv 2605.08174, Tab. 7, 9)
    imagenet  2 % of ImageNet-1k to distil with, its validation set as test (CRISP Fig. 4)

Three ways in, the same for each: the row's hub repository at its commit; ``root/<task>`` with that repository's parquet
files, or what ``datasets`` saved of it; ``root/<task>`` with train/<class>/*, test/<class>/* and perhaps val/<class>/*.

Protocols, none of which the papers print: ``split="official"`` takes the set's own splits, and a tenth of train for
validation where it has none; ``split="80/20"`` is RECAST's, everything pooled and a fifth of every class for test.
``select="val"`` keeps the epoch that validation likes best; ``select="last"`` trains on train and validation together
and keeps the last. Cuts are stratified and drawn with seed 0 whatever the run's seed: runs share their data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recombine.data import hub
from recombine.data.base import SPLITS
from recombine.data.vision.base import VisionData
from recombine.data.vision.folder import OFFICIAL, is_tree, stamp
from recombine.data.vision.folder import splits as folders
from recombine.data.vision.source import Lazy, Part, Source, decode, join, shuffled, stratified
from recombine.errors import UsageError

HOLDOUT = 0.1  # of train, for validation
NORMS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "model": (None, None),
}


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


AIRCRAFT = Row(
    100, "HuggingFaceM4/FGVC-Aircraft", "e18a7c97147c90dc7f4a60d74a7f4258e9264e97",  # its pull request 1: parquet
    {"train": 3334, "validation": 3333, "test": 3333}, label="variant", note="100 variants",
)  # fmt: skip
CIFAR100 = Row(
    100, "uoft-cs/cifar100", "aadb3af77e9048adbea6b47c21a81e47dd092ae5", {"train": 50_000, "test": 10_000},
    "cifar100/{split}-*.parquet", "img", "fine_label",
)  # fmt: skip
CIFAR10 = Row(
    10, "uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", {"train": 50_000, "test": 10_000},
    "plain_text/{split}-*.parquet", "img",
)  # fmt: skip


class Suite(VisionData):
    """A row of ``rows``. ``papers`` holds what a paper's table prints of it: (table, classes, pictures)."""

    rows: ClassVar[dict[str, Row]]
    papers: ClassVar[dict[str, tuple[str, int, int]]] = {}
    protocols: ClassVar[tuple[str, ...]] = ("official", "80/20")
    complete = True  # every class must be in train and in test
    expects = "expected"  # how many pictures a split should have, in words

    def __init__(
        self,
        *,
        task: str,
        root: str | Path | None = None,
        revision: str | None = None,
        split: str | int = "official",
        select: str = "val",
        normalize: str | float = "model",
        **kwargs,
    ):
        """``root``: a folder, else the hub. ``revision`` replaces the row's. ``normalize``: model, imagenet or 0.5."""
        if task not in self.rows:
            close = get_close_matches(str(task), self.rows, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UsageError(
                f"unknown task {task!r} of data={self.name}: {hint}choose from {', '.join(self.rows)}, all"
            )
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
        self.joined = select == "last"
        self.cutting = self.split  # what the pictures of train, val and test depend on
        self._listing: tuple[list[str], dict[str, Part], str, tuple[str, ...]] | None = None

    # Where the pictures are

    def folder(self) -> Path:
        """The user's folder of the task, or the hub's snapshot."""
        if self.root is not None:
            found = self.root / self.task
            if not found.is_dir() and len(self.rows) == 1:
                found = self.root
            if not found.is_dir():
                raise UsageError(self.ways(f"there is no folder {found}"))
            return found
        return self.snapshot(self.patterns())

    def snapshot(self, patterns: list[str]) -> Path:
        try:
            found = hub.download(self.row.repository, self.revision, patterns)
        except UsageError as error:
            raise UsageError(self.ways(f"the hub gives nothing ({error})")) from error
        self.commit = found.name
        return found

    def patterns(self) -> list[str]:
        return [self.row.files.format(split=split) for split in self.row.sizes]

    def ways(self, trouble: str) -> str:
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
            return *folders(folder, self.row.splits), []
        if files := hub.tables(folder, self.patterns()):
            wanted = {ours: files[theirs] for ours, theirs in self.row.splits.items() if theirs in files}
            classes, parts = hub.read(folder, wanted, self.row.image, self.row.label)
            return classes, parts, [path for paths in wanted.values() for path in paths]
        raise UsageError(self.ways(f"{folder} has neither parquet or arrow files nor class folders in train"))

    # What a run uses of them

    def listing(self) -> tuple[list[str], dict[str, Part], str, tuple[str, ...]]:
        """Class names, the pictures of train, val and test, what identifies them, and differences from the papers."""
        if self._listing is None:
            folder = self.folder()
            names, parts, watched = self.read(folder)
            classes = self.checked(names, parts, folder)
            found = tuple(self.differences(parts))
            parts = self.cut(parts)
            mark = f"{self.row.repository}@{self.commit}" if self.root is None else stamp(parts, watched)
            self._listing = classes, parts, mark, found
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
        train = parts["train"]
        if self.split == "80/20":
            whole = join(list(parts.values()))
            rest, test = _divide(whole, 0.2)
            train, val = _divide(rest, HOLDOUT)
            return {"train": train, "val": val, "test": test}
        if self.row.share < 1:
            train = train.take(np.sort(shuffled(len(train), 0)[: math.ceil(self.row.share * len(train))]))
        val = parts.get("val")
        if val is None:
            train, val = _divide(train, HOLDOUT)
        return {"train": train, "val": val, "test": parts["test"]}

    def identity(self) -> str:
        """At a commit it needs neither network nor files."""
        known = self.root is None and self.commit
        mark = f"{self.row.repository}@{self.commit}" if known else self.listing()[2]
        return f"{self.name} {self.task} {self.row.image} {self.row.label} {mark} {self.cutting} {self.row.share}"

    def source(self) -> Source:
        classes, parts, _, differences = self.listing()
        pictures = {split: (Lazy(decode, parts[split].items), parts[split].labels) for split in SPLITS}
        return Source(classes, self.row.licence, pictures, self.row.note, differences)

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


class Fgvc(Suite):
    """CRISP's six: flowers102 ``dpdl-benchmark/oxford_flowers102``, aircraft ``HuggingFaceM4/FGVC-Aircraft`` (variant),
    mit67 ``keremberke/indoor-scene-classification`` (its parquet branch, column ``labels``), cifar100 and cifar10
    ``uoft-cs/...`` (column ``img``), cub200 ``bentrevett/caltech-ucsd-birds-200-2011``; revisions in ``rows``."""

    name = "fgvc"
    rows = {
        "flowers102": Row(
            102, "dpdl-benchmark/oxford_flowers102", "544b55c9af69a05742ead7571cd7ae23cfcd758b",
            {"train": 1020, "validation": 1020, "test": 6149},
            note="the set has 8,189; perhaps the 6,552 of a repackaged training folder, and one",
        ),
        "aircraft": AIRCRAFT,
        "mit67": Row(
            67, "keremberke/indoor-scene-classification", "refs/convert/parquet",
            {"train": 10_885, "validation": 3128, "test": 1558}, "full/{split}/*.parquet", label="labels",
            licence="MIT", note="repackaged: 15,571 of 15,620 pictures, stretched to 416 px",
        ),
        "cifar100": CIFAR100,
        "cifar10": CIFAR10,
        "cub200": Row(
            200, "bentrevett/caltech-ucsd-birds-200-2011", "1ef09e021b0b65b40337f6f285909656f407f6e0",
            {"train": 5994, "test": 5794}, note="the set has 11,788",
        ),
    }  # fmt: skip
    suite = dict.fromkeys(rows, "fine-grained")
    papers = {
        task: ("CRISP Tab. 7", *printed)
        for task, printed in {
            "flowers102": (102, 6553), "aircraft": (55, 10_001), "mit67": (67, 15_614), "cifar100": (100, 60_000),
            "cifar10": (10, 60_000), "cub200": (200, 11_789),
        }.items()
    }  # fmt: skip


class Vision8(Suite):
    """CERSA's and JACTUS's eight: cifar100, cifar10 ``uoft-cs/...`` (column ``img``), eurosat ``timm/eurosat-rgb``,
    resisc45 ``timm/resisc45``, cars ``tanganke/stanford_cars``, aircraft ``HuggingFaceM4/FGVC-Aircraft`` (variant), dtd
    ``tanganke/dtd`` (which of the ten folds it is, its card does not say), pets ``timm/oxford-iiit-pet``; revisions in
    ``rows``. EuroSAT has no official split: this one is 16,200 / 5,400 / 5,400."""

    name = "vision8"
    rows = {
        "cifar100": CIFAR100,
        "eurosat": Row(
            10, "timm/eurosat-rgb", "b4e28552cd5f3932b6abc37eb20d3e84901ad728",
            {"train": 16_200, "validation": 5400, "test": 5400}, licence="MIT",
        ),
        "resisc45": Row(
            45, "timm/resisc45", "fe12fc5f1b7606543b0355eda392f1ddc54625c6",
            {"train": 18_900, "validation": 6300, "test": 6300},
        ),
        "cars": Row(
            196, "tanganke/stanford_cars", "9abf6cf7d6dfa7b95152a0d6e791ea9435b47a40", {"train": 8144, "test": 8041},
        ),
        "aircraft": AIRCRAFT,
        "dtd": Row(
            47, "tanganke/dtd", "d2afa97d9f335b1a6b3b09c637aef667f98f966e", {"train": 3760, "test": 1880},
            note="one of ten folds",
        ),
        "cifar10": CIFAR10,
        "pets": Row(
            37, "timm/oxford-iiit-pet", "089695c834a7deb60505b7cc506672db1c31a6aa", {"train": 3680, "test": 3669},
            licence="CC-BY-SA-4.0",
        ),
    }  # fmt: skip
    suite = dict.fromkeys(rows, "vision8")


class Imagenet(Suite):
    """``ILSVRC/imagenet-1k`` (gated). Of its training rows, in the order of its files, 25,624 (2 %, a seeded list) are
    used, a tenth of those for validation unless ``select="last"``; its validation set of 50,000 is the test set.

    A model keeps its own head where that tells 1,000 classes apart. So their order matters, which is that of the
    WordNet ids: class folders must be named by them."""

    name = "imagenet"
    native = True
    protocols = ("official",)
    rows = {
        "imagenet": Row(
            1000, "ILSVRC/imagenet-1k", "49e2ee26f3810fb5a7536bbf732a7b07389a47b5",
            {"train": 1_281_167, "validation": 50_000}, splits={"train": "train", "test": "validation"}, share=0.02,
            licence="ImageNet's terms of access", note="2 % of train; test is the validation set",
        ),
    }  # fmt: skip
    suite = {"imagenet": "imagenet"}

    def read(self, folder: Path) -> tuple[list[str] | None, dict[str, Part], list[Path]]:
        names, parts, watched = super().read(folder)
        if is_tree(folder) and (other := [name for name in names if not re.fullmatch(r"n\d{8}", name)]):
            raise UsageError(
                f"{folder}: class folder {other[0]!r} is no WordNet id, whose order is that of the models' classes: "
                "name the folders n01440764 and so on"
            )
        return names, parts, watched
