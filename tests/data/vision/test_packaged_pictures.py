"""Packaged pictures: groups, splits and pins."""

import csv
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from helpers import ready, refusal
from recombine.data.vision import packaged
from recombine.data.vision.offline import TASKS, Offline, pins
from recombine.data.vision.source import SIZES
from recombine.errors import UsageError
from recombine.runtime import assets


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A fresh cache of pictures over the user's own cache of packages."""

    def need(*names):
        try:
            paths = [assets.fetch(name) for name in names]
        except UsageError as error:
            pytest.skip(str(error))
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "assets").symlink_to(paths[0].parent)
        monkeypatch.setenv("RECOMBINE_CACHE", str(tmp_path / "cache"))

    return need


def group_of(name: str) -> dict[str, dict[int, set[str]]]:
    share = {"emoji19.csv": (0.2, 1960), "openclipart25.csv": (0.3, 2004)}[name]
    table, _ = packaged.read_table(name)
    split = packaged._grouped(table, *share)
    return {s: set(table["group"][split == s].tolist()) for s in SIZES} | {
        "test": set(table["group"][table["test"] == "1"])
    }


@pytest.mark.parametrize("name", ["emoji19.csv", "openclipart25.csv"])
def test_groups_do_not_straddle(name):
    groups = group_of(name)
    assert not groups["train"] & groups["val"] and not (groups["train"] | groups["val"]) & groups["test"]


def whole(module):
    """Built as pinned, every split with labels in range, nothing shared."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an unpinned drawing or a shared picture warns
        ready(module)
    assert module.info["sha256"] == pins()[module.task] and module.info["shared_train_test"] == 0
    for split in (module.train, module.val, module.test):
        labels = split.labels
        assert labels.min() >= 0 and labels.max() < module.num_classes == len(module.classes)
    return module


def test_emoji_of_one_vendor(packages):
    packages("emoji_twemoji")
    module = whole(Offline(task="emoji_twemoji", image_size=56))
    assert module.info["sizes"] == {"train": 338, "val": 89, "test": 216} and module.group == "natural"


def test_fashion_mnist(packages):
    packages("fashion_mnist")
    module = whole(Offline(task="fashion_mnist", image_size=28))
    assert (np.bincount(module.train.labels) == 80).all() and (np.bincount(module.test.labels) == 100).all()


@pytest.mark.full
@pytest.mark.parametrize("task", ["emoji", "emoji_noto_openmoji", "emoji_fluent", "openclipart", "elpv"])
def test_other_packaged_tasks(task, packages):
    packages(*(n for n in assets.ASSETS if n.startswith(task.split("_")[0])))
    whole(Offline(task=task, image_size=56))


def test_fashion_mnist_falls_to_the_hub_aloud(cache, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    images = [Image.fromarray(np.full((28, 28), i, np.uint8)) for i in range(3)]
    part = {"image": images, "label": [0, 1, 2]}
    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name: {"train": part, "test": part})
    )
    arrays = packaged._fashion_arrays()
    assert arrays["test"][0].shape == (3, 28, 28) and arrays["train"][1].tolist() == [0, 1, 2]
    assert packaged.FASHION_HUB in capsys.readouterr().err

    def offline(name):
        raise ConnectionError("no network\nat all")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    line = refusal(packaged.fashion_mnist, "fashion_mnist")
    assert "apt-get" in line and str(cache) in line and packaged.FASHION_HUB in line and "no network" in line


def test_shipped_splits_agree_with_the_pins():
    assert set(pins()) == set(TASKS)
    with (packaged.SPLITS / "emoji19.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 643 and sum(row["test"] == "1" for row in rows) == 216
    assert {"emoji": "1f40e", "name": "horse", "class": "mammal"}.items() <= next(
        r for r in rows if r["emoji"] == "1f40e"
    ).items()
