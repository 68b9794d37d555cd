"""A user's folder of pictures: splits, classes, lists and every refusal."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import ready, refusal
from recombine import data
from recombine.data.vision.folder import LISTS, lists
from recombine.data.vision.source import decode
from recombine.errors import UsageError


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


def test_a_limit_keeps_every_class_in_its_share(cache, tmp_path):
    """A listing goes class by class, so its first rows are of one."""
    tree(tmp_path / "d")
    whole, few = folder(tmp_path / "d"), folder(tmp_path / "d", limit=6)
    for split in ("train", "val", "test"):
        part = getattr(few, split)
        assert part.labels.tolist() == [0] * 3 + [1] * 3
        assert set(part.images[:, 0, 0, 0].tolist()) <= set(getattr(whole, split).images[:, 0, 0, 0].tolist())


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


def test_greys_of_16_bits_are_no_white(cache, tmp_path):
    """Pillow's own conversion cuts every value above 255."""
    greys = np.linspace(0, 65535, 54).reshape(6, 9)
    Image.fromarray(greys.astype(np.uint16)).save(tmp_path / "x.png")
    (tmp_path / "x.pgm").write_bytes(b"P5 9 6 65535\n" + greys.astype(">u2").tobytes())
    for name in ("x.png", "x.pgm"):
        assert (decode(tmp_path / name) == (greys.astype(np.uint16) >> 8)[..., None]).all()
    for kind in (np.int32, np.float32):
        Image.fromarray(greys.astype(kind)).save(tmp_path / "x.tif")
        assert "save it with 8 or 16 bits" in refusal(decode, tmp_path / "x.tif")


def test_hidden_files_are_no_pictures(cache, tmp_path):
    """Such as those that macOS leaves on a foreign disk."""
    tree(tmp_path)
    (tmp_path / "train" / "ant" / "._0.png").write_bytes(b"Mac OS X")
    assert len(folder(tmp_path).train) == 20


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
    assert f"data.root={d} data.task=mine: there is no folder" in line(task="mine")
    for i in range(9):
        picture(d / "ant" / f"{i}.png", i)
    assert "has one class, ant" in line()
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


def test_a_list_stays_below_its_folder(tmp_path):
    for name in LISTS.values():
        (tmp_path / name).write_text("images/a.jpg 0\n")
    for path in ("/etc/passwd", "../outside.jpg", "images/../../outside.jpg"):
        (tmp_path / "train800.txt").write_text(f"images/a.jpg 0\n{path} 0\n")
        with pytest.raises(UsageError, match="train800.txt:2: .* leads out of"):
            lists(tmp_path, 1)
