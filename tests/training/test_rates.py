"""A relative rate moves the weight of every layer alike, whatever its factors are."""

import copy

import pytest
import torch
from hydra import compose, initialize_config_dir

import recombine
from helpers import CONF, refusal
from recombine import Cersa, Crisp, Full, Jactus, Peft, Ssf, Svd
from recombine.core.rewrite import train_only
from recombine.runner.config import resolve
from recombine.training.groups import grouped, optimizer_groups
from recombine.training.lit import LitRecombine
from recombine.training.objectives import Classification
from recombine.training.rates import movement, movements
from recombine.training.settings import OptimizerSettings
from zoo import build, losses

METHODS = {
    "crisp": Crisp(chunk=16),
    "crisp alone": Crisp(chunk=8, group_size=1),
    "crisp without a gate": Crisp(chunk=16, gate="none"),
    "cersa": Cersa(),
    "jactus": Jactus(top_k=4),
    "svd": Svd(train_core=True),
    "full": Full(),
    "ssf": Ssf(),
}


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_llama"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_moves_each_weight_alike_for_each_entry_that_trains(arch, name):
    model = build(arch)
    method = METHODS[name]
    recombine.apply(model, method, losses=losses(model))
    model.train()
    before, moves = weights(model), movements(model)
    assert moves and all(value > 0 for value in moves.values())
    rng = torch.Generator().manual_seed(1)
    counts = {n: sum(p.numel() for k, p in model.named_parameters() if k in moves and k.startswith(n)) for n in before}
    rate = 1e-4 * sum(count > 0 for count in counts.values())
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key in moves:
                p += rate / moves[key] * (torch.randint(2, p.shape, generator=rng) * 2 - 1)
    moved = [
        float((w - before[key]).norm() / before[key].norm()) * (counts[key] / w.numel()) ** 0.5
        for key, w in weights(model).items()
        if counts[key]
    ]
    assert moved and all(0.6e-4 < value < 1.5e-4 for value in moved), (min(moved), max(moved))


def weights(model) -> dict[str, torch.Tensor]:
    return {n: model.get_submodule(n).weight.detach().double() for n in model.recombined.targets}


def test_a_factor_that_moves_nothing_yet_has_the_rate_of_the_other():
    model = recombine.apply(build("tiny_vit"), Peft(targets=("q", "v")))
    moves = movements(model)
    for name in model.recombined.targets:
        assert moves[f"{name}.lora_A.default.weight"] == moves[f"{name}.lora_B.default.weight"] > 0


@pytest.mark.parametrize(
    "method",
    [
        Peft(config="RandLoraConfig", targets=("q", "v"), rank=8, options={"randlora_alpha": 160}),
        Peft(config="LoHaConfig", targets=("q", "v"), rank=4, options={"alpha": 8}),
    ],
    ids=["randlora", "loha"],
)
def test_peft_layers_without_a_forward_derivative_are_measured(method):
    model = recombine.apply(build("tiny_vit"), method)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    moves = movements(model)
    layers = {name: model.get_submodule(name) for name in model.recombined.targets}
    for name, layer in layers.items():
        own = {key: p for key, p in layer.named_parameters() if f"{name}.{key}" in moves}
        key, p = next(iter(own.items()))
        before, step = layer.get_delta_weight("default"), torch.randint(2, p.shape) * 2.0 - 1
        with torch.no_grad():
            p += step
            lengths = (layer.get_delta_weight("default") - before).norm() / (before + layer.base_layer.weight).norm()
        share = p.numel() / (layer.out_features * layer.in_features)
        assert moves[f"{name}.{key}"] == pytest.approx(len(layers) * lengths.item() * share**0.5, rel=0.3)


def test_a_basis_of_several_layers_has_their_root_mean_square():
    model = recombine.apply(build("tiny_vit"), method := Crisp(chunk=16, basis_rank=9))
    train_only(model, method.distillation_parameters(model))
    layers = {name: model.get_submodule(name) for name in model.recombined.targets}
    first, layer = next((name, layer) for name, layer in layers.items() if hasattr(layer, "basis"))
    sharing = [other for other in layers.values() if getattr(other, "basis", None) is layer.basis]
    alone = [movement(other, "basis", other.basis) for other in sharing]
    assert len(alone) > 1 and movements(model)[f"{first}.basis"] == pytest.approx(
        len(layers) * (sum(value**2 for value in alone) / len(alone)) ** 0.5
    )


def test_the_optimizer_has_a_group_for_each_movement_and_the_head_its_own():
    model = recombine.apply(build("tiny_vit"), method := Crisp(chunk=16))
    optim = OptimizerSettings(relative=True, lr=0.02)
    lit = LitRecombine(model, method, Classification(5), optim)
    names, moves = {id(p): name for name, p in model.named_parameters()}, movements(model)
    groups = grouped(model, lit.rates)
    found = {names[id(p)]: lit.rates.of(kind) for kind, ps in groups.items() if not kind.head for p in ps}
    assert found == {name: pytest.approx(0.02 / value) for name, value in moves.items()}
    plain = LitRecombine(model, method, Classification(5), OptimizerSettings(lr=0.02)).rates
    assert sorted(plain.of(kind) for kind in grouped(model, plain)) == [5e-3, 5e-3, 0.02]
    assert LitRecombine(model, method, Classification(5), OptimizerSettings(relative=True)).lr == 0.08


def test_a_model_is_as_it_was():
    model = recombine.apply(build("tiny_vit"), Crisp(chunk=16)).train()
    before = copy.deepcopy(model.state_dict())
    movements(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_where_no_factor_trains_it_is_refused():
    model = recombine.apply(build("tiny_vit"), Svd())
    model.get_parameter("norm.weight").requires_grad_(True)
    rates = LitRecombine(model, Svd(), Classification(5), OptimizerSettings(relative=True)).rates
    assert "optim.relative=true: is for tensors of the layers" in refusal(optimizer_groups, model, rates, "optim")


def test_sgd_has_no_relative_rate():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["model=tiny_vit", "method=lora", "optim=sgd", "optim.relative=true"])
    assert "optim.relative=true: a step of sgd is as large as the gradient" in refusal(resolve, cfg)
