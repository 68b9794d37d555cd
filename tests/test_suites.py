"""The papers' picture sets on tiny files in the form of their hub counterparts; VTAB-1k's folder; the shared cache."""

import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import runpy
import shutil
import signal
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors.torch import save_file

from recombine import data, models
from recombine.data.base import log_once
from recombine.data.sampling import shuffled
from recombine.data.vision import augment, cache, parquet
from recombine.data.vision.base import VisionData
from recombine.data.vision.source import Lazy, Source
from recombine.data.vision.suites import Fgvc, Imagenet, Vision8
from recombine.data.vision.vtab import ARCHIVE, REPOSITORY, TESTS, Vtab
from recombine.errors import UsageError
from recombine.runner import ranks

SETS = {(cls, task): row for cls in (Fgvc, Vision8, Imagenet) for task, row in cls.rows.items()}
UNIQUE = list({row.repository: key for key, row in reversed(SETS.items())}.values())
ROOT = Path(__file__).parents[1]
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


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
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


def ready(module):
    module.prepare_data()
    module.setup()
    return module


def make(cls, task, **kwargs):
    return ready(cls(task=task, **{"image_size": 4} | kwargs))


def line(call, *args, **kwargs) -> str:
    with pytest.raises(UsageError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# From the hub


@pytest.mark.parametrize("cls, task", UNIQUE, ids=[task for _, task in UNIQUE])
def test_every_repository_in_its_own_form(cls, task, tmp_path, capsys):
    row = cls.rows[task]
    pinned = len(row.revision) == 40
    store(snapshot(tmp_path, row.repository, *([row.revision] if pinned else [PINNED, row.revision])), row)
    module = make(cls, task)
    assert module.num_classes == len(module.classes) == row.classes and module.classes[1] == "class 1"
    held = 0 if "validation" in row.sizes and task != "imagenet" else round(0.1 * len(module.train) / 0.9)
    assert module.info["sizes"]["val"] == (held or row.classes) and len(module.test) == row.classes
    assert sorted(module.test.labels) == list(range(row.classes))
    assert module.info["hub"] == row.repository and module.info["commit"] == (row.revision if pinned else PINNED)
    assert module.info["shared_train_test"] == 0 and module.info["licence"]
    said = capsys.readouterr().err
    size = row.sizes[row.splits["test"]]
    assert f"{task}: {row.classes} pictures in test, expected {size}" in said
    if cls is Fgvc:
        assert f"CRISP Tab. 7 prints {cls.papers[task][1]} classes and {cls.papers[task][2]} pictures" in said
    for part in row.sizes:  # the cache alone is enough at a known commit
        for path in (tmp_path / "hub").rglob(f"*{part}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if pinned:
        assert (make(cls, task).test.images == module.test.images).all()


def test_tables_agree_with_the_papers():
    assert {task: row.classes for task, row in Fgvc.rows.items()} == {
        "flowers102": 102, "aircraft": 100, "mit67": 67, "cifar100": 100, "cifar10": 10, "cub200": 200,
    }  # fmt: skip
    assert list(Vision8.rows) == ["cifar100", "eurosat", "resisc45", "cars", "aircraft", "dtd", "cifar10", "pets"]
    assert sum(Fgvc.rows["cub200"].sizes.values()) == 11_788 and sum(Fgvc.rows["flowers102"].sizes.values()) == 8189
    assert [len(tasks) for tasks in TESTS.values()] == [7, 4, 8]
    assert sum(size for tasks in TESTS.values() for size in tasks.values()) == 387_904
    assert list(data.suite("vtab").values()).count("specialised") == 4 and list(data.suite("fgvc")) == list(Fgvc.rows)
    assert data.suite("folder") == {} and len(data.suite("offline")) == 10


def printed(table: str) -> dict[str, dict[str, str]]:
    """A table of CRISP: row -> what is printed of it."""
    found: dict[str, dict[str, str]] = {}
    with next((ROOT / "experiments" / "crisp").glob(f"{table}_*.csv")).open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["row"], {})[row["metric"]] = row["value"]
    return found


def test_classes_and_sizes_are_those_of_crisps_tables():
    vtab = printed("tab06")
    assert len(vtab) == 19
    for row, told in zip(Vtab.rows.values(), vtab.values(), strict=True):  # in the table's order
        assert (row.classes, row.sizes["test"]) == (int(told["classes"]), int(told["test"])), told
        assert (told["train"], told["val"]) == ("800/1000", "200") == (f"{row.sizes['train']}/1000", "200")
    for (_, *mine), told in zip(Fgvc.papers.values(), printed("tab07").values(), strict=True):
        assert mine == [int(told["classes"]), int(told["samples"])], told


def test_the_list_of_two_percent_is_pinned():
    row = Imagenet.rows["imagenet"]
    rows = np.sort(shuffled(row.sizes["train"], 0)[: math.ceil(row.share * row.sizes["train"])])
    assert len(rows) == 25_624 and len(set(rows.tolist())) == 25_624
    assert hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16] == "14ab89f2c6fec80b"


