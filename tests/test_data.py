"""Generated, packaged and folder data: pinned pictures, true labels, clean splits, an unbreakable cache."""

import csv
import hashlib
import json
import shutil
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from recombine import data
from recombine.data.sampling import stratified
from recombine.data.vision import packaged, ray_caster, synthetic
from recombine.data.vision.offline import SUITE, TASKS, Offline, pins
from recombine.data.vision.source import SIZES
from recombine.errors import UsageError
from recombine.runtime import assets

GENERATED = [task for task in SUITE if TASKS[task][2] is synthetic.build]
NORM = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECOMBINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


def ready(module):
    module.prepare_data()
    module.setup()
    return module


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UsageError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# Generated tasks


@pytest.mark.parametrize("task", ["dsprites_loc", "dsprites_ori"])
def test_dsprites_are_the_pinned_ones(task, cache):
    module = ready(Offline(task=task, image_size=64))  # refuses another sha256 by itself
    assert module.info["sha256"] == pins()[task] and module.info["sizes"] == SIZES
    assert set(np.unique(module.train.images)) == {0, 255}


@pytest.mark.parametrize(
    ("task", "prefix"),
    [("clevr_count", "89ecd700fe445d43"), ("snorb_azim", "de46392bd90ed563"), ("snorb_elev", "d4d3aa599ed2db29")],
)
def test_ray_cast_pictures_are_the_pinned_ones(task, prefix):
    images, _ = synthetic.build(task).splits["test"]
    assert hashlib.sha256(b"".join(images[i].tobytes() for i in range(16))).hexdigest()[:16] == prefix


@pytest.mark.full
@pytest.mark.parametrize("task", GENERATED[2:])
def test_every_ray_cast_picture_is_pinned(task, cache):
    ready(Offline(task=task, image_size=32))


@pytest.mark.parametrize("task", GENERATED)
def test_generated_labels_cover_every_class(task):
    source = synthetic.build(task)
    assert {split: len(labels) for split, (_, labels) in source.splits.items()} == SIZES
    for split, (images, labels) in source.splits.items():
        counts = np.bincount(labels, minlength=len(source.classes))
        assert len(images) == len(labels) and len(counts) == len(source.classes) == TASKS[task][1]
        assert counts.min() > 0 and counts.max() < 3 * SIZES[split] / len(counts)


def test_factors_do_not_repeat_and_test_toys_are_new():
    for rows in (synthetic.dsprites_factors(2018), synthetic.snorb_factors(2004)):
        together = np.concatenate(list(rows.values()))
        assert len(np.unique(together, axis=0)) == len(together)
    toys = {split: {tuple(row[:2]) for row in part} for split, part in rows.items()}
    assert not (toys["train"] | toys["val"]) & toys["test"] and len(toys["test"]) == 25
    assert len({synthetic.toy(c, i) for c in range(5) for i in range(10)}) == 50


def test_dsprites_labels_are_where_and_how_the_glyph_lies():
    images, labels = synthetic.build("dsprites_loc").splits["val"]
    columns = np.array([np.flatnonzero(images[i].any(0)).mean() for i in range(200)])
    assert np.corrcoef(columns, labels)[0, 1] > 0.99
    row = np.array([1, 5, 0, 16, 16])  # an ellipse, which bin 0 shows lying
    lying, standing = synthetic.dsprite(row), synthetic.dsprite(row + [0, 0, 10, 0, 0])
    assert np.ptp(np.nonzero(lying)[1]) > 1.5 * np.ptp(np.nonzero(lying)[0])
    assert np.ptp(np.nonzero(standing)[0]) > 1.5 * np.ptp(np.nonzero(standing)[1])
    source = synthetic.build("dsprites_ori")
    turns = synthetic.dsprites_factors(2019)["train"][:, 2]
    assert (source.splits["train"][1] == np.floor(turns / 2.5)).all()


def test_clevr_labels_are_in_the_scene():
    count, distance = (synthetic.build(f"clevr_{kind}").splits["val"] for kind in ("count", "dist"))
    for i in range(20):
        scene = synthetic.clevr_scene(SIZES["train"] + i)
        assert len(scene.solids) == count[1][i] + 3
        gaps = [np.linalg.norm(np.subtract(s.centre, scene.camera)) for s in scene.solids]
        assert np.digitize(min(gaps), synthetic.DISTANCES) == distance[1][i]
    assert (count[0][0] == distance[0][0]).all()  # the same pictures


def test_cast_sees_a_ball_where_it_is():
    ball = ray_caster.Solid("sphere", (0.0, 0.0, 1.0), (1.0,) * 3, (1.0, 0.0, 0.0))
    view = ((6.0, 0.0, 1.0), (0.0, 0.0, 1.0), (6.0, 0.0, 8.0), 0.5, (0.0, 0.0, 1.0), (0.0, 0.0, 1.0))
    image = ray_caster.cast([ball], *view)
    red = np.argwhere(image[..., 0] > image[..., 2])
    assert np.abs(red.mean(0) - 47.5).max() < 1.5
    assert abs(np.ptp(red[:, 1]) - 96 / (0.5 * np.sqrt(35))) < 2  # tangent of its half angle: 1 / sqrt(35)


