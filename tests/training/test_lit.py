"""A training that diverges, or begins with what is not finite, is one line and leaves no result."""

import copy
import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import recombine
from helpers import refusal
from helpers.command import CHUNK, config, execute, line
from recombine import models
from recombine.evaluation import linear_probe
from recombine.runner.config import resolve
from recombine.runtime import tensor_file
from recombine.stages.adapt import fit
from recombine.stages.adapt import test as score
from recombine.stages.context import RunContext
from recombine.training import finite
from recombine.training.callbacks import KeepBest, moving
from recombine.training.distillation import Distillation
from recombine.training.lit import LitRecombine
from recombine.training.objectives import Classification
from recombine.training.settings import OptimizerSettings
from recombine.training.sharding import Sharded

TEXT = ["model=tiny_llama", "data=text", "data.max_length=32", "data.limit=16"]
RATES = {  # the key that the line names first -> what `fit` makes, the optimizer's settings, the method's rate
    "optim.lr_head than 1e+30": ("best", {"lr_head": 1e30}, 1e-3),
    "optim.lr than 1e+30": ("best", {"lr": 1e30}, 1e-3),
    "optim.weight_decay than 1e+30": ("best", {"weight_decay": 1e30}, 1e-3),
    "method.lr than 1e+30": ("best", {}, 1e30),
    "stage.distil.lr than 1e+30": ("distilled", {"lr": 1e30}, 1e-3),
    "compressor.lr than 1e+30": ("distilled", {}, 1e30),
}


def test_the_best_weights_come_back_with_their_running_means():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    model(torch.randn(8, 4))
    best = KeepBest("val/acc", "max", None)
    best.weights = {name: tensor.clone() for name, tensor in moving(model).items()}
    x = torch.randn(3, 4)
    before = model.eval()(x)
    model.train()(5 + torch.randn(8, 4)).sum().backward()
    best.restore(model)
    assert torch.equal(model.eval()(x), before)


def test_shards_keep_running_means_too():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    best = KeepBest("val/acc", "max", None)
    best.keep(SimpleNamespace(strategy=Sharded(), is_global_zero=True), SimpleNamespace(model=model))
    assert best.weights.keys() == model.state_dict().keys()


def test_balanced_accuracy_is_over_the_classes_that_occur():
    scores = Classification(3).metrics()
    scores.update(torch.tensor([0, 2, 1, 1]), torch.tensor([0, 0, 1, 1]))
    assert scores.compute()["balanced_acc"] == 0.75  # class 2 is predicted, and is not there


def test_patience_waits_for_the_form_that_is_kept(tmp_path):
    keys = ["stage=joint", "stage.distil.epochs=4", "trainer.epochs=1", "trainer.patience=1"]
    result = execute(tmp_path, *keys, "method=pc_lora", "budget=retained_50")
    assert len(result["distil"]["curves"]["train/loss"]) == 4  # the loss rises while the dense part fades


@pytest.fixture(scope="module")
def settings():
    return resolve(config("method=linear_probe", "probe=false")).settings


def context(folder, settings, method, limit=32) -> RunContext:
    """A run that has rewritten its model. limit: 32 samples are one step an epoch."""
    data = recombine.data.build(
        "offline", task="dsprites_loc", image_size=32, limit=limit, mean=[0.5] * 3, std=[0.5] * 3
    )
    data.prepare_data()
    data.setup()
    model = models.build("tiny_vit", arch="vit_tiny_patch16_224", pretrained=False, image_size=32, num_classes=16)
    run = RunContext(settings, folder, folder / ".state", model, method, recombine.Budget(), data)
    run.rewrite(method)
    return run


@pytest.mark.parametrize("key", RATES)
def test_the_last_step_of_a_training_is_looked_at_too(key, settings, tmp_path):
    name, optim, lr = RATES[key]
    run = context(tmp_path, settings, recombine.Cersa(alpha=0.9, beta=0.8, lr=lr))
    run.compressor = run.method if key.startswith("compressor") else None
    objective = Classification(16) if name == "best" else Distillation(copy.deepcopy(run.model))
    message = refusal(fit, run, objective, OptimizerSettings(**optim), 1, name, run.method)
    assert f"at step 1 (epoch 0): training diverged, try a smaller {key}" in message
    assert "no checkpoint was kept yet" in message and not list(tmp_path.rglob("*.safetensors"))


def test_data_that_is_not_finite_is_no_rate(settings, tmp_path, monkeypatch):
    run = context(tmp_path, settings, recombine.Cersa(alpha=0.9, beta=0.8))
    monkeypatch.setattr(run.data, "on_after_batch_transfer", lambda batch, _: (batch[0] * math.nan, batch[1]))
    lit = LitRecombine(run.model, run.method, run.objective())
    calls = (fit, run, run.objective(), OptimizerSettings(), 1, "best", run.method), (score, run, lit)
    calls += (linear_probe.features, run.model, run.data, "val"), (next, run.losses())
    for message in (refusal(*call) for call in calls):
        assert "the batch itself is not finite" in message and "lr" not in message


