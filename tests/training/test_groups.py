"""The optimizer's groups: LoRA+ gives every B of a pair B A a rate of its own, and nothing else moves to another."""

import pytest
import torch

import recombine
from helpers import QKV, refusal
from recombine import PcLora, Peft, Rosa, Svfit
from recombine.core.account import count
from recombine.training.groups import Rates, optimizer_groups
from recombine.training.settings import OptimizerSettings
from zoo import batch, build, loss, losses

LORA = {"lora_alpha": 8}
PAIRS = {  # a method -> how the names of its B end
    "lora": (Peft(targets=QKV, rank=4, options=LORA), "lora_B.default.weight"),
    "dora": (Peft(targets=QKV, rank=4, options=LORA | {"use_dora": True}), "lora_B.default.weight"),
    "rosa": (Rosa(rank=4, density=0.01), ".left"),
    "pc_lora": (PcLora(ratio=0.4), ".left"),
}


def rates(model, **optim) -> dict[str, float]:
    """The rate of every parameter that trains, by name, at lr=0.01 and lr_head=0.02."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer_groups(model, Rates(OptimizerSettings(lr_head=0.02, **optim), 0.01, 0.01), "optim")
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("method, end", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_b_has_its_own_rate(method, end, name):
    model = build("tiny_vit")
    recombine.apply(model, method, losses=losses(model))
    found, plain = rates(model, name=name, lr_ratio=16.0), rates(model, name=name)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == found.keys() == plain.keys()
    assert plain == {n: 0.02 if n.startswith("head.") else 0.01 for n in found}
    assert any(n.endswith(end) for n in found)
    assert found == {n: 0.16 if n.endswith(end) else rate for n, rate in plain.items()}


def test_the_first_step_of_adamw_moves_b_by_its_rate():
    model = recombine.apply(build("tiny_vit"), PAIRS["lora"][0])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()  # at 0 it gives A no gradient
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    groups = optimizer_groups(model, Rates(OptimizerSettings(lr_ratio=8.0), 1e-3, 1e-3), "optim")
    optimizer = torch.optim.AdamW(groups, eps=1e-30)
    loss(model, batch(model)).backward()
    optimizer.step()
    for name, start in before.items():
        if "lora" in name:
            step = (model.get_parameter(name).detach() - start).abs().median().item()
            assert step == pytest.approx(8e-3 if "lora_B" in name else 1e-3, rel=1e-3)


def test_without_a_pair_it_is_refused():
    model = recombine.apply(build("tiny_vit"), Svfit(rank=4))
    assert "optim.lr_ratio=16" in refusal(rates, model, lr_ratio=16.0) and count(model).trained
    model.requires_grad_(False)
    model.head.requires_grad_(True)  # a classifier alone: the key is not read
    assert set(rates(model, lr_ratio=16.0).values()) == {0.02}
