"""The stages on tiny language models."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from helpers import CONF
from helpers.llamas import build, line, loaded
from recombine import models
from recombine.evaluation import harness
from recombine.runner import ranks
from recombine.training import sharding
from recombine.training.lit import LitRecombine


def execute(folder: Path, *overrides: str) -> dict:
    said = ["model=tiny_llama", "trainer=cpu", "trainer.progress=false", "trainer.epochs=1", "harness.limit=2"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        ranks.main(compose("config", [*said, *overrides]), folder)
    return json.loads((folder / "result.json").read_text())


def test_the_original_model_is_scored(toy_packages, byte_tokenizer, tmp_path, offline):
    """Perplexity and the harness, before anything is trained; and what a rewriting alone does to both."""
    common = ["data=text", "data.max_length=16", "data.limit=9", "data.batch_size=4"]
    told = execute(tmp_path / "a", *common, "stage=evaluate", "harness.tasks=[capital_of]")
    assert told["method"] is None and told["account"]["trained"] == 0 and "capital_of/acc" in told["test"]
    torch.manual_seed(0)  # the run's seed draws the model
    model = models.build(**told["model"]).eval()
    module = loaded("text", byte_tokenizer, task="wiki", max_length=16, limit=9)
    assert told["test"]["ppl"] == pytest.approx(harness.perplexity(model, module.test), rel=1e-5)
    same = execute(tmp_path / "b", *common, "stage=retrofit", "stage.test=true", "method=svd", "method.ratio=0.9")
    assert same["test"]["ppl"] != told["test"]["ppl"] and same["test"].keys() == {"loss", "ppl"}
    assert execute(tmp_path / "c", *common, "stage=retrofit", "method=svd", "method.ratio=0.5")["test"] == {}


def test_other_texts_are_scored_and_the_tokens_that_calibrate_are_frozen(toy_packages, byte_tokenizer, tmp_path):
    common = [
        "data=text",
        "data.max_length=15",
        "data.limit=9",
        "harness.tasks=[]",
        "analyse.elsewhere=[wiki,opinions]",
    ]
    told = execute(tmp_path / "a", *common, "stage=evaluate")
    torch.manual_seed(0)
    model = models.build(**told["model"]).eval()
    other = loaded("text", byte_tokenizer, task="opinions", max_length=15, limit=9)
    assert told["elsewhere"] == {"after": {"opinions": pytest.approx(harness.perplexity(model, other.test), rel=1e-5)}}
    assert "calibration_sha256" not in told

    half = [*common, "stage=retrofit", "stage.test=true", "method=svd_llm", "method.ratio=0.5"]
    half += ["calibration.samples=4", "calibration.batch_size=2"]
    found = execute(tmp_path / "b", *half)
    rows = torch.randperm(9, generator=torch.Generator().manual_seed(0))[:4]
    tokens = loaded("text", byte_tokenizer, task="wiki", max_length=15, limit=9).train.ids[rows]
    assert found["calibration_sha256"] == hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    assert found["elsewhere"]["after"]["opinions"] > 1 and "before" not in found["elsewhere"]
    frozen = f"calibration.sha256={found['calibration_sha256']}"
    assert execute(tmp_path / "c", *half, frozen)["test"] == found["test"]
    assert f"{frozen}: the tokens that calibrate are others" in line(execute, tmp_path / "d", *half, frozen, "seed=1")


def test_one_data_set_calibrates_and_another_trains(toy_packages, tmp_path, monkeypatch):
    common = ["data=choices", "data.limit=8", "calibration.samples=6", "calibration.batch_size=3", "method=svd_llm"]
    common += ["method.ratio=0.5", "stage=retrofit"]
    inside = ["calibration.data.max_length=16", "calibration.data.limit=12"]
    own = execute(tmp_path / "own", *common)
    other = execute(tmp_path / "other", *common, "data@calibration.data=text", *inside)
    assert own["calibration"] is None and own["data"] == other["data"]
    assert other["calibration"]["name"] == "text" and other["calibration"]["sizes"]["train"] == 12
    assert own["weight_error"] != other["weight_error"]
    alone = execute(tmp_path / "alone", *common, "data=text", "data.max_length=16", "data.limit=12")
    assert alone["weight_error"] == other["weight_error"]  # as if the run's own data were the other's
    added = execute(tmp_path / "named", *common, "calibration.data.name=text", *("+" + part for part in inside))
    word = execute(tmp_path / "word", *common, "calibration.data=text")
    assert added["calibration"] == other["calibration"] and word["calibration"]["max_length"] == 256

    seen, step = [], LitRecombine.training_step
    monkeypatch.setattr(
        LitRecombine, "training_step", lambda lit, batch, i: (seen.append(batch), step(lit, batch, i))[1]
    )
    pair = ["data=choices", "data.limit=8", "method@compressor=svd_llm", "compressor.ratio=0.5", "method=lora"]
    trained = execute(tmp_path / "adapt", *pair, "calibration.data.name=text", "harness.tasks=[capital_of]")
    assert trained["calibration"]["name"] == "text" and trained["data"]["name"] == "choices"
    assert (seen[0]["labels"] == -100).any()  # prompts, which text has not
    assert "data=text is no task for model tiny_bert: take model=smollm2_135m" in line(
        execute, tmp_path / "w", "model=tiny_bert", "data=text", "data.limit=8"
    )
    for stage in ("adapt", "evaluate"):
        assert "data=sentences is no task for model tiny_llama: take model=minilm" in line(
            execute, tmp_path / "v", "data=sentences", f"stage={stage}"
        )
    assert "says nothing of data=choices" in line(execute, tmp_path / "x", *common, "calibration.data=offline")
    assert "calibration.data.name=txt: there is no such data set; did you mean text?" in line(
        execute, tmp_path / "y", *common, "calibration.data=txt"
    )


def test_the_trainer_of_many_gpus_divides_a_llama_by_its_blocks():
    """Composed and built; tests/training/test_sharding.py trains with it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        strategy = instantiate(compose("config", ["trainer=fsdp"]).trainer.strategy)
    assert isinstance(strategy, sharding.Sharded)
    assert sharding.units(model := build()) == [[block] for block in model.model.layers]
