"""The stage that counts and times."""

import pytest
import torch
from hydra import compose, initialize_config_dir

from helpers import CONF
from recombine import UsageError, results
from recombine.runner import ranks
from recombine.stages.profile import turns

FEW = ["model=tiny_vit", "trainer=cpu", "trainer.progress=false", "data.limit=8", "data.batch_size=4", "stage=profile"]


def run(out, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        ranks.main(compose("config", [*FEW, *overrides]), out)
    return results.read(out / "result.json")


def test_a_method_is_counted_and_timed_beside_its_reference(tmp_path):
    result = run(tmp_path, "method=crisp", "method.chunk=8", "stage.rounds=2", "stage.reference.name=full")
    speed = result["profile"]
    for side in (speed, speed["reference"]):
        assert side["train_samples_s"] > 0 and side["infer_samples_s"] > 0 and side["peak_mib"] is None
        assert side["latency_ms"] == pytest.approx(1000 / side["infer_samples_s"])
    assert speed["batch_size"] == 4 and min(speed["ratio"].values()) > 0
    assert result["method"]["name"] == "Crisp" and result["account"]["flops"] > 0 and result["test"] == {}


def test_profiling_moves_no_weight(tmp_path, monkeypatch):
    """AdamW takes its steps with a rate of 0: what the account and the next round see is the model as it was."""
    from recombine.stages import profile as stage  # the function; its module is what it came from

    seen, peak = [], stage.__globals__["peak"]

    def looking(subject, device):
        before = [p.detach().clone() for p in subject.model.parameters()]
        subject.train()
        seen.append(all(torch.equal(a, b) for a, b in zip(before, subject.model.parameters(), strict=True)))
        return peak(subject, device)

    monkeypatch.setitem(stage.__globals__, "peak", looking)
    run(tmp_path, "method=lora", "stage.rounds=1")
    assert seen == [True, True]


@pytest.mark.parametrize("method", ["lora", "crisp", "svft", "svd", "ssf", "cersa"])
def test_the_closed_form_is_the_account_of_the_rewritten_model(tmp_path, method):
    chosen = [f"method={method}", *(["method.chunk=8"] if method == "crisp" else [])]
    rewritten = run(tmp_path / "a", *chosen, "stage.rounds=0")["account"]
    closed = run(tmp_path / "b", *chosen, "stage.rewrite=false")["account"]
    assert closed.pop("flops") is None and rewritten.pop("flops") > 0
    assert closed == pytest.approx(rewritten)


@pytest.mark.parametrize(
    "wrong, why",
    [
        (["method=full", "stage.rewrite=false"], "full trains more"),
        (["method=svd", "quantize.bits=8", "stage.rewrite=false"], "counts no packed weights"),
        (["method@compressor=svd", "method=lora", "stage.rewrite=false"], "a pair's second"),
        (["stage.reference.name=lorra"], "stage.reference.name=lorra"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path, wrong, why):
    with pytest.raises(UsageError, match=why):
        run(tmp_path, "method=lora", *wrong)


def test_rivals_take_turns_and_the_first_round_warms_up():
    order = []
    works = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    assert turns(works, 2) == {"a": [3.0, 5.0], "b": [4.0, 6.0]} and order == list("ababab")