# The three ways in


def digests(module) -> dict:
    return module.info["sha256"]


def test_the_same_pictures_by_every_way(tmp_path):
    row = Vision8.rows["cifar10"]
    store(snapshot(tmp_path, row.repository, row.revision), row, each=10)
    first = make(Vision8, "cifar10")
    store(tmp_path / "parquet" / "cifar10", row, each=10)
    parts = {split: dataset(row, part, 10) for part, split in enumerate(row.sizes)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved" / "cifar10", num_shards={"train": 3, "test": 1})
    (tmp_path / "arrow" / "cifar10" / "0.0.0").mkdir(parents=True)
    for split in parts:  # as the library's own cache names them
        source = next((tmp_path / "saved" / "cifar10" / split).glob("*-00000-of-00001.arrow"), None)
        if source is None:
            parts[split].save_to_disk(tmp_path / "one" / split)
            source = tmp_path / "one" / split / "data-00000-of-00001.arrow"
        shutil.copy(source, tmp_path / "arrow" / "cifar10" / "0.0.0" / f"cifar10-{split}.arrow")
    for way in ("parquet", "saved", "arrow"):
        module = make(Vision8, "cifar10", root=tmp_path / way)
        assert digests(module) == digests(first) and module.info["root"] == str(tmp_path / way)
        assert module.classes == first.classes and (module.train.images == first.train.images).all()
    for split, part in parts.items():
        for i, (cell, label) in enumerate(
            zip(part.cast_column("img", datasets.Image(decode=False))["img"], part["label"], strict=True)
        ):
            path = tmp_path / "folder" / "cifar10" / split / f"class {label}" / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cell["bytes"])
    module = make(Vision8, "cifar10", root=tmp_path / "folder")
    assert module.classes == first.classes and module.info["sizes"] == first.info["sizes"]
    mine, theirs = (sorted(map(bytes, m.test.images.reshape(100, -1))) for m in (module, first))
    assert mine == theirs


def test_pictures_reach_the_batch_as_pillow_resizes_them(tmp_path):
    row = Vision8.rows["cifar10"]
    store(tmp_path / "cifar10", row, each=10)
    module = make(Vision8, "cifar10", root=tmp_path, image_size=7)
    images, labels = next(iter(module.test_dataloader()))
    assert images.shape == (32, 3, 7, 7) and images.is_contiguous() and images.dtype == torch.uint8
    for i in (0, 31):
        original = Image.open(io.BytesIO(dataset(row, 1, 10)[i]["img"] and encoded(10_000 + i, "PNG")))
        expected = np.asarray(original.resize((7, 7), Image.Resampling.BICUBIC))
        assert (images[i].permute(1, 2, 0).numpy() == expected).all() and labels[i] == i % 10
    parcel = pickle.dumps(module.test)  # what a loader's worker gets is the file's name
    assert len(parcel) < 3000 and (pickle.loads(parcel).images == module.test.images).all()


