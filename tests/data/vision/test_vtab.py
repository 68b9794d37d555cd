"""VTAB-1k: NOAH's folder, parquet, folders and the hub."""

import json
import runpy
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import ROOT, refusal
from helpers.hub_pictures import PINNED, digests, encoded, make, snapshot, store
from recombine.data.vision.vtab import ARCHIVE, REPOSITORY, Vtab, unpack

pytestmark = pytest.mark.usefixtures("empty_caches")


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
    assert "another sample of train is not VTAB-1k's" in refusal(make, Vtab, "svhn", root=tmp_path)
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
    assert "holds none" in refusal(make, Vtab, "svhn")
    assert make(Vtab, "kitti", revision=PINNED, image_size=2).path == module.path


def test_one_task_is_unpacked(tmp_path, monkeypatch):
    noah(tmp_path / "packed" / "vtab-1k", "svhn", (8, 2, 3))
    zipped, root = archive(tmp_path, 8, 2, 3), tmp_path / "root"
    with zipfile.ZipFile(zipped, "a") as file:
        for path in sorted((tmp_path / "packed" / "vtab-1k" / "svhn").rglob("*")):
            file.write(
                path, Path("deep", "vtab-1k", "svhn", path.relative_to(tmp_path / "packed" / "vtab-1k" / "svhn"))
            )
    (root / ".unpacking-dead" / "deep").mkdir(parents=True)  # of one that was killed
    assert unpack(zipped, root, ["kitti"]) == ["kitti"] and [path.name for path in root.iterdir()] == ["kitti"]
    assert make(Vtab, "kitti", root=root, image_size=2).info["sizes"] == {"train": 8, "val": 2, "test": 3}
    kept = (root / "kitti" / "test.txt").stat().st_mtime_ns
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert "0.0 GB are free; free some space there" in refusal(unpack, zipped, root)
    assert [path.name for path in root.iterdir()] == ["kitti"]
    assert unpack(zipped, root) == ["svhn"] and (root / "kitti" / "test.txt").stat().st_mtime_ns == kept


def test_decoded_pictures_need_no_archive(tmp_path):
    zipped = snapshot(tmp_path, REPOSITORY, branch="main") / ARCHIVE
    shutil.copy(archive(tmp_path, 8, 2, 3), zipped)
    first = make(Vtab, "kitti", image_size=2)
    zipped.unlink()
    shutil.rmtree(tmp_path / "cache" / "vtab-1k" / PINNED)
    assert digests(make(Vtab, "kitti", image_size=2)) == digests(first)
    assert ARCHIVE in refusal(make, Vtab, "kitti", image_size=3)


def test_prepare_vtab(tmp_path, capsys):
    prepare = runpy.run_path(str(ROOT / "scripts" / "prepare_vtab.py"))["main"]
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
