"""The stages on a tiny ViT and generated pictures."""

import base64
import json
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import recombine
from helpers import refusal
from helpers.command import CHUNK, config, execute
from recombine.core.twin import shared_copy
from recombine.data.vision.offline import Offline
from recombine.layers import DeltaLinear
from recombine.layers.quantize import quantize
from recombine.runner import ranks
from recombine.stages.retrofit import relative_error, weight_errors
from recombine.training.lit import LitRecombine
from zoo import batch, build, losses, outputs


@pytest.mark.parametrize("name", ["crisp", "cersa", "svd", "lora", "dora", "full", "linear_probe"])
def test_adapt_with_every_method(name, tmp_path):
    result = execute(tmp_path, f"method={name}", *([CHUNK] if name == "crisp" else []))
    assert 0 <= result["test"]["acc"] <= 1 and 0 <= result["val"]["acc"] <= 1
    account = result["account"]
    assert account["bytes_optimizer"] == 8 * account["trained"] and account["flops"] > 0
    assert result["data"]["sizes"] == {"train": 64, "val": 64, "test": 64} and len(result["data"]["sha256"]) == 3
    assert result["environment"]["versions"]["torch"] and result["command"].startswith("python run.py")
    assert result["layers"] and set(result["seconds"]) >= {"setup", "retrofit", "train_best", "test", "total"}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_same_seed_same_result(tmp_path):
    first, second, other = (execute(tmp_path / n, CHUNK, f"seed={s}") for n, s in (("a", 3), ("b", 3), ("c", 4)))
    assert first["test"] == second["test"] and first["val"] == second["val"]
    assert torch.equal(*(load_file(tmp_path / n / "best.safetensors")["head.weight"] for n in "ab"))
    assert first["test"]["loss"] != other["test"]["loss"]


def test_the_test_set_sees_the_weights_that_validation_chose(tmp_path):
    """An absurd schedule makes later epochs worse; the tested weights are those of the best epoch."""
    result = execute(tmp_path, "method=full", "optim.lr=1e-3", "optim.schedule=constant", "trainer.epochs=4")
    best = f"stage.checkpoint={tmp_path}/best.safetensors"
    again = execute(tmp_path / "again", "method=full", "stage=evaluate", best)
    assert again["test_right"] == result["test_right"]
    right = np.unpackbits(np.frombuffer(base64.b64decode(result["test_right"]), np.uint8))[:64]
    assert right.mean() == pytest.approx(result["test"]["acc"])
    assert again["test"]["acc"] == result["test"]["acc"]
    assert again["test"]["loss"] == pytest.approx(result["test"]["loss"], rel=1e-5)


def test_early_stopping_counts_epochs_without_a_better_validation(tmp_path):
    result = execute(tmp_path, "method=linear_probe", "optim.lr_head=1e-12", "trainer.epochs=9", "trainer.patience=2")
    assert result["best_epoch"] == 0 and result["seconds"]["train_best"] > 0
    assert "trainer.patience" not in result["command"]  # composed here, not on a command line


@pytest.mark.parametrize("method", [["method=crisp", "method.chunk=16"], ["method=svd", "method.train_core=true"]])
@pytest.mark.parametrize("stage", ["compress", "joint"])
def test_compress_then_adapt(method, stage, tmp_path):
    result = execute(tmp_path, *method, f"stage={stage}", "budget=retained_50", "probe=true", "stage.distil.epochs=3")
    assert result["account"]["retained"] <= 0.5 and result["distil"]["val_loss"] > 0
    assert (result["account"]["trained_without_head"] == 0) == (stage == "compress")
    # what was distilled came back: the checkpoint alone rebuilds the tested model
    again = execute(tmp_path / "e", *method, "stage=evaluate", f"stage.checkpoint={tmp_path}/best.safetensors")
    assert again["test"]["acc"] == result["test"]["acc"]


def test_distillation_brings_the_student_closer(tmp_path):
    losses = [
        execute(tmp_path / str(e), CHUNK, "stage=compress", "budget=retained_50", f"stage.distil.epochs={e}")["distil"]
        for e in (1, 8)
    ]
    assert losses[1]["val_loss"] < losses[0]["val_loss"]


def test_a_probe_that_only_starts_the_head_reads_no_test_set(tmp_path):
    probe = execute(tmp_path, "stage=retrofit", "method=jactus", "calibration.samples=32")["linear_probe"]
    assert 0 <= probe["val"] <= 1 and probe["test"] is None