def test_imagenet_root_may_be_the_folder_itself(tmp_path, monkeypatch):
    row = replace(Imagenet.rows["imagenet"], classes=50, share=0.4)
    monkeypatch.setitem(Imagenet.rows, "imagenet", row)
    shade = 0
    for split in ("train", "val"):
        for i in range(row.classes):
            path = tmp_path / split / f"n{i:08}" / "a.JPEG"  # folders have the WordNet ids' names
            path.parent.mkdir(parents=True)
            path.write_bytes(encoded(shade := shade + 1, "BMP", 1))
    module = make(Imagenet, "imagenet", root=tmp_path, image_size=1)
    assert module.info["sizes"] == {"train": 18, "val": 2, "test": 50} and module.info["split"] == "official"
    joined = make(Imagenet, "imagenet", root=tmp_path, image_size=1, select="last")
    assert len(joined.train) == 20 and joined.val is None and joined.path == module.path
    assert "must be one of official" in line(Imagenet, task="imagenet", split="80/20")
    monkeypatch.setitem(Imagenet.rows, "imagenet", replace(row, share=0.02))
    assert "1 pictures are too few to hold out 10%" in line(make, Imagenet, "imagenet", root=tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "n00000007").rename(tmp_path / split / "goldfish")
    assert "class folder 'goldfish' is no WordNet id" in line(make, Imagenet, "imagenet", root=tmp_path)


# A backbone's own head


def imagenet(tmp_path: Path, classes: int = 1000) -> tuple[Path, Path]:
    """ImageNet's parquet files, one picture a class and split, and the weights of a tiny ViT with a head of its own."""
    if not (tmp_path / "imagenet").is_dir():
        store(tmp_path / "imagenet", Imagenet.rows["imagenet"])
    torch.manual_seed(0)
    chosen = yaml.safe_load((ROOT / "conf" / "model" / "tiny_vit.yaml").read_text())
    save_file(
        models.build(**chosen | {"num_classes": classes}).state_dict(), file := tmp_path / f"{classes}.safetensors"
    )
    return tmp_path, file


