"""The cache, when several processes build it."""

import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock

from helpers import ready, refusal
from recombine.data.vision import cache
from recombine.data.vision.base import VisionData
from recombine.data.vision.source import Lazy, Source

pytestmark = pytest.mark.usefixtures("empty_caches")


class Counted(VisionData):
    """Twenty grey pictures."""

    name, group = "counted", "test"
    built = 0

    def identity(self) -> str:
        return "counted"

    def source(self) -> Source:
        type(self).built += 1

        def picture(i):
            return np.full((4, 4), i, np.uint8)

        splits = {s: (Lazy(picture, range(20)), np.arange(20)) for s in ("train", "val", "test")}
        return Source([str(i) for i in range(20)], "none", splits)


def counted() -> Counted:
    return Counted(task="counted", image_size=4)


def test_several_ask_and_one_builds(monkeypatch):
    monkeypatch.setattr(Counted, "built", 0)
    together = threading.Barrier(4)
    threads = [threading.Thread(target=lambda: (together.wait(), counted().prepare_data())) for _ in range(4)]
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
    (lock,) = (tmp_path / "cache").rglob("*.lock")
    with FileLock(lock, timeout=0):
        pass  # it went with its process
    counted().prepare_data()
    assert left.exists()  # perhaps somebody still writes to it
    os.utime(left, (0, time.time() - cache.STALE - 1))
    counted().path.unlink()
    counted().prepare_data()
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 2


def test_too_little_room_is_said_before_work(monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    assert "0.0 GB are needed and 0.0 GB are free" in refusal(counted().prepare_data)
