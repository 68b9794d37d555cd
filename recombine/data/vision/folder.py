"""Pictures from a folder of the user's. ``root/<task>`` (``root`` without a task) may be laid out in three ways:

    lists     train800.txt, val200.txt, test.txt of lines ``images/train800val200/000123.jpg 17``: NOAH's VTAB-1k
    splits    train/<class>/*, test/<class>/* and perhaps val/<class>/*; without it, a stratified 20 % of train
    classes   <class>/*: a stratified 70 % train, 10 % val, 20 % test

Stratified cuts are drawn with the data's ``seed`` and change with it. Pictures are resized to a square whatever their
aspect, as VTAB does.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from recombine.data.sampling import stratified
from recombine.data.vision.base import VisionData
from recombine.data.vision.source import Part, Source, decoded
from recombine.errors import UsageError
from recombine.runtime.kinds import Place, Word

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
WHOLE = "train800val200.txt"  # train and val, in this order
NOAH_CLASSES = {
    "cifar": 100, "caltech101": 102, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "svhn": 10,
    "sun397": 397, "patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5, "clevr_count": 8,
    "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16, "dsprites_ori": 16, "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}  # fmt: skip
ALIASES = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}  # folders of a split
OFFICIAL: Mapping[str, str] = {"train": "train", "val": "validation", "test": "test"}  # what a split of ours is called

Listing = tuple[list[str], dict[str, Part]]  # class names, and the pictures of each split


class Folder(VisionData):
    """Pictures of the user's own.

    Args:
        root: the folder.
        task: a folder in ``root``; None: ``root`` itself.

    Raises:
        UsageError: there is no such folder, or its layout is none of the three.
    """

    name = "folder"
    group = "folder"

    def __init__(self, *, root: Place, task: Word | None = None, **kwargs):
        super().__init__(task=task, **kwargs)
        self.root = Path(root).expanduser() / (task or "")
        typed = f"data.root={root}{f' data.task={task}' if task else ''}"
        if not self.root.is_dir():
            raise UsageError(f"{typed}: there is no folder {self.root}; set them to where the pictures are")
        self._listing: Listing | None = None
        try:
            classes = self.listing()[0]
        except OSError as error:
            raise UsageError(
                f"{typed}: {error.filename}: {error.strerror}; set them to a folder of pictures"
            ) from error
        if len(classes) < 2:
            raise UsageError(f"{typed}: has one class, {classes[0]}; add another, which it can be told apart from")
        self.num_classes = len(classes)

    @property
    def title(self) -> str:
        return f"{self.root.resolve().name} (folder)"

    def listing(self) -> Listing:
        """Class names, and the pictures of each split."""
        if self._listing is None:
            if any((self.root / file).is_file() for file in (WHOLE, *LISTS.values())):
                self._listing = lists(self.root, NOAH_CLASSES.get(self.task or self.root.name))
            elif (self.root / "train").is_dir():
                classes, parts = splits(self.root)
                self._listing = classes, parts if "val" in parts else parts | self._cut(parts["train"], {"val": 0.2})
            else:
                names = subfolders(self.root)
                cut = self._cut(pictures(self.root, names), {"test": 0.2, "val": 0.125})  # an eighth of the rest
                self._listing = names, cut
        return self._listing

    def _cut(self, part: Part, shares: dict[str, float]) -> dict[str, Part]:
        parts = {}
        for split, share in shares.items():
            taken = np.zeros(len(part), bool)
            taken[stratified(part.labels, round(share * len(part)), self.seed)] = True
            if not 0 < taken.sum() < len(part):
                raise UsageError(f"{len(part)} pictures in {self.root} are too few to cut {split} from: add some")
            parts[split], part = part.take(np.flatnonzero(taken)), part.take(np.flatnonzero(~taken))
        return parts | {"train": part}

    def identity(self) -> str:
        return f"folder {stamp(self.listing()[1])}{' stratified' * (self.limit is not None)}"

    def source(self) -> Source:
        classes, parts = self.listing()
        return Source(classes, "the user's own", decoded(parts, self.limit))


def lists(root: Path, count: int | None) -> Listing:
    """NOAH's lists. Without train800.txt and val200.txt, the first 800 and the last 200 of train800val200.txt."""
    undivided = (root / WHOLE).is_file() and not any((root / LISTS[split]).is_file() for split in ("train", "val"))
    parts: dict[str, Part] = {}
    for split, name in ({"train": WHOLE, "test": LISTS["test"]} if undivided else LISTS).items():
        file = root / name
        if not file.is_file():
            raise UsageError(f"no list {file}: a VTAB-1k folder needs {', '.join(LISTS.values())}")
        parts[split] = Part(*_entries(root, file))
        if split == "train" and count is None:
            count = 1 + int(parts["train"].labels.max())
        for number, label in enumerate(parts[split].labels, 1):
            if not 0 <= label < count:
                raise UsageError(f"{file}:{number}: label {label} is out of range: use 0 .. {count - 1}")
    if undivided:
        if len(parts["train"]) <= 800:
            listed = f"{root / WHOLE} lists {len(parts['train'])} pictures"
            raise UsageError(f"{listed}: the first 800 train and the rest is val, so it needs more; restore the list")
        order = np.arange(len(parts["train"]))
        parts |= {"train": parts["train"].take(order[:800]), "val": parts["train"].take(order[800:])}
    return [str(i) for i in range(count)], parts


