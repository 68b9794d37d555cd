"""A training that diverges."""

from dataclasses import dataclass

import pytest

import recombine
from helpers.command import CHUNK, config, line
from recombine import models
from recombine.runner.config import resolve
from recombine.stages.adapt import fit
from recombine.stages.context import RunContext
from recombine.training.objectives import Classification


def test_divergence_names_the_step_and_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    message = line(capsys, monkeypatch, tmp_path, CHUNK, "optim.lr=1e35", "optim.clip=null")
    assert "step" in message and "diverged" in message and "optim.lr" in message

    @dataclass(kw_only=True)
    class Explodes(recombine.LinearProbe):
        steps: int = 0

        def penalty(self, model):
            self.steps += 1
            return float("nan") if self.steps > 3 else 0.0  # two steps an epoch: in the second

    cfg = config("method=linear_probe", "data.limit=64")
    spec = resolve(cfg)
    data = recombine.data.build("offline", task="dsprites_loc", image_size=32, limit=64, mean=[0.5] * 3, std=[0.5] * 3)
    data.prepare_data()
    data.setup()
    model = models.build("tiny_vit", arch="vit_tiny_patch16_224", pretrained=False, image_size=32, num_classes=16)
    rewritten = recombine.apply(model, Explodes())
    work = RunContext(spec.settings, tmp_path, tmp_path / ".state", rewritten, Explodes(), recombine.Budget(), data)
    with pytest.raises(recombine.UsageError, match=r"step 3 \(epoch 1\).*last good checkpoint is .*best.safetensors"):
        fit(work, Classification(16), spec.settings.optim, 5, "best", work.method)
    assert (tmp_path / "best.safetensors").exists()
