"""The pretraining of model=tiny_diffusion, on a tiny one."""

import argparse
import json

import pytest
import torch

pytest.importorskip("diffusers")  # an extra

from helpers import config, drawing  # noqa: E402
from recombine import data, models  # noqa: E402
from recombine.runtime.assets import cache_dir  # noqa: E402
from scripts import pretrain_tiny_diffusion as script  # noqa: E402


def test_what_is_interrupted_goes_on_and_the_folder_is_a_model(tmp_path, monkeypatch):
    (cache := tmp_path / "cache").mkdir()
    (cache / "assets").symlink_to(cache_dir() / "assets")
    monkeypatch.setenv("RECOMBINE_CACHE", str(cache))
    given = {"minutes": 1e9, "batch": 4, "lr": 1e-3, "seed": 0, "every": 2, "task": "emoji", "bf16": False}

    def run(folder, *until):
        for steps in until:
            model = drawing.build(seed=0).train()
            module = data.build("captions", task="emoji", limit=16, batch_size=4)
            module.attach_model(**models.for_data(model.recombine_source))
            module.prepare_data()
            module.setup()
            script.train(model, module, argparse.Namespace(**given, steps=steps), folder)

    run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2, 4)
    sizes = {key: value for key, value in drawing.SIZES.items() if key != "pretrained"}
    one, two = (models.build(**config("tiny_diffusion") | sizes | {"checkpoint": str(tmp_path / name)})
                for name in ("whole", "parts"))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    plain = drawing.build(seed=0)
    assert not any(torch.equal(a, b) for a, b in zip(one.parameters(), plain.parameters(), strict=True) if a.ndim > 1)
    told = json.loads((tmp_path / "parts" / "trained.json").read_text())
    assert told["steps"] == 4 and [step for step, _ in told["loss"]] == [2, 4]
    given["seed"] = 1
    with pytest.raises(SystemExit, match="move it away"):
        run(tmp_path / "parts", 6)
    assert one.schedule.config.prediction_type == "v_prediction"