def _entries(root: Path, file: Path) -> tuple[list[Path], np.ndarray]:
    items, labels = [], []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.lstrip("-").isdigit():
            raise UsageError(f"{file}:{number}: {line!r} is not 'path label': write e.g. 'images/test/000001.jpg 17'")
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise UsageError(f"{file}:{number}: {path!r} leads out of {root}: write paths below it")
        items.append(root / path)
        labels.append(int(label))
    if not items:
        raise UsageError(f"{file} lists no pictures: write one 'path label' a line")
    return items, np.array(labels, np.int64)


def splits(root: Path, names: Mapping[str, str] = OFFICIAL) -> Listing:
    """train/<class>/*, test/<class>/* and, where it exists, val/<class>/*; ``names``: ours -> the data set's."""
    folders = {ours: [root / n for n in ALIASES[theirs] if (root / n).is_dir()] for ours, theirs in names.items()}
    if not folders["test"]:
        raise UsageError(f"no folder {root / names['test']}: beside train there must be test (val may be missing)")
    classes = subfolders(root / "train")
    return classes, {split: pictures(paths[0], classes) for split, paths in folders.items() if paths}


def is_tree(root: Path) -> bool:
    """Whether there is a train folder with folders in it."""
    return (root / "train").is_dir() and any(path.is_dir() for path in (root / "train").iterdir())


def subfolders(folder: Path) -> list[str]:
    """The names of its class folders, sorted; there must be one."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise UsageError(
            f"no class folders in {folder}: put the pictures in {folder}/<class>/, or set data.root to them"
        )
    return names


def pictures(folder: Path, classes: list[str]) -> Part:
    """All pictures of a split, by class and name."""
    items: list[Path] = []
    labels: list[int] = []
    for name in subfolders(folder):
        if name not in classes:
            raise UsageError(f"class {name!r} of {folder} is not in train: rename it or add it there")
        files = sorted(path for path in _files(folder / name) if path.suffix.lower() in SUFFIXES)
        if not files:
            kinds = " ".join(sorted(SUFFIXES))
            raise UsageError(
                f"no pictures in {folder / name}: each folder in {folder} is a class; add some ({kinds}), or set "
                "data.root to a folder that holds classes alone"
            )
        items += files
        labels += [classes.index(name)] * len(files)
    return Part(items, np.array(labels, np.int64))


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def stamp(parts: dict[str, Part], others: Iterable[Path] = ()) -> str:
    """Paths, sizes, times and labels: cheaper than the pictures, and an edited picture changes them.

    ``others`` are the files that hold pictures which are no files themselves.
    """
    digest = hashlib.sha256()

    def add(path: Path, what: str) -> None:
        try:
            stat = path.stat()
        except OSError:
            raise UsageError(f"no picture {path}, listed in {what}: restore it or take it off the list") from None
        digest.update(f"{what} {path.absolute()} {stat.st_size} {stat.st_mtime_ns}\n".encode())

    for path in others:
        add(path, "data")
    for split, part in sorted(parts.items()):
        digest.update(f"{split} {len(part)}\n".encode() + part.labels.astype("<i8").tobytes())
        if isinstance(part.items, list):
            for path in part.items:
                add(path, split)
    return digest.hexdigest()
