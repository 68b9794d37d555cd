"""Tiny picture sets in the form of their hub counterparts."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from helpers import ready
from recombine.data.base import log_once

PINNED = "0123456789abcdef0123456789abcdef01234567"
EXTRA = {  # the other columns of each repository, in words of `datasets`
    "uoft-cs/cifar100": {"coarse_label": datasets.ClassLabel(names=["aquatic"])},
    "HuggingFaceM4/FGVC-Aircraft": {
        "bbox": {k: datasets.Value("int64") for k in ("ymin", "xmin", "ymax", "xmax")},
        "family": datasets.ClassLabel(names=["A300"]), "manufacturer": datasets.ClassLabel(names=["Airbus"]),
    },
    "keremberke/indoor-scene-classification": {"image_file_path": datasets.Value("string")},
    "bentrevett/caltech-ucsd-birds-200-2011": {"bbox": datasets.Sequence(datasets.Value("float32"))},
    "timm/resisc45": {"image_id": datasets.Value("string")},
    "timm/eurosat-rgb": {"image_id": datasets.Value("string")},
    "timm/oxford-iiit-pet": {
        "image_id": datasets.Value("string"), "label_cat_dog": datasets.ClassLabel(names=["cat", "dog"]),
    },
}  # fmt: skip
FILLER = {"bbox": {"ymin": 0, "xmin": 0, "ymax": 1, "xmax": 1}, "image_id": "a", "image_file_path": "a.jpg"}


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    """A cache of ours and one of the hub's, and no network."""
    monkeypatch.setenv("RECOMBINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    log_once.cache_clear()


def encoded(shade: int, kind: str, size: int = 4) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(shade).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def dataset(row, part: int, each: int = 1, image: str | None = None, labels=None) -> datasets.Dataset:
    """``each`` pictures of every class, with the repository's columns, types and encoding; no two are alike."""
    image, kind = image or row.image, "PNG" if row.image == "img" else "JPEG"
    labels = [i % row.classes for i in range(each * row.classes)] if labels is None else labels
    extra = EXTRA.get(row.repository, {})
    names = datasets.ClassLabel(names=[f"class {i}" for i in range(row.classes)])
    features = {image: datasets.Image(), row.label: names} | extra
    cells = [{"bytes": encoded(10_000 * part + i, kind), "path": f"{i}.{kind.lower()}"} for i in range(len(labels))]
    filler = FILLER | {"bbox": [0.0] * 4} if "caltech" in row.repository else FILLER
    columns = {image: cells, row.label: labels} | {c: [filler.get(c, 0)] * len(labels) for c in extra}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def store(folder: Path, row, each: int = 1, **kwargs) -> Path:
    """The repository's parquet files."""
    for part, split in enumerate(row.sizes):
        path = folder / row.files.format(split=split).replace("*", "00000-of-00001")
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset(row, part, each, **kwargs).to_parquet(path)
    return folder


def snapshot(tmp_path: Path, repository: str, commit: str = PINNED, branch: str | None = None) -> Path:
    """Where the hub's cache keeps a repository."""
    folder = tmp_path / "hub" / f"datasets--{repository.replace('/', '--')}"
    if branch:
        (folder / "refs" / branch).parent.mkdir(parents=True)
        (folder / "refs" / branch).write_text(commit)
    (found := folder / "snapshots" / commit).mkdir(parents=True)
    return found


def make(cls, task, **kwargs):
    return ready(cls(task=task, **{"image_size": 4} | kwargs))


def digests(module) -> dict:
    return module.info["sha256"]
