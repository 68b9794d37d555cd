"""Pictures from a folder of the user's. ``root/<task>`` (``root`` without a task) may be laid out in three ways:

    lists     train800.txt, val200.txt, test.txt of lines ``images/train800val200/000123.jpg 17``: NOAH's VTAB-1k
    splits    train/<class>/*, test/<class>/* and perhaps val/<class>/*; without it, a stratified 20 % of train
    classes   <class>/*: a stratified 70 % train, 10 % val, 20 % test

Stratified cuts are drawn with the data's ``seed`` and change with it. Pictures are resized to a square whatever their
aspect, as VTAB does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from recombine.data.source import Lazy, Source, stratified
from recombine.data.vision import SPLITS, VisionData
from recombine.errors import UsageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
NOAH_CLASSES = {
    "cifar": 100, "caltech101": 102, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "svhn": 10,
    "sun397": 397, "patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5, "clevr_count": 8,
    "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16, "dsprites_ori": 16, "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}  # fmt: skip

Item = tuple[Path, int]


class Folder(VisionData):
    name = "folder"
    group = "folder"

    def __init__(self, *, root: str | Path, task: str | None = None, **kwargs):
        super().__init__(task=task, **kwargs)
        self.root = Path(root).expanduser() / (task or "")
        if not self.root.is_dir():
            raise UsageError(f"no folder {self.root}: set data.root (and data.task) to where the pictures are")
        self._listing: tuple[list[str], dict[str, list[Item]]] | None = None

    def listing(self) -> tuple[list[str], dict[str, list[Item]]]:
        """Class names, and per split the files with their labels."""
        if self._listing is None:
            if any((self.root / file).is_file() for file in LISTS.values()):
                self._listing = self._lists()
            elif (self.root / "train").is_dir():
                self._listing = self._splits()
            else:
                self._listing = self._classes()
        return self._listing

    def _lists(self) -> tuple[list[str], dict[str, list[Item]]]:
        parts, count = {}, NOAH_CLASSES.get(self.task or self.root.name)
        for split, name in LISTS.items():
            file = self.root / name
            if not file.is_file():
                raise UsageError(f"no list {file}: a VTAB-1k folder needs {', '.join(LISTS.values())}")
            parts[split] = []
            for number, line in enumerate(file.read_text().splitlines(), 1):
                path, _, label = line.strip().rpartition(" ")
                if not path or not label.lstrip("-").isdigit():
                    raise UsageError(
                        f"{file}:{number}: {line!r} is not 'path label': write e.g. 'images/test/000001.jpg 17'"
                    )
                parts[split].append((self.root / path, int(label)))
            if not parts[split]:
                raise UsageError(f"{file} lists no pictures: write one 'path label' a line")
            if split == "train" and count is None:
                count = 1 + max(label for _, label in parts["train"])
            for number, (_, label) in enumerate(parts[split], 1):
                if not 0 <= label < count:
                    raise UsageError(f"{file}:{number}: label {label} is out of range: use 0 .. {count - 1}")
        return [str(i) for i in range(count)], parts

    def _splits(self) -> tuple[list[str], dict[str, list[Item]]]:
        classes = _subfolders(self.root / "train")
        if not (self.root / "test").is_dir():
            raise UsageError(f"no folder {self.root / 'test'}: beside train there must be test (val may be missing)")
        parts = {split: _pictures(self.root / split, classes) for split in SPLITS if (self.root / split).is_dir()}
        if "val" not in parts:
            parts |= self._cut(parts["train"], {"val": 0.2})
        return classes, parts

    def _classes(self) -> tuple[list[str], dict[str, list[Item]]]:
        classes = _subfolders(self.root)
        return classes, self._cut(_pictures(self.root, classes), {"test": 0.2, "val": 0.125})  # an eighth of the rest

    def _cut(self, items: list[Item], shares: dict[str, float]) -> dict[str, list[Item]]:
        parts = {}
        for split, share in shares.items():
            taken = set(
                stratified(np.array([label for _, label in items]), round(share * len(items)), self.seed).tolist()
            )
            if not 0 < len(taken) < len(items):
                raise UsageError(f"{len(items)} pictures in {self.root} are too few to cut {split} from: add some")
            parts[split] = [item for i, item in enumerate(items) if i in taken]
            items = [item for i, item in enumerate(items) if i not in taken]
        return parts | {"train": items}

    def identity(self) -> str:
        """Paths, sizes, times and labels: cheaper than the pictures, and an edited picture changes them."""
        parts = self.listing()[1]
        digest = hashlib.sha256()
        for split in SPLITS:
            for path, label in parts[split]:
                try:
                    stat = path.stat()
                except OSError:
                    raise UsageError(
                        f"no picture {path}, listed in {split}: restore it or take it off the list"
                    ) from None
                digest.update(f"{split} {path.absolute()} {stat.st_size} {stat.st_mtime_ns} {label}\n".encode())
        return f"folder {digest.hexdigest()}"

    def source(self) -> Source:
        classes, parts = self.listing()
        splits = {
            split: (
                Lazy(_read, [path for path, _ in parts[split]]),
                np.array([label for _, label in parts[split]], np.int64),
            )
            for split in SPLITS
        }
        return Source(classes, "the user's own", splits)


def _subfolders(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise UsageError(f"no class folders in {folder}: put the pictures in {folder}/<class>/")
    return names


def _pictures(folder: Path, classes: list[str]) -> list[Item]:
    """All pictures of a split, by class and name."""
    items: list[Item] = []
    for name in _subfolders(folder):
        if name not in classes:
            raise UsageError(f"class {name!r} of {folder} is not in train: rename it or add it there")
        files = sorted(path for path in _files(folder / name) if path.suffix.lower() in SUFFIXES)
        if not files:
            raise UsageError(f"no pictures in {folder / name}: add some ({' '.join(sorted(SUFFIXES))}) or remove it")
        items += [(path, classes.index(name)) for path in files]
    return items


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _read(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises on bad files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"cannot read the picture {path}: {reason}; replace or remove it") from error
