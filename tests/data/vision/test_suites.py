"""The papers' picture sets on tiny files in the form of their hub counterparts."""

import csv
import hashlib
import math
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest

from helpers import ROOT, refusal
from helpers.hub_pictures import PINNED, dataset, digests, encoded, make, snapshot, store
from recombine import data
from recombine.data.sampling import shuffled
from recombine.data.vision.suites import Fgvc, Imagenet, Vision8
from recombine.data.vision.vtab import TESTS, Vtab

pytestmark = pytest.mark.usefixtures("empty_caches")

SETS = {(cls, task): row for cls in (Fgvc, Vision8, Imagenet) for task, row in cls.rows.items()}
UNIQUE = list({row.repository: key for key, row in reversed(SETS.items())}.values())

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
    assert "must be one of official" in refusal(Imagenet, task="imagenet", split="80/20")
    monkeypatch.setitem(Imagenet.rows, "imagenet", replace(row, share=0.02))
    assert "1 pictures are too few to hold out 10%" in refusal(make, Imagenet, "imagenet", root=tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "n00000007").rename(tmp_path / split / "goldfish")
    assert "class folder 'goldfish' is no WordNet id" in refusal(make, Imagenet, "imagenet", root=tmp_path)


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
    assert "data.normalize=clip: must be one of" in refusal(Vision8, task="cifar10", normalize="clip")


# What is wrong, in one line


def test_wrong_files_are_one_line(tmp_path, monkeypatch):
    row = Vision8.rows["cifar10"]
    folder = tmp_path / "cifar10"

    def said(**kwargs) -> str:
        shutil.rmtree(folder, ignore_errors=True)
        store(folder, kwargs.pop("row", row), **kwargs)
        return refusal(make, Vision8, "cifar10", root=tmp_path)

    assert "has no column 'img' but picture, label" in said(image="picture")
    assert "has no column 'label' but img, fine" in said(row=replace(row, label="fine"))
    assert "has 9 classes, cifar10 has 10" in said(row=replace(row, classes=9), labels=list(range(9)))
    assert "no picture of class 'class 9' in train (1 missing)" in said(labels=list(range(9)))
    assert "label -1 of picture 3 in train" in said(labels=[0, 1, 2, -1, *range(10)])
    store(folder, row)
    test = folder / "plain_text" / "test-00000-of-00001.parquet"
    good = test.read_bytes()
    test.write_bytes(good[:-20])
    assert f"cannot read {test}" in refusal(make, Vision8, "cifar10", root=tmp_path)
    test.unlink()
    assert "has no test split" in refusal(make, Vision8, "cifar10", root=tmp_path)
    test.with_name("test-00000-of-00003.parquet").write_bytes(good)
    assert "has 1 of the 3 shards of test" in refusal(make, Vision8, "cifar10", root=tmp_path)
    shutil.rmtree(folder)
    assert "there is no folder" in (text := refusal(make, Vision8, "cifar10", root=tmp_path))
    assert "three ways in" in text and row.repository in text and text.count("data.root=FOLDER") == 2
    folder.mkdir()
    assert "neither parquet or arrow files nor class folders in train" in refusal(
        make, Vision8, "cifar10", root=tmp_path
    )


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
        return refusal(make, Vision8, "cifar10", root=tmp_path)

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
        text = refusal(make, cls, task)
        assert "the hub gives nothing" in text and "three ways in" in text and cls.rows[task].repository in text


def test_bad_words_are_one_line():
    assert "did you mean cub200" in refusal(data.build, "fgvc", task="cub20")
    assert "data.split=half: must be one of official, 80/20" in refusal(Fgvc, task="cub200", split="half")
    assert "data.select=test: must be one of val, last" in refusal(data.build, "fgvc", task="cub200", select="test")
    assert "data.augment=cutmix: must be one of none, flip, crop" in refusal(
        data.build, "fgvc", task="cub200", augment="cutmix"
    )
    assert "did you mean vision8" in refusal(data.build, "vision")
    assert "data.select=last" in refusal(Vtab, task="kitti", split=1000)
