"""PC-LoRA: how the pretrained weights fade, and what is left."""

import pytest
import torch

import recombine
from helpers import ALL
from helpers.pruned import LORA, distil, ids, reload
from recombine import PcLora, Ssf
from recombine.core.rewrite import finish, train_only
from recombine.layers import FactoredLinear
from zoo import ARCHS, batch, build, outputs, train


@pytest.mark.parametrize("schedule, half", [("sine", 1 - 0.5**0.5), ("linear", 0.5), ("cosine", 0.5**0.5)])
def test_the_pretrained_weights_fade_out(schedule, half):
    method = PcLora(schedule=schedule, decay=0.6, rank=3)
    model, teacher = recombine.apply(build("tiny_vit"), method), build("tiny_vit")
    x = batch(model)
    with torch.no_grad():
        assert not method.on_distillation_step(model, 0.0) and torch.allclose(model(x), teacher(x), atol=2e-5)
        assert not method.on_distillation_step(model, 0.3)
        for module, theirs in ((model.get_submodule(n), teacher.get_submodule(n)) for n in model.recombined.targets):
            module.left.normal_()
            want = half * theirs.weight + module.left @ module.right
            assert torch.allclose(module.dense_weight(), want, atol=1e-5)
        middle = model(x)
        assert method.on_distillation_step(model, 0.6) and not torch.allclose(
            model(x), middle
        )  # what eval kept is built again
        for name in model.recombined.targets:
            module = model.get_submodule(name)
            assert torch.equal(module.dense_weight(), module.left @ module.right)
        assert method.on_distillation_step(model, 1.0)


def test_a_fading_bias_is_the_papers_two():
    """y = f (W x + b) + left right x + b' with b' from 0, trained apart: the same model after every step."""
    model, reference = build("tiny_vit").double(), build("tiny_vit").double()
    method = PcLora(targets=ALL, decay=0.7, schedule="linear", fade_bias=True)
    recombine.apply(model, method)
    layers = {name: model.get_submodule(name) for name in model.recombined.targets}
    train_only(model, {f"{name}.{part}" for name in layers for part in ("left", "right", "bias")})
    known = {name: (reference.get_submodule(name).weight.detach(), reference.get_submodule(name).bias.detach())
             for name in layers}  # fmt: skip
    parts = {name: [x.left.detach().clone(), x.right.detach().clone(), 0 * x.bias.detach()]
             for name, x in layers.items()}  # fmt: skip
    ours = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    theirs = torch.optim.SGD([t.requires_grad_() for trio in parts.values() for t in trio], 0.1)
    x = batch(model).double()
    for step in range(6):
        method.on_distillation_step(model, step / 5)
        f = max(0.0, 1 - step / 5 / 0.7)
        values = {}
        for name, (left, right, bias) in parts.items():
            weight, old = known[name]
            values |= {f"{name}.weight": f * weight + left @ right, f"{name}.bias": f * old + bias}
        expected, got = torch.func.functional_call(reference, values, x), model(x)
        assert torch.allclose(got, expected, atol=1e-9)
        for optimizer, y in ((ours, got), (theirs, expected)):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
    assert all(torch.allclose(layers[name].bias, bias) for name, (_, _, bias) in parts.items())


@pytest.mark.parametrize("arch", ARCHS)
def test_pc_lora_leaves_the_low_rank_pair_alone(arch, tmp_path):
    method = PcLora(decay=0.5)
    model, teacher = build(arch), build(arch)
    recombine.apply(model, method, "retained_40")
    method = PcLora(**model.recombined.steps[0].fields)
    assert recombine.count(model).retained > 1  # the pretrained weights are still there
    names = method.distillation_parameters(model)
    kinds = {name.rpartition(".")[2] for name in names}
    assert "base" not in kinds and kinds >= {"left", "right", "weight"}
    assert ("bias" in kinds) == (arch != "tiny_llama")
    train_only(model, names)
    history = distil(model, teacher, method, 30)
    assert history[-1] < max(history)
    x = batch(model)
    with torch.no_grad():
        distilled = outputs(model.eval(), x)
        pairs = {name: model.get_submodule(name) for name in model.recombined.targets}
        products = {name: layer.left @ layer.right for name, layer in pairs.items()}
        finish(model, method, alone=True)
        assert torch.allclose(outputs(model, x), distilled, atol=1e-5)
        for name, product in products.items():
            layer = model.get_submodule(name)
            assert type(layer) is FactoredLinear and torch.equal(layer.dense_weight(), product)
        assert 0.35 < recombine.count(model).retained <= 0.4
        assert model.recombined.trainable >= {f"{name}.left" for name in products}
        train_only(model, model.recombined.trainable)
        loaded = reload(model, arch, tmp_path)
        assert torch.equal(outputs(loaded, x), outputs(model, x)) and recombine.count(loaded) == recombine.count(model)
        assert torch.allclose(outputs(recombine.merge(model), x), outputs(loaded, x), atol=2e-5)


@pytest.mark.parametrize("fade_bias", [False, True])
def test_pc_lora_resumes_while_it_fades(fade_bias, tmp_path):
    method = PcLora(rank=4, fade_bias=fade_bias)
    model = recombine.apply(build("tiny_vit"), method)
    train_only(model, method.distillation_parameters(model))
    distil(model, build("tiny_vit"), method, 3)
    method.on_distillation_step(model, 0.4)
    loaded = reload(model, "tiny_vit", tmp_path)
    x = batch(model)
    assert torch.equal(loaded.eval()(x), model.eval()(x)) and not method.on_distillation_step(loaded, 0.5)
    method.on_distillation_step(model, 0.5)
    assert torch.equal(loaded(x), model(x))


def test_pc_lora_without_distillation_is_refused():
    method = PcLora(rank=4)
    model = recombine.apply(build("tiny_vit"), method)
    method.on_distillation_step(model, 1.0)
    with pytest.raises(recombine.UsageError, match="distil"):
        finish(model, method, alone=True)


@pytest.mark.parametrize("second", [LORA, Ssf()], ids=ids([LORA, Ssf()]))
def test_pc_lora_is_adapted(second, tmp_path):
    method = PcLora(targets=("up", "down"), rank=4)
    model = recombine.apply(build("tiny_vit"), method)
    train_only(model, method.distillation_parameters(model))
    distil(model, build("tiny_vit"), method, 4)
    finish(model, method, alone=False)
    recombine.apply(model.eval(), second)
    train(model.train(), 2)
    x = batch(model)
    assert torch.equal(reload(model.eval(), "tiny_vit", tmp_path)(x), model(x))