def test_retrofit_compares_with_the_original(tmp_path):
    result = execute(tmp_path, "stage=retrofit", CHUNK)
    assert max(result["weight_error"].values()) <= 1e-6 and result["logit_error"] <= 1e-3
    assert len(result["weight_error"]) == 16
    assert 0 < result["seconds"]["compare"] < result["seconds"]["total"]


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_llama"])
def test_a_shared_copy_takes_no_memory_and_keeps_what_is_replaced(name):
    """Through a rewriting with dense layers left in place, and through quantization of those."""
    model = build(name).eval()
    x = batch(model)
    before, copied = outputs(model, x), shared_copy(model)
    shared = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in shared for p in copied.parameters())
    recombine.apply(model, recombine.Jactus(ratio=1.0, top_k=2), losses=losses(model))
    layers = [model.get_submodule(target) for target in model.recombined.targets]
    assert any(isinstance(layer, DeltaLinear) for layer in layers)
    quantize(layers, 2)
    assert torch.equal(outputs(copied, x), before) and not torch.allclose(outputs(model, x), before, atol=1e-3)
    assert min(weight_errors(copied, model).values()) > 0.01


def test_errors_of_tall_weights_are_summed_by_rows():
    w, v = torch.randn(2, 2500, 3)
    expected = ((v.double() - w.double()).norm() / w.double().norm()).item()
    assert relative_error(v, w) == pytest.approx(expected, rel=1e-14)


def test_suite_prints_group_means(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Offline, "suite", dict.fromkeys(["dsprites_loc", "dsprites_ori"], "structured"))
    mean = ranks.main(config("data.task=all", "method=linear_probe"), tmp_path)
    summary = json.loads((tmp_path / "suite.json").read_text())
    assert summary["complete"] and list(summary["tasks"]["structured"]) == ["dsprites_loc", "dsprites_ori"]
    assert summary["mean"] == pytest.approx(sum(summary["tasks"]["structured"].values()) / 2) and 0 <= mean <= 1
    assert summary["mean_of_tasks"] == summary["mean"]
    out = capsys.readouterr().out
    assert "\nlinear_probe on tiny_vit, data offline, test scores of 2 tasks in %\n" in out
    assert "mean of structured" in out
    assert (tmp_path / "dsprites_ori" / "result.json").exists()


def test_adapting_first_merges_and_compresses_what_was_adapted(tmp_path):
    pair = ["method=lora", "method@compressor=svd", "budget=retained_80", "stage.distil.epochs=1"]
    result = execute(tmp_path / "a", *pair, "stage=joint", "stage.order=adapt_first", "trainer.epochs=3")
    assert len(result["curves"]["train/loss"]) == 3 and list(result["seconds"]).index("train_best") > 0
    assert 0.7 < result["account"]["retained"] <= 0.8 and result["account"]["trained_without_head"] == 0
    assert result["distil"]["val_loss"] > 0 and "acc" in result["val"]
    assert [(result[part]["name"], result[part]["label"]) for part in ("method", "compressor")] == [
        ("Peft", "lora"),
        ("Svd", "svd"),
    ]
    again = execute(tmp_path / "b", "stage=evaluate", f"stage.checkpoint={tmp_path}/a/best.safetensors")
    assert again["test_right"] == result["test_right"]


def test_adapting_first_needs_a_compressor(tmp_path):
    said = refusal(execute, tmp_path, "method=svd", "stage=joint", "budget=retained_50", "stage.order=adapt_first")
    assert said.startswith("stage.order=adapt_first: nothing compresses after the method")


def test_ctrl_c_outside_of_training_is_no_exit(tmp_path, monkeypatch):
    """Lightning ends the process with code 1, and ignores whatever comes then."""

    def stop(*_):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(LitRecombine, "test_step", stop)
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path, "method=lora", "trainer.epochs=1", "probe=false")
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_checkpoint_of_a_model_that_started_at_random_needs_no_seed(tmp_path):
    result = execute(tmp_path, "method=lora", "trainer.epochs=1", "probe=false", "seed=3")
    torch.manual_seed(7)
    model = recombine.load(tmp_path / "best.safetensors")
    assert recombine.count(model).trained == result["account"]["trained"]
    again = execute(tmp_path / "b", "stage=evaluate", f"stage.checkpoint={tmp_path}/best.safetensors", "seed=9")
    assert again["test_right"] == result["test_right"]
