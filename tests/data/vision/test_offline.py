"""The offline suite and its cache."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import ready, refusal
from recombine import data
from recombine.data.vision import synthetic
from recombine.data.vision.offline import Offline

NORM = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


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
        lambda: path.write_bytes(bytes(range(256)) * (len(good) // 256) + good[len(good) // 256 * 256 :]),
        lambda: path.write_bytes(good[:10] + b"?" * 118 + good[128:]),
        lambda: path.with_suffix(".json").write_text("[]"),
        lambda: path.with_suffix(".json").write_text(f'{{"bytes": {len(good)}, "splits": 5}}'),
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
    assert "did you mean dsprites_loc" in refusal(data.build, "offline", task="dsprites_lok")
    assert "did you mean offline" in refusal(data.build, "ofline")
    assert "batch_size=0" in refusal(data.build, "offline", task="dsprites_loc", batch_size=0)
    assert "image_size is not set" in refusal(sprites(image_size=None).prepare_data)
    assert "data.mean=None" in refusal(sprites(mean=None).normalise, torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    assert isinstance(data.build("offline", task="emoji"), Offline)


@pytest.mark.parametrize("task", ["dsprites_loc", "clevr_count", "snorb_azim"])
def test_more_test_pictures_follow_the_others(task, cache):
    few, more = ready(sprites(task=task)), ready(sprites(task=task, test_size=60))
    assert few.foreseen == {"train": 40, "val": 40, "test": 40} and more.foreseen["test"] == len(more.test) == 60
    for split in ("train", "val", "test"):
        known = range(len(getattr(few, split)))
        assert torch.equal(getattr(few, split)[known][0], getattr(more, split)[known][0])
    assert more.info["sha256"]["train"] == few.info["sha256"]["train"]


def test_more_test_pictures_than_there_are(cache):
    line = refusal(lambda: sprites(task="emoji", test_size=1001))
    assert "data.test_size=1001" in line and "1000" in line