def test_stratified_keeps_shares():
    labels = np.repeat([0, 1, 3], [50, 30, 20])
    chosen = stratified(labels, 10, 0)
    assert np.bincount(labels[chosen]).tolist() == [5, 3, 0, 2] and len(set(chosen.tolist())) == 10
    assert chosen.tolist() == stratified(labels, 10, 0).tolist() != stratified(labels, 10, 1).tolist()


# Packaged tasks


def group_of(name: str) -> dict[str, dict[int, set[str]]]:
    share = {"emoji19.csv": (0.2, 1960), "openclipart25.csv": (0.3, 2004)}[name]
    table, _ = packaged._table(name)
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


# The module and its cache


def sprites(**kwargs):
    return Offline(**{"task": "dsprites_loc", "image_size": 32, "limit": 40, **NORM, **kwargs})


def test_batches_are_normalised_on_arrival(cache):
    module = ready(sprites(batch_size=16))
    images, labels = next(iter(module.val_dataloader()))
    assert images.shape == (16, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert images.is_contiguous() and torch.equal(labels, torch.from_numpy(module.val.labels[:16]))
    x, y = module.on_after_batch_transfer((images, labels), 0)
    torch.testing.assert_close(x, (images / 255 - 0.5) / 0.5)
    assert torch.equal(y, labels) and [len(b[1]) for b in module.train_dataloader()] == [16, 16, 8]
    one, label = module.val[3]
    assert torch.equal(one, images[3]) and label == labels[3]


def test_order_follows_the_seed(cache):
    ready(sprites())

    def epochs(seed):
        loader = ready(sprites(seed=seed)).train_dataloader()
        return [torch.cat([images.float().mean((1, 2, 3)) for images, _ in loader]).tolist() for _ in range(2)]

    first = epochs(1)
    assert first == epochs(1) != epochs(2) and first[0] != first[1] and sorted(first[0]) == sorted(first[1])


def test_info_is_complete_and_plain(cache):
    info = json.loads(json.dumps(ready(sprites()).info))
    assert info["sizes"] == {"train": 40, "val": 40, "test": 40} and "not comparable" in info["note"]
    assert {"name", "task", "group", "licence", "sha256", "protocol", "mean", "std", "image_size"} <= set(info)


def test_a_damaged_cache_is_rebuilt(cache):
    module = ready(sprites())
    path, good = module.path, module.path.read_bytes()
    for damage in (
        lambda: path.write_bytes(good[:-100]),
        path.unlink,
        lambda: path.with_suffix(".json").write_text("{"),
    ):
        damage()
        assert "prepare_data" in refusal(sprites().setup)
        ready(sprites())
        assert path.read_bytes() == good
    assert len(list(path.parent.iterdir())) == 2  # no temporary file is left


def test_a_failed_build_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(synthetic, "dsprite", lambda factors: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sprites().prepare_data()
    assert not list((cache / "images").iterdir())


def test_two_builders_at_once(cache):
    threads = [threading.Thread(target=sprites().prepare_data) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ready(sprites()).train) == 40 and len(list((cache / "images").iterdir())) == 2


def test_other_pictures_than_the_pinned_are_refused(cache, monkeypatch):
    monkeypatch.setattr(synthetic, "dsprite", lambda factors: np.zeros((64, 64), np.uint8))
    assert "sha256 of train" in refusal(Offline(task="dsprites_loc", image_size=8).prepare_data)
    assert not list((cache / "images").iterdir())


def test_no_space_and_no_folder(cache, monkeypatch, tmp_path):
    if Path("/dev/full").exists():
        monkeypatch.setattr("recombine.data.vision.cache.uuid4", lambda: SimpleNamespace(hex="x"))
        (cache / "images").mkdir(parents=True)
        Path(f"{sprites().path}.x").symlink_to("/dev/full")
        assert "No space left" in refusal(sprites().prepare_data)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RECOMBINE_CACHE", str(tmp_path / "file"))
    assert "RECOMBINE_CACHE" in refusal(sprites().prepare_data)


def test_bad_settings_are_one_line(cache):
    assert "did you mean 'dsprites_loc'" in refusal(data.build, "offline", task="dsprites_lok")
    assert "did you mean 'offline'" in refusal(data.build, "ofline")
    assert "batch_size=0" in refusal(sprites, batch_size=0)
    assert "image_size is not set" in refusal(sprites(image_size=None).prepare_data)
    assert "data.mean=None" in refusal(sprites(mean=None).normalise, torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    assert isinstance(data.build("offline", task="emoji"), Offline)


# Folders


def picture(path: Path, shade: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 9, 3), shade, np.uint8)).save(path)


def folder(root, **kwargs):
    return ready(data.build("folder", root=str(root), image_size=8, **kwargs))


def tree(root: Path, splits=("train", "val", "test"), each=10):
    shade = 0
    for split in splits:
        for name in ("ant", "bee"):
            for i in range(each):
                picture(root / split / name / f"{i}.png", shade)
                shade += 1


def test_folder_of_splits(cache, tmp_path):
    tree(tmp_path / "d")
    module = folder(tmp_path / "d")
    assert module.classes == ["ant", "bee"] and module.info["sizes"] == {"train": 20, "val": 20, "test": 20}
    assert module.test.labels.tolist() == [0] * 10 + [1] * 10
    assert module.test.images[:, 0, 0, 0].tolist() == list(range(40, 60))
    shutil.rmtree(tmp_path / "d" / "val")
    module = folder(tmp_path / "d")
    assert module.info["sizes"] == {"train": 16, "val": 4, "test": 20}
    assert np.bincount(module.val.labels).tolist() == [2, 2]
    assert not set(module.train.images[:, 0, 0, 0]) & set(module.val.images[:, 0, 0, 0])


def test_folder_of_classes_is_cut_by_seed(cache, tmp_path):
    tree(tmp_path, splits=["d"])
    parts = [folder(tmp_path / "d", seed=seed) for seed in (0, 0, 1)]
    for module in parts:
        assert [np.bincount(s.labels).tolist() for s in (module.train, module.val, module.test)] == [
            [7, 7],
            [1, 1],
            [2, 2],
        ]
        shades = [s.images[:, 0, 0, 0].tolist() for s in (module.train, module.val, module.test)]
        assert sorted(sum(shades, [])) == list(range(20))
    first, again, other = (m.test.images[:, 0, 0, 0].tolist() for m in parts)
    assert first == again != other


def noah(root: Path):
    for i in range(6):
        picture(root / f"images/x/{i}.png", 40 * i)
    (root / "train800.txt").write_text("images/x/0.png 0\nimages/x/1.png 1\n")
    (root / "val200.txt").write_text("images/x/2.png 1\n")
    (root / "test.txt").write_text("images/x/3.png 0\nimages/x/4.png 1\nimages/x/0.png 0\n")


def test_folder_of_lists(cache, tmp_path):
    noah(tmp_path / "mine")
    with pytest.warns(UserWarning, match="1 pictures of train are in test"):
        module = folder(tmp_path, task="mine")
    assert module.test.labels.tolist() == [0, 1, 0] and module.num_classes == 2
    assert module.info["shared_train_test"] == 1 and module.train.images[1, 0, 0, 0] == 40
    noah(tmp_path / "kitti")
    with pytest.warns(UserWarning):
        assert folder(tmp_path / "kitti").num_classes == 4


def test_an_edited_picture_is_read_again(cache, tmp_path):
    tree(tmp_path / "d")
    folder(tmp_path / "d")
    Image.fromarray(np.full((20, 20, 3), 250, np.uint8)).save(tmp_path / "d/train/ant/0.png")
    assert folder(tmp_path / "d").train.images[0, 0, 0, 0] == 250


def test_folder_errors_are_one_line(cache, tmp_path):
    d = tmp_path / "d"

    def line(**kwargs):
        return refusal(folder, d, **kwargs)

    assert "no folder" in line()
    d.mkdir()
    assert "no class folders" in line()
    (d / "ant").mkdir()
    assert "no pictures" in line()
    picture(d / "ant" / "0.png", 0)
    assert "too few" in line()
    assert "no folder" in line(task="mine")
    shutil.rmtree(d)
    tree(d, splits=["train"])
    assert "must be test" in line()
    tree(d)
    picture(d / "test" / "cat" / "0.png", 0)
    assert "class 'cat'" in line()
    shutil.rmtree(d / "test" / "cat")
    torn = d / "val" / "bee" / "3.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(torn)
    torn.write_bytes(torn.read_bytes()[:6000])
    assert str(torn) in line()
    torn.write_text("text")
    assert str(torn) in line()


def test_list_errors_are_one_line(cache, tmp_path):
    noah(tmp_path)

    def line(name, text):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text)
        said = refusal(folder, tmp_path)
        (tmp_path / name).write_text(before)
        return said

    assert "test.txt:2: 'oops'" in line("test.txt", "images/x/3.png 0\noops\n")
    assert "label 2 is out of range" in line("val200.txt", "images/x/3.png 2\n")
    assert "label -1 is out of range" in line("train800.txt", "images/x/3.png -1\nimages/x/3.png 1\n")
    assert "lists no pictures" in line("test.txt", "")
    assert "no picture" in line("test.txt", "images/x/9.png 0\n")
    (tmp_path / "val200.txt").unlink()
    assert "val200.txt" in refusal(folder, tmp_path)