def test_float16_is_no_rate(tmp_path, capsys, monkeypatch):
    message = line(capsys, monkeypatch, tmp_path, *TEXT, "method=lora", "model.dtype=float16")
    assert "set model.dtype=float32 or bfloat16" in message and "lr" not in message


def test_a_model_with_a_weight_that_is_not_finite_is_refused(tmp_path):
    one = ["data.limit=32", "trainer.epochs=1"]
    execute(tmp_path / "whole", "method=linear_probe", *one)
    path = tmp_path / "whole" / "best.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["head.bias"][0] = float("nan")
    tensor_file.write(path, tensors, json.loads(metadata["recombine"]))
    (path.parent / "result.json").unlink()  # it knows the weights as they were
    with pytest.raises(recombine.UsageError, match=r"test/loss=nan in the test: weights are not finite \(head.bias\)"):
        execute(tmp_path / "again", "stage=evaluate", f"stage.checkpoint={path}", *one)
    assert not (tmp_path / "again" / "result.json").exists()


def test_looks_at_every_kind_of_tensor():
    good, bad = torch.zeros(3), torch.tensor([0.0, float("inf")])
    named = {"ints": torch.tensor([2**40]), "empty": torch.zeros(0), "good": good, "half": bad.half(), "nan": bad * 0}
    assert finite.tensors_not_finite(named.items()) == ["half", "nan"]
    assert finite.tensors_not_finite({"large": good + 2e6, "less": good - 9e5}.items(), finite.LIMIT) == ["large"]
    assert finite.tensors_not_finite([]) == []


def test_what_else_than_a_rate_is_to_blame():
    model, batch = torch.nn.Linear(2, 2), (torch.zeros(1, 2), torch.tensor([0]))
    assert finite.blame(model, batch, started=True) is None
    assert "no rate is to blame" in finite.blame(model, batch)
    assert "trainer.precision=32-true" in finite.blame(model, batch, precision="16-mixed")
    assert "batch itself" in finite.blame(model, {"x": batch[0], "labels": batch[0] / 0}, started=True)
    assert "model.dtype" in finite.blame(model.half(), batch, started=True)
    model.bias.data[0] = float("inf")
    assert "weights are not finite (bias)" in finite.blame(model, batch)


def test_a_score_that_is_not_finite_is_no_result():
    with pytest.raises(recombine.UsageError, match="test.pearson=nan"):
        finite.refuse_scores({"test": {"loss": 0.5, "pearson": math.nan}}, "look")
    finite.refuse_scores({"test": {"acc": 0.5, "acc_mm": math.nan}, "best": None}, "look")  # a set without that part


def test_divergence_names_the_step_and_the_last_good_checkpoint(settings, tmp_path, capsys, monkeypatch):
    steep = ["optim.lr=1000", "optim.weight_decay=1000"]
    message = line(capsys, monkeypatch, tmp_path, CHUNK, *steep)
    assert "step" in message and "diverged" in message and "optim.weight_decay than 1000" in message

    @dataclass(kw_only=True)
    class Explodes(recombine.LinearProbe):
        steps: int = 0

        def penalty(self, model):
            self.steps += 1
            return float("nan") if self.steps > 3 else 0.0  # two steps an epoch: in the second

    run = context(tmp_path, settings, Explodes(), limit=64)
    with pytest.raises(recombine.UsageError, match=r"step 3 \(epoch 1\).*last good checkpoint is .*best.safetensors"):
        fit(run, Classification(16), settings.optim, 5, "best", run.method)
    assert (tmp_path / "best.safetensors").exists()


def test_another_number_of_ranks_goes_on_with_the_metrics_of_all():
    """An epoch that two ranks began and one ends; a state of an earlier version; and the start of an epoch."""
    logits, labels = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
    begin = lambda: LitRecombine(torch.nn.Linear(2, 4), recombine.LinearProbe(), Classification(4))  # noqa: E731

    def metrics(rows: slice):
        (lit := begin()).train_metrics.update(logits[rows], labels[rows])
        return lit.train_metrics

    parts = [metrics(slice(0, 5)).state_dict(), metrics(slice(5, 9)).state_dict()]

    def goes_on(epoch: tuple[int, int], state: dict | None = None, **more) -> dict:
        epoch_progress = {"current": {"started": epoch[0], "processed": epoch[1]}}
        batch_progress = {"current": {"processed": 3}}
        loops = {"fit_loop": {"epoch_progress": epoch_progress, "epoch_loop.batch_progress": batch_progress}}
        (lit := begin()).on_load_checkpoint({"loops": loops, "state_dict": state or {}} | more)
        lit.train_metrics.update(logits[9:], labels[9:])
        return lit.train_metrics.compute()

    middle, expected = (2, 1), metrics(slice(0, 12)).compute()
    assert goes_on(middle, train_metrics=parts) == expected
    old = {f"train_metrics.{key}": value for key, value in metrics(slice(0, 9)).state_dict().items()}
    assert goes_on(middle, old | {"model.weight": logits}) == expected
    assert goes_on((1, 1), train_metrics=parts) == metrics(slice(9, 12)).compute() != expected
