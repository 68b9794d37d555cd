"""VTAB-1k (arXiv 1910.04867) as NOAH (arXiv 2206.04673) cut it and SSF, RepAdapter and others pass it on: 19 tasks of
800 + 200 pictures and their full test sets.

    <root>/<task>/{train800,val200,train800val200,test}.txt     lines of images/train800val200/000123.jpg 17

The 1,000 pictures are slices in the order of TFDS: another sample of the same sets gives other numbers. Hence only this
folder, its archive on the hub ``XiN0919/VTAB-1k`` (vtab-1k.zip; no commit is known here, so the newest is taken and a
result names it), or these very pictures as parquet, arrow or class folders of train, val and test.

What repositories differ in is a key each, and in every result: ``split`` (800/200, or 1000 for both together),
``select`` (val: the 200 choose the epoch; last: the last epoch counts) and ``normalize`` (imagenet as NOAH and SSF do,
0.5 as the augreg weights want it, or model). The usual protocol is two runs: choose with 800/200, then retrain on 1000
with ``select=last``. Resized to a square, bicubic, no augmentation (NOAH: --no_aug --direct_resize).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from recombine.data.base import exclusive_build
from recombine.data.vision import folder
from recombine.data.vision.cache import require_disk_space
from recombine.data.vision.source import Part, decode
from recombine.data.vision.suite_base import Row, Suite
from recombine.errors import UsageError, first_line
from recombine.runtime import progress
from recombine.runtime.assets import cache_dir, writing
from recombine.runtime.kinds import Word

REPOSITORY, ARCHIVE = "XiN0919/VTAB-1k", "vtab-1k.zip"
BLOCK = 4096  # bytes
TESTS = {  # group -> task -> pictures of its test set in CRISP's Tab. 6
    "natural": {
        "cifar": 10_000, "caltech101": 6084, "dtd": 1880, "oxford_flowers102": 6149, "oxford_iiit_pet": 3669,
        "svhn": 26_032, "sun397": 21_750,
    },
    "specialised": {"patch_camelyon": 32_768, "eurosat": 5400, "resisc45": 6300, "diabetic_retinopathy": 42_670},
    "structured": {
        "clevr_count": 15_000, "clevr_dist": 15_000, "dmlab": 22_735, "kitti": 711, "dsprites_loc": 73_728,
        "dsprites_ori": 73_728, "smallnorb_azi": 12_150, "smallnorb_ele": 12_150,
    },
}  # fmt: skip


class Vtab(Suite):
    """VTAB-1k. ``split`` is "800/200" or "1000"; the other arguments are those of `Suite`."""

    name, label, experiment = "vtab", "VTAB-1K", "crisp/tab01"
    task_labels = {
        "cifar": "CIFAR-100", "caltech101": "Caltech101", "dtd": "DTD", "oxford_flowers102": "Flowers102",
        "oxford_iiit_pet": "Pets", "svhn": "SVHN", "sun397": "Sun397", "patch_camelyon": "Patch Camelyon",
        "eurosat": "EuroSAT", "resisc45": "Resisc45", "diabetic_retinopathy": "Diabetic Retinopathy",
        "clevr_count": "Clevr count", "clevr_dist": "Clevr distance", "dmlab": "DMLab", "kitti": "KITTI distance",
        "dsprites_loc": "dSprites location", "dsprites_ori": "dSprites orientation",
        "smallnorb_azi": "smallNORB azimuth", "smallnorb_ele": "smallNORB elevation",
    }  # fmt: skip
    protocols = ("800/200", "1000")
    suite = {task: group for group, tasks in TESTS.items() for task in tasks}
    rows = {
        task: Row(
            folder.NOAH_CLASSES[task], REPOSITORY, "main", {"train": 800, "validation": 200, "test": test},
            licence="the data set's own",
        )
        for tasks in TESTS.values() for task, test in tasks.items()
    }  # fmt: skip
    complete = False  # 800 pictures need not show all of 397 classes
    expects = "CRISP Tab. 6 prints"

    def __init__(self, *, split: Word = "800/200", normalize: Word = "imagenet", **kwargs):
        super().__init__(split=split, normalize=normalize, **kwargs)
        self.merge_train_val, self.cutting = self.split == "1000", "noah"
        if self.merge_train_val and self.select == "val":
            raise UsageError(
                "data.split=1000 with data.select=val: the 200 are trained on and cannot choose; add data.select=last"
            )

    def folder(self) -> Path:
        """The user's folder of the task, or the one that the hub's archive is unpacked to."""
        if self.root is not None:
            return super().folder()
        unpacked = cache_dir() / "vtab-1k" / self.pinned() / self.task
        if not unpacked.is_dir():
            archive = self.snapshot([ARCHIVE]) / ARCHIVE
            unpack(archive, unpacked.parent, [self.task])
            if not unpacked.is_dir():
                raise UsageError(self.ways(f"{archive} holds none"))
        return unpacked

    def patterns(self) -> list[str]:
        return []

    def read(self, root: Path) -> tuple[list[str] | None, dict[str, Part], list[Path]]:
        files = [root / name for name in (folder.WHOLE, *folder.LISTS.values())]
        if any(file.is_file() for file in files):
            return *folder.lists(root, self.row.classes), [file for file in files if file.is_file()]
        return super().read(root)

    def cut(self, parts: dict[str, Part]) -> dict[str, Part]:
        if "val" not in parts:
            raise UsageError(self.ways("there is no val split, and another sample of train is not VTAB-1k's"))
        return parts

    def differences(self, parts: dict[str, Part]) -> list[str]:
        seen = len(np.unique(parts["train"].labels))
        unseen = f"train shows {seen} of {self.row.classes} classes"
        return super().differences(parts) + [unseen] * (seen < self.row.classes)

    def ways(self, trouble: str) -> str:
        return (
            f"no pictures for {self.task}: {trouble}; three ways in: {ARCHIVE} of the hub's {REPOSITORY} (network), "
            f"data.root=FOLDER with NOAH's {self.task}/train800.txt, val200.txt, test.txt and images "
            f"(scripts/prepare_vtab.py unpacks and checks it), or data.root=FOLDER where {self.task}/ holds these "
            "pictures as parquet or arrow files or class folders of train, val and test"
        )


def unpack(archive: Path, root: Path, tasks: Collection[str] = tuple(Vtab.rows)) -> list[str]:
    """Moves the folders of these tasks out of a zip, however deep they lie in it, to root/<task>; returns the new ones.

    A task's folder appears whole or not at all, and one that is there already stays as it is.

    Raises:
        UsageError: the zip is damaged, or the disk too small.
    """
    lock = hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:16]
    moved = []
    with exclusive_build(f"vtab-1k-{lock}"), writing(root):
        for left in root.glob(".unpacking-*"):  # of one that was killed: a living one has the lock
            shutil.rmtree(left, ignore_errors=True)
        try:
            with zipfile.ZipFile(archive) as opened:
                inside = {Path(name).parent.name: name.removesuffix("test.txt") for name in _lists(opened)}
                for task in inside.keys() & {task for task in tasks if not (root / task).exists()}:
                    with TemporaryDirectory(dir=root, prefix=".unpacking-") as scratch:
                        _extract(opened, inside[task], Path(scratch), task)
                        os.replace(Path(scratch, inside[task]), root / task)
                    moved.append(task)
        except (zipfile.BadZipFile, zlib.error, EOFError, FileNotFoundError) as error:
            raise UsageError(f"cannot unpack {archive}: {first_line(error)}; fetch it again") from error
    return sorted(moved)


def _lists(archive: zipfile.ZipFile) -> list[str]:
    """The test.txt of every task in an archive."""
    return [
        name for name in archive.namelist() if Path(name).name == "test.txt" and Path(name).parent.name in Vtab.rows
    ]


def _extract(archive: zipfile.ZipFile, prefix: str, folder: Path, task: str) -> None:
    """What an archive holds below a prefix. A file takes whole blocks of the disk."""
    members = [info for info in archive.infolist() if info.filename.startswith(prefix)]
    require_disk_space(folder, sum(info.file_size + BLOCK for info in members))
    for info in progress.of(members, f"unpacking {task}", "files"):
        archive.extract(info, folder)


def complaints(root: Path, task: str, pictures: bool = False) -> list[str]:
    """What is missing or wrong in root/<task>, one line each; ``pictures`` decodes every one."""
    if not (root / task).is_dir():
        return [f"no folder {root / task}"]
    try:
        module = Vtab(task=task, root=root)
        where = module.folder()
        names, parts, _ = module.read(where)
        module.checked(names, parts, where)
        lines = super(Vtab, module).differences(module.cut(parts))
    except UsageError as error:
        return [str(error)]
    for split, part in parts.items():
        gone = [item for item in part.items if isinstance(item, Path) and not item.is_file()]
        if gone:
            lines.append(f"{len(gone)} pictures of {split} are missing, the first is {gone[0]}")
        elif pictures:
            try:
                for item in part.items:
                    decode(item)
            except UsageError as error:
                lines.append(str(error))
    return lines