def execute(folder: Path, root: Path, *overrides: str) -> dict:
    said = ["model=tiny_vit", "data=imagenet", f"data.root={root}", "data.batch_size=100", "trainer=cpu", "probe=false"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        ranks.main(compose("config", [*said, "trainer.progress=false", "trainer.epochs=1", *overrides]), folder)
    return json.loads((folder / "result.json").read_text())


def test_the_original_model_is_scored_with_its_own_head(tmp_path):
    """CRISP Fig. 4: ImageNet's validation set, before and after an exact rewrite."""
    root, file = imagenet(tmp_path)
    weights = f"model.checkpoint={file}"
    first = execute(tmp_path / "a", root, "stage=evaluate", weights)
    assert first["method"] is None and first["checkpoint"] is None and first["account"]["trained"] == 0
    assert first["linear_probe"] is None and first["account"]["retained"] == 1 and first["layers"] == []

    model = models.build(**first["model"]).eval()
    module = make(Imagenet, "imagenet", root=root, image_size=32)
    module.attach_model(**models.for_data(model.recombine_source))
    with torch.no_grad():
        logits = model(module.normalise(torch.from_numpy(np.array(module.test.images)))).double()
    labels = torch.from_numpy(module.test.labels)
    assert models.has_own_head(model) and len(labels) == 1000
    assert first["test"]["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert first["test"]["acc"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())

    exact = ["method=crisp", "method.chunk=16"]
    after = execute(tmp_path / "b", root, "stage=retrofit", "stage.test=true", weights, *exact)
    assert after["test"] == pytest.approx(first["test"], rel=1e-4) and after["logit_error"] < 1e-3
    for folder, before, *stage in (("e", first, "stage=evaluate"), ("f", after, "stage=retrofit", "stage.test=true")):
        rounded = execute(tmp_path / folder, root, *stage, "stage.bits=8", weights, *exact)
        bytes_ = [found["account"]["bytes_weights"] for found in (rounded, before)]
        assert 0.25 < bytes_[0] / bytes_[1] < 0.7 and rounded["test"]["loss"] != before["test"]["loss"]
        assert rounded["test"]["loss"] == pytest.approx(before["test"]["loss"], rel=1e-2)
    still = ["optim.lr=0", "optim.lr_head=0", "stage.distil.epochs=0"]  # nothing moves: the head is still the own one
    kept = execute(tmp_path / "c", root, "stage=joint", weights, *exact, *still)
    assert kept["test"] == pytest.approx(first["test"], rel=1e-4)
    again = execute(tmp_path / "d", root, "stage=evaluate", weights, f"stage.checkpoint={kept['checkpoint']}")
    assert again["test"] == pytest.approx(kept["test"], rel=1e-5) and again["method"]["name"] == "Crisp"


def test_no_head_for_the_data_is_one_line(tmp_path):
    root, file = imagenet(tmp_path, 7)
    look = "stage=evaluate"
    assert "has no head of its own for data=imagenet (its weights have none)" in line(
        execute, tmp_path / "a", root, look
    )
    seven = line(execute, tmp_path / "b", root, look, f"model.checkpoint={file}")
    assert "its weights tell 7 classes apart, not 1000" in seven and "take model.tag=augreg_in21k_ft_in1k" in seven
    folder = tmp_path / "photos"
    for i in range(7 * 20):
        path = folder / f"class {i % 7}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i, "PNG"))
    mine = ["data=folder", f"data.root={folder}", "data.batch_size=32", f"model.checkpoint={file}"]
    where = tmp_path / "c"
    told = line(execute, where, folder, look, *mine)
    assert "the one in its weights is of 7 classes too" in told and "+model.num_classes=7 takes it" in told
    assert not (where / "result.json").exists() and "of 7 classes too" in line(
        execute, where, folder, "stage=retrofit", "stage.test=true", "method=svd", *mine
    )
    taken = execute(where, folder, look, *mine, "+model.num_classes=7")
    assert taken["data"]["sizes"]["test"] == 28 and 0 <= taken["test"]["acc"] <= 1
    fresh = execute(tmp_path / "d", folder, "method=linear_probe", "probe=true", *mine)
    assert fresh["model"]["num_classes"] == 0 and fresh["linear_probe"]  # another head than the weights', as always


def test_tags_with_imagenets_head():
    assert models.tags("vit_base_patch16_224", 1000)[:2] == ["augreg2_in21k_ft_in1k", "augreg_in1k"]
    assert "augreg_in21k" not in models.tags("vit_small_patch16_224", 1000)
    assert "augreg_in21k" in models.tags("vit_small_patch16_224", 21843)


# Protocols


def test_cuts_are_stratified_and_do_not_follow_the_seed(tmp_path):
    row = Vision8.rows["pets"]
    store(tmp_path / "pets", row, each=20)
    first, other = (make(Vision8, "pets", root=tmp_path, seed=seed) for seed in (0, 1))
    assert digests(first) == digests(other) and first.info["sizes"] == {"train": 666, "val": 74, "test": 740}
    assert (np.bincount(first.val.labels) == 2).all()
    pooled = make(Vision8, "pets", root=tmp_path, split="80/20")
    assert pooled.info["sizes"] == {"train": 1066, "val": 118, "test": 296}
    assert (np.bincount(pooled.test.labels) == 8).all() and pooled.info["shared_train_test"] == 0
    last = make(Vision8, "pets", root=tmp_path, select="last")
    assert (
        last.val is None and last.val_dataloader() == [] and last.info["sizes"] == {"train": 740, "val": 0, "test": 740}
    )
    assert "last epoch" in last.info["protocol"] and last.path == first.path  # one cache for both
    assert (last.train.images[:666] == first.train.images).all() and (last.train.images[666:] == first.val.images).all()
    assert (last.train.labels[666:] == first.val.labels).all()


def test_normalisation_is_pinned(tmp_path):
    row = Vision8.rows["cifar10"]
    store(tmp_path / "cifar10", row)
    assert make(Vision8, "cifar10", root=tmp_path).mean is None  # the model's
    module = make(Vision8, "cifar10", root=tmp_path, normalize=0.5)
    assert module.mean == module.std == (0.5, 0.5, 0.5) and module.info["normalize"] == "0.5"
    module = make(Vision8, "cifar10", root=tmp_path, normalize="imagenet")
    assert module.info["mean"] == (0.485, 0.456, 0.406) and module.info["std"] == (0.229, 0.224, 0.225)
    assert "data.normalize=clip: must be one of" in line(Vision8, task="cifar10", normalize="clip")


# What is wrong, in one line


def test_wrong_files_are_one_line(tmp_path, monkeypatch):
    row = Vision8.rows["cifar10"]
    folder = tmp_path / "cifar10"

    def said(**kwargs) -> str:
        shutil.rmtree(folder, ignore_errors=True)
        store(folder, kwargs.pop("row", row), **kwargs)
        return line(make, Vision8, "cifar10", root=tmp_path)

    assert "has no column 'img' but picture, label" in said(image="picture")
    assert "has no column 'label' but img, fine" in said(row=replace(row, label="fine"))
    assert "has 9 classes, cifar10 has 10" in said(row=replace(row, classes=9), labels=list(range(9)))
    assert "no picture of class 'class 9' in train (1 missing)" in said(labels=list(range(9)))
    assert "label -1 of picture 3 in train" in said(labels=[0, 1, 2, -1, *range(10)])
    store(folder, row)
    test = folder / "plain_text" / "test-00000-of-00001.parquet"
    good = test.read_bytes()
    test.write_bytes(good[:-20])
    assert f"cannot read {test}" in line(make, Vision8, "cifar10", root=tmp_path)
    test.unlink()
    assert "has no test split" in line(make, Vision8, "cifar10", root=tmp_path)
    test.with_name("test-00000-of-00003.parquet").write_bytes(good)
    assert "has 1 of the 3 shards of test" in line(make, Vision8, "cifar10", root=tmp_path)
    shutil.rmtree(folder)
    assert "there is no folder" in (text := line(make, Vision8, "cifar10", root=tmp_path))
    assert "three ways in" in text and row.repository in text and text.count("data.root=FOLDER") == 2
    folder.mkdir()
    assert "neither parquet or arrow files nor class folders in train" in line(make, Vision8, "cifar10", root=tmp_path)


def test_wrong_cells_are_one_line(tmp_path):
    row = Vision8.rows["cifar10"]
    good = dataset(row, 0, 10)

    def said(**changes) -> str:
        columns = good.cast_column("img", datasets.Image(decode=False)).to_dict() | changes
        types = {
            "img": datasets.Value("int64")
            if "img" in changes and isinstance(changes["img"][0], int)
            else datasets.Image()
        }
        types["label"] = (
            datasets.Value("string") if "label" in changes and "x" in changes["label"] else good.features["label"]
        )
        path = tmp_path / "cifar10" / "plain_text" / "train-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=datasets.Features(types)).to_parquet(path)
        dataset(row, 1, 1).to_parquet(path.with_name("test-00000-of-00001.parquet"))
        return line(make, Vision8, "cifar10", root=tmp_path)

    cells = good.cast_column("img", datasets.Image(decode=False))["img"]
    broken = [*cells[:7], {"bytes": b"not a picture", "path": None}, *cells[8:]]
    assert "cannot read the picture row 7 of train in" in (text := said(img=broken)) and "not an image" in text
    torn = [*cells[:7], {"bytes": encoded(0, "JPEG", 64)[:-400], "path": None}, *cells[8:]]
    assert "row 7 of train" in said(img=torn)
    assert "column 'img' holds no picture but int" in said(img=list(range(100)))
    assert "column 'label' is string with 0 nulls, not class numbers" in said(label=["x"] * 100)
    assert "with 1 nulls" in said(label=[None, *good["label"][1:]])


def test_no_network_is_one_line(tmp_path):
    for cls, task in (*UNIQUE, (Vtab, "kitti")):
        text = line(make, cls, task)
        assert "the hub gives nothing" in text and "three ways in" in text and cls.rows[task].repository in text


def test_bad_words_are_one_line():
    assert "did you mean 'cub200'" in line(data.build, "fgvc", task="cub20")
    assert "data.split=half: must be one of official, 80/20" in line(Fgvc, task="cub200", split="half")
    assert "data.select=test: must be one of val, last" in line(Fgvc, task="cub200", select="test")
    assert "data.augment=cutmix: must be one of none, flip, crop" in line(Fgvc, task="cub200", augment="cutmix")
    assert "did you mean 'vision8'" in line(data.build, "vision")
    assert "data.select=last" in line(Vtab, task="kitti", split=1000)


# VTAB-1k


def noah(root: Path, task: str = "kitti", sizes: tuple[int, int, int] = (800, 200, 711)) -> Path:
    """NOAH's folder, with the pictures of the 1000 stored twice as there."""
    folder, classes = root / task, Vtab.rows[task].classes
    where = {}
    for split, start, size in zip(("train800", "val200", "test"), (0, 800, 1000), sizes, strict=True):
        (folder / "images" / split).mkdir(parents=True)
        for i in range(size):
            path = folder / "images" / split / f"{i:06}.jpg"
            path.write_bytes(encoded(start + i, "BMP", 2))  # Pillow looks at the bytes, not at the name
            where.setdefault(split, []).append(f"images/{split}/{i:06}.jpg {(start + i) % classes}")
    where["train800val200"] = where["train800"] + where["val200"]
    for split, lines in where.items():
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_vtab_of_noah(tmp_path, capsys):
    noah(tmp_path / "v")
    module = make(Vtab, "kitti", root=tmp_path / "v", image_size=2)
    assert module.info["sizes"] == {"train": 800, "val": 200, "test": 711} and module.group == "structured"
    assert module.info["differences"] == [] and capsys.readouterr().err.count("kitti:") == 0
    record = {key: module.info[key] for key in ("split", "select", "normalize", "augment", "resize", "protocol")}
    assert record == {
        "split": "800/200", "select": "val", "normalize": "imagenet", "augment": "none",
        "resize": "bicubic to a square", "protocol": "train 800, choose on val 200, test once",
    }  # fmt: skip
    both = make(Vtab, "kitti", root=tmp_path / "v", image_size=2, split=1000, select="last", normalize=0.5)
    assert (
        both.info["sizes"] == {"train": 1000, "val": 0, "test": 711} and both.val is None and both.path == module.path
    )
    assert both.info["protocol"] == "train 1000, last epoch, test once" and both.info["normalize"] == "0.5"
    assert both.train.labels.tolist() == [i % 4 for i in range(1000)]
    alone = make(Vtab, "kitti", root=tmp_path / "v", image_size=2, select="last")
    assert len(alone.train) == 800 and alone.val is None
    for name in ("train800.txt", "val200.txt"):  # a repackaging with the thousand alone
        (tmp_path / "v" / "kitti" / name).unlink()
    assert digests(make(Vtab, "kitti", root=tmp_path / "v", image_size=2)) == digests(module)


def test_vtab_names_what_differs(tmp_path, capsys):
    noah(tmp_path, sizes=(800, 200, 5))
    lists = {name: tmp_path / "kitti" / f"{name}.txt" for name in ("train800", "test")}
    lists["train800"].write_text("".join(f"images/train800/{i:06}.jpg {i % 3}\n" for i in range(799)))
    lists["test"].write_text(lists["test"].read_text() + "images/train800/000041.jpg 0\nimages/val200/000007.jpg 0\n")
    with pytest.warns(UserWarning, match="1 pictures of train are in test too, the first is train 41 and test 5"):
        module = make(Vtab, "kitti", root=tmp_path, image_size=2)
    assert module.info["first_shared"] == (41, 5) and json.dumps(module.info)
    assert module.info["differences"] == [
        "799 pictures in train, CRISP Tab. 6 prints 800", "7 pictures in test, CRISP Tab. 6 prints 711",
        "train shows 3 of 4 classes",
    ]  # fmt: skip
    assert capsys.readouterr().err.count("kitti: train shows 3 of 4 classes") == 1
    with pytest.warns(UserWarning, match="2 pictures of train are in test too"):
        both = make(Vtab, "kitti", root=tmp_path, image_size=2, split=1000, select="last")
    assert both.info["shared_train_test"] == 2 and both.info["first_shared"] == (41, 5)


def test_vtab_as_parquet_and_as_folders(tmp_path):
    row = replace(Vtab.rows["svhn"], sizes={"train800": 0, "val200": 0, "test": 0})
    store(tmp_path / "svhn", row)
    assert make(Vtab, "svhn", root=tmp_path).info["sizes"] == {"train": 10, "val": 10, "test": 10}
    (tmp_path / "svhn" / "data" / "val200-00000-of-00001.parquet").unlink()
    assert "another sample of train is not VTAB-1k's" in line(make, Vtab, "svhn", root=tmp_path)
    for split in ("train", "val", "test"):
        for i in range(4):
            path = tmp_path / "kitti" / split / str(i) / "a.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(encoded(i, "PNG"))
    with pytest.warns(UserWarning, match="4 pictures"):
        assert make(Vtab, "kitti", root=tmp_path).num_classes == 4


def archive(tmp_path: Path, *sizes: int) -> Path:
    noah(tmp_path / "packed" / "deep" / "vtab-1k", sizes=sizes)
    with zipfile.ZipFile(tmp_path / ARCHIVE, "w") as file:
        for path in sorted((tmp_path / "packed").rglob("*")):
            file.write(path, path.relative_to(tmp_path / "packed"))
    return tmp_path / ARCHIVE


def test_vtab_from_the_hub(tmp_path):
    shutil.copy(archive(tmp_path, 8, 2, 3), snapshot(tmp_path, REPOSITORY, branch="main") / ARCHIVE)
    module = make(Vtab, "kitti", image_size=2)
    assert module.info["hub"] == REPOSITORY and module.info["commit"] == PINNED
    assert module.info["sizes"] == {"train": 8, "val": 2, "test": 3}
    assert "holds none" in line(make, Vtab, "svhn")
    assert make(Vtab, "kitti", revision=PINNED, image_size=2).path == module.path


def test_prepare_vtab(tmp_path, capsys):
    prepare = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "prepare_vtab.py"))["main"]
    root = tmp_path / "vtab-1k"
    assert prepare([str(root), "--zip", str(archive(tmp_path, 800, 200, 711))]) == 1
    out = capsys.readouterr().out
    assert "unpacked kitti" in out and "1 of 19 tasks are complete" in out and REPOSITORY in out
    assert f"{'kitti':22}ok" in out and f"{'cifar':22}no folder" in out
    assert prepare([str(root), "--task", "kitti", "--pictures"]) == 0 and not [
        p for p in root.iterdir() if p.name != "kitti"
    ]
    pictures = root / "kitti" / "images"
    (pictures / "test" / "000003.jpg").unlink()
    (pictures / "test" / "000009.jpg").unlink()
    (pictures / "val200" / "000001.jpg").write_text("torn")
    assert prepare([str(root), "--task", "kitti", "--pictures"]) == 1
    out = capsys.readouterr().out
    assert "2 pictures of test are missing, the first is" in out and "000003.jpg" in out
    assert "cannot read the picture" in out and "000001.jpg: not an image" in out
    (root / "kitti" / "val200.txt").unlink()
    assert prepare([str(root), "--task", "kitti"]) == 1 and "no list" in capsys.readouterr().out
    (tmp_path / "torn.zip").write_bytes((tmp_path / ARCHIVE).read_bytes()[:-300])
    assert prepare([str(root), "--zip", str(tmp_path / "torn.zip")]) == 2
    assert "cannot unpack" in capsys.readouterr().err
    assert prepare([str(root), "--hub"]) == 2


