"""The optimizers that are not torch's alone: Muon beside AdamW, and AdamW's moments in 8 bits."""

import copy
import importlib.util
import sys

import pytest
import torch
from torch import nn

from helpers import refusal
from helpers.command import execute
from recombine.training import lit, optimizers, settings
from recombine.training.optimizers import OPTIMIZERS, fusible, takes_muon


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.layer, self.head = nn.Embedding(9, 12), nn.Linear(12, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.head(self.layer(self.words(x)).tanh())


def groups(model, muon: set[int], lr: float = 0.02) -> list[dict]:
    parts = {kind: [p for p in model.parameters() if (id(p) in muon) is kind] for kind in (True, False)}
    return [{"params": part, "lr": lr, "weight_decay": 0.0, "muon": kind} for kind, part in parts.items() if part]


def train(model, optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randint(9, (8,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x % 3).backward()
        optimizer.step()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def test_muon_moves_matrices_by_orthogonal_ones_and_adamw_the_rest(net):
    muon, before = takes_muon(net, net.head), copy.deepcopy(net)
    assert muon == {id(net.layer.weight)}
    train(net, OPTIMIZERS["muon"](groups(net, muon)), range(1))
    moved = torch.linalg.svdvals(net.layer.weight.detach() - before.layer.weight)
    rank = (moved > moved[0] * 0.3).sum()  # Newton-Schulz ends near 1, not at it
    assert 1 < rank <= 12 and moved[0].item() == pytest.approx(0.02 * 0.2 * 20**0.5, rel=0.3)
    other = copy.deepcopy(before)
    train(other, OPTIMIZERS["adamw"](groups(other, set())), range(1))
    for name in ("head.weight", "head.bias", "layer.bias", "words.weight"):
        assert torch.equal(net.get_parameter(name), other.get_parameter(name))
    assert not torch.equal(net.layer.weight, other.layer.weight)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon", pytest.param("adamw_8bit", marks=pytest.mark.full)])
def test_goes_on_from_its_state(name, net, tmp_path):
    if name == "adamw_8bit" and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    make = lambda model: OPTIMIZERS[name](groups(model, takes_muon(model, model.head)))  # noqa: E731
    whole, optimizer = net, make(net)
    train(whole, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    broken = copy.deepcopy(whole)
    train(whole, optimizer, range(3, 6))
    again = make(broken)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    train(broken, again, range(3, 6))
    for one, other in zip(whole.parameters(), broken.parameters(), strict=True):
        assert torch.equal(one, other)


def test_one_kernel_for_all_weights_does_the_same(net):
    other = copy.deepcopy(net)
    for model, fused in ((net, False), (other, True)):
        train(model, OPTIMIZERS["adamw"](groups(model, set()), fused=fused), range(3))
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    assert fusible(torch.device("cuda"), "bf16-mixed") and not fusible(torch.device("cuda"), "16-mixed")
    assert not fusible(torch.device("cpu"), "32-true")


def test_a_fused_optimizer_has_its_gradients_clipped(tmp_path, monkeypatch):
    """Lightning refuses to clip for one that could unscale gradients, in bfloat16 too, where nothing is scaled."""
    made, adamw = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(k["fused"]) or adamw(*a, **k))
    monkeypatch.setattr(lit, "fusible", lambda *_: True)
    execute(tmp_path, "method=lora", "trainer.precision=bf16-mixed", "trainer.epochs=1", "data.limit=32")
    assert made == [True]


def test_8_bits_without_torchao_are_one_line(net, monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    message = refusal(execute, tmp_path, "optim=adamw_8bit", "method=lora")
    assert message.startswith("optim.name=adamw_8bit: torchao is not installed; pip install")
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    message = refusal(optimizers.adamw_8bit, groups(net, set()))
    assert message.startswith("optim.name=adamw_8bit: torchao cannot be imported") and "'.[8bit]'" in message


@pytest.mark.full  # torchao compiles its step
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_8_bits_train_as_32_do(tmp_path):
    words = ["method=full", "trainer.epochs=1", "data.limit=32"]
    one, two = (execute(tmp_path / name, *words, f"optim={name}") for name in ("adamw", "adamw_8bit"))
    assert one["test"]["loss"] == pytest.approx(two["test"]["loss"], rel=0.05)
