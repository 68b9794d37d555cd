"""A short run that may be divided among ranks, and whether two of them came to the same."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from helpers import CONF
from recombine.runner import ranks

TINY = [
    *("model=tiny_vit", "trainer=cpu", "trainer.progress=false", "data.limit=33", "data.batch_size=8"),
    *("trainer.epochs=2", "trainer.checkpoint_minutes=0"),  # 33 = 4 * 8 + 1: the last batch is too small for two
]


def execute(folder: Path, *overrides: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        ranks.main(compose("config", [*TINY, *overrides]), folder)
    path = folder / "result.json"  # the first of several ranks writes it, perhaps later than another ends
    return json.loads(path.read_text()) if path.is_file() else {}


def same(one: Path, two: Path) -> None:
    """Equal but for the order of sums."""
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (one, two))
    for split in ("val", "test"):
        assert a[split].keys() == b[split].keys()
        for key, value in a[split].items():
            assert b[split][key] == pytest.approx(value, rel=1e-4), (split, key)
    assert a["test_right"] == b["test_right"]  # in the order of the test set
    assert a["best_epoch"] == b["best_epoch"] and a["linear_probe"] == b["linear_probe"]
    a, b = (load_file(folder / "best.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-4, msg=name)