# The cache, when several build it


class Counted(VisionData):
    """Twenty grey pictures whose making takes a moment."""

    name, group = "counted", "test"
    built = 0

    def identity(self) -> str:
        return "counted"

    def source(self) -> Source:
        type(self).built += 1

        def picture(i):
            time.sleep(0.01)
            return np.full((4, 4), i, np.uint8)

        splits = {s: (Lazy(picture, range(20)), np.arange(20)) for s in ("train", "val", "test")}
        return Source([str(i) for i in range(20)], "none", splits)


def counted() -> Counted:
    return Counted(task="counted", image_size=4)


def test_several_ask_and_one_builds(monkeypatch):
    monkeypatch.setattr(Counted, "built", 0)
    threads = [threading.Thread(target=counted().prepare_data) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counted.built == 1
    with pytest.warns(UserWarning, match="20 pictures of train"):
        assert len(ready(counted()).test) == 20


def die_halfway(folder: str) -> None:
    os.environ["RECOMBINE_CACHE"] = folder
    decode = cache._decoded

    def killed(images, count, size):
        for i, pair in enumerate(decode(images, count, size)):
            if i == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            yield pair

    cache._decoded = killed
    counted().prepare_data()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_builder_confuses_nobody(tmp_path, monkeypatch):
    process = multiprocessing.get_context("fork").Process(target=die_halfway, args=(str(tmp_path / "cache"),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "cache" / "images").iterdir()
    start = time.time()
    counted().prepare_data()  # the lock went with its process
    assert time.time() - start < 5 and left.exists()  # perhaps somebody still writes to it
    os.utime(left, (0, time.time() - cache.STALE - 1))
    counted().path.unlink()
    counted().prepare_data()
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 2


def test_too_little_room_is_said_before_work(monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    assert "0.0 GB are needed and 0.0 GB are free" in line(counted().prepare_data)


# Augmentation


def test_flip_mirrors_half(tmp_path):
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5).repeat(200, 1, 1, 1)
    out = augment.flip(images, torch.Generator().manual_seed(0))
    same = (out == images).flatten(1).all(1)
    assert torch.equal(out[~same], images[~same].flip(-1)) and 160 < same.sum() < 240


def test_crop_is_affine_and_inside():
    """A ramp stays a ramp: its slope is the crop's side over the square's, and its values lie within the square's."""
    size = 64
    ramp = torch.arange(size, dtype=torch.float32)
    images = torch.stack([ramp.expand(size, size), ramp.view(-1, 1).expand(size, size)]).repeat(300, 1, 1, 1)
    out = augment.crop(images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape and out.min() >= 0 and out.max() <= size - 1
    inner = slice(8, -8)  # half a pixel at the border is clamped
    across, down = out[:, 0, 0, inner].diff(dim=-1), out[:, 1, inner, 0].diff(dim=-1)
    assert (across - across.mean(1, keepdim=True)).abs().max() < 1e-3
    width, height = across.mean(1), down.mean(1)  # width is negative where it is mirrored
    assert (down > 0).all() and 0.4 < (width < 0).float().mean() < 0.6
    area, aspect = width.abs() * height, width.abs() / height
    whole = (width.abs() < 0.99) & (height < 0.99)  # nothing was cut off
    assert area.min() > 0.079 and area.max() <= 1.001 and area.mean() == pytest.approx(0.54, abs=0.06)
    assert aspect[whole].min() > 0.74 and aspect[whole].max() < 1.34


def test_augmentation_is_for_training_and_follows_the_seed(tmp_path):
    row = Vision8.rows["cifar10"]
    store(tmp_path / "cifar10", row, each=10)

    def batch(augmented="crop", seed=0, step=0, training=True):
        module = make(Vision8, "cifar10", root=tmp_path, normalize=0.5, augment=augmented, seed=seed)
        module.trainer = SimpleNamespace(training=training, global_step=step, global_rank=0, world_size=1)
        raw = module.train.__getitems__(list(range(16)))
        return module.on_after_batch_transfer(raw, 0)[0], module.normalise(raw[0])

    for kind in ("flip", "crop"):
        out, plain = batch(kind)
        assert out.shape == plain.shape and out.dtype == torch.float32 and not torch.equal(out, plain)
        assert torch.equal(out, batch(kind)[0]) and not torch.equal(out, batch(kind, seed=1)[0])
        assert not torch.equal(out, batch(kind, step=1)[0]) and torch.equal(*batch(kind, training=False))
    assert torch.equal(*batch("none"))
    module = make(Vision8, "cifar10", root=tmp_path, normalize=0.5, augment="crop")  # no trainer: calibration, probe
    raw = module.train.__getitems__([0, 1])
    assert torch.equal(module.on_after_batch_transfer(raw, 0)[0], module.normalise(raw[0]))


def test_hub_reads_rows_by_block(tmp_path):
    row = Vision8.rows["cifar10"]
    part = dataset(row, 0, 10)
    part.to_parquet(tmp_path / "train-00000-of-00001.parquet", batch_size=7)
    part.save_to_disk(tmp_path / "train", num_shards=4)
    cells = part.cast_column("img", datasets.Image(decode=False))["img"]
    for suffix in ("parquet", "arrow"):
        rows = parquet.Rows(sorted(tmp_path.rglob(f"*.{suffix}")), "img", "here")
        assert len(rows) == 100 and [rows[i] for i in (99, 0, 34, 35)] == [
            (f"row {i} here", cells[i]["bytes"]) for i in (99, 0, 34, 35)
        ]
