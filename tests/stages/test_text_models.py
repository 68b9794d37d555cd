"""The stages on text encoders."""

import recombine  # isort: skip  (its guard comes before transformers)

import copy
import json

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from helpers import CONF, config
from helpers.texts import Toy, ready, say, write_hub
from recombine import models
from recombine.runner import ranks
from recombine.training import objectives


def test_a_model_learns_and_comes_back(cache, tokenizer, tmp_path):
    """LoRA on a task of one word, through the module's own loaders and metrics."""
    rows = [(s,) for s in say(120, 11, 3, 6)]
    labels = np.array(["cat" in row[0].split() for row in rows]).astype(int)
    module = ready(Toy(rows, labels, test=rows[:20], batch_size=16, max_length=48, select="test"), tokenizer)
    torch.manual_seed(0)
    model = models.build(**config("tiny_bert"))
    models.reset_head(model, module.num_classes)
    pretrained = copy.deepcopy(model)
    recombine.apply(model, recombine.Peft(targets=("q", "k", "v"), rank=4, options={"lora_alpha": 8}))
    task, loader = objectives.build(module), module.train_dataloader()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)

    def epoch() -> float:
        total = 0.0
        for batch in loader:
            loss, _ = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total

    history = [epoch() for _ in range(3)]
    assert history[-1] < history[0]
    recombine.save(model, tmp_path / "lora.safetensors")
    loaded = recombine.load(tmp_path / "lora.safetensors", pretrained).eval()
    batch = module.test.__getitems__([0, 5])
    with torch.no_grad():
        assert torch.equal(objectives.call(loaded, batch), objectives.call(model.eval(), batch))


@pytest.mark.parametrize("name, task, metric", [
    ("glue", "cola", "mcc"), ("glue", "stsb", "pearson"), ("glue", "mnli", "m+mm"), ("sentences", "sentiment", "acc"),
])  # fmt: skip
def test_one_code_path_for_all(cache, packages, tmp_path, name, task, metric):
    """run.py's own way from a command line to result.json, and back from the checkpoint."""
    if name == "glue":
        write_hub(tmp_path / "glue", task)
        where = [f"data.root={tmp_path / 'glue'}"]
    else:
        packages("vader")
        where = ["data.limit=40"]

    def one(*more: str, out: str) -> dict:
        said = ["model=tiny_bert", f"data={name}", f"data.task={task}", *where, "trainer=cpu", *more]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", [*said, "trainer.epochs=2", "trainer.progress=false", "calibration.samples=8"])
        ranks.main(cfg, tmp_path / out)
        return json.loads((tmp_path / out / "result.json").read_text())

    result = one("method=lora", out="lora")
    assert metric in result["val"] and result["test"].keys() >= {"loss", metric}
    assert result["data"]["metric"] == metric and result["linear_probe"] and result["account"]["flops"] > 0
    again = one("method=lora", "stage=evaluate", f"stage.checkpoint={result['checkpoint']}", out="again")
    assert again["test"] == pytest.approx(result["test"], nan_ok=True)
    assert one("stage=retrofit", "method=svd_llm", "method.ratio=0.5", out="svd")["logit_error"] > 0
