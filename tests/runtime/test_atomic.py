"""Files that are there whole or not at all, for all who may read new files."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from helpers.command import execute
from recombine import UsageError
from recombine.runtime.atomic import atomic_write


@pytest.fixture
def umask():
    """Sets the umask, and sets it back at the end."""
    before = os.umask(0)
    yield os.umask
    os.umask(before)


def permissions(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask, expected", [(0o022, 0o644), (0o027, 0o640)])
def test_permissions_follow_the_umask(mask, expected, umask, tmp_path):
    umask(mask)
    with atomic_write(tmp_path / "x.safetensors") as temporary:
        save_file({"x": torch.ones(2)}, temporary)
    with atomic_write(tmp_path / "x.safetensors") as temporary:  # the file that it takes the place of
        save_file({"x": torch.ones(3)}, temporary)
    with atomic_write(tmp_path / "x.txt") as temporary:
        temporary.write_text("x")
    assert {permissions(path) for path in tmp_path.iterdir()} == {expected} and len(list(tmp_path.iterdir())) == 2


def test_colleagues_can_read_all_that_a_run_leaves(umask, tmp_path):
    umask(0o027)
    joint = ["stage=joint", "budget=retained_50", "method=svd", "stage.distil.epochs=1", "trainer.epochs=1"]
    execute(tmp_path, *joint)
    found = {path.name: permissions(path) for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(["best.safetensors", "distilled.safetensors", "result.json"], 0o640)


def test_what_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "x").write_text("old")
    refused = pytest.raises(UsageError, match=r"x: cannot be written \(full\); free some space")
    with refused, atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("new")
        raise OSError(28, "full")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]
