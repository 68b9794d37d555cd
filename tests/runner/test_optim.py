"""`optim` chooses the optimizer, and AdamW is what runs without a word."""

import json

from hydra import compose, initialize_config_dir

from helpers import CONF
from recombine.runner import ranks

TINY = ["model=tiny_vit", "trainer=cpu", "trainer.progress=false", "trainer.epochs=1", "data.limit=64", "probe=false"]


def loss(folder, *overrides) -> float:
    same = ["method=lora", "optim.lr=0.01", "optim.lr_head=0.01", "optim.weight_decay=0.5"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        ranks.main(compose("config", [*TINY, *overrides, *same]), folder)
    return json.loads((folder / "result.json").read_text())["test"]["loss"]


def test_optim_chooses_the_optimizer(tmp_path):
    losses = [loss(tmp_path / name, f"optim={name}") for name in ("adamw", "adam", "sgd", "muon", "lora_plus")]
    assert len(set(losses)) == 5
    assert loss(tmp_path / "default") == losses[0]
