"""peft's adapters against their papers' formulas in float64, on plain and on compressed models."""

import copy
import logging

import numpy as np
import pytest
import scipy.linalg
import torch

import recombine
from helpers import QKV, SPLIT, VBLORA, numbers
from recombine import Cersa, Crisp, Peft, Ssf, Svd
from recombine.core.account import stored_in_targets
from recombine.core.checkpoint import merged
from recombine.core.rewrite import find_sites
from recombine.layers import ScaleShift
from recombine.methods.adapters.peft_checks import butterflies
from recombine.models import roles
from zoo import astray, batch, build, outputs, train


def lora(layer, w):
    a, b = numbers(layer.lora_A.default.weight, layer.lora_B.default.weight)
    return w + layer.scaling["default"] * b @ a


def dora(layer, w):
    v = lora(layer, w)
    (magnitude,) = numbers(layer.lora_magnitude_vector.default.weight)
    return magnitude[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)


def boft(layer, w):
    r, s = numbers(layer.boft_R.default, layer.boft_s.default)
    skew = (r[0] - r[0].transpose(0, 2, 1)) / 2  # Cayley: (I - S)(I + S)^-1 is a rotation
    rotation = scipy.linalg.block_diag(*((np.eye(len(x)) - x) @ np.linalg.inv(np.eye(len(x)) + x) for x in skew))
    assert np.allclose(rotation @ rotation.T, np.eye(len(rotation)))
    return s * (w @ rotation.T)


def ia3(layer, w):
    (scale,) = numbers(layer.ia3_l.default)  # (m, 1), or (1, n) of a feed-forward's input
    assert scale.shape == ((1, w.shape[1]) if layer.is_feedforward else (len(w), 1))
    return scale * w


def road(layer, w):
    """Rows j and j + h of each group of 2 h: y_j = a cos t x_j - a' sin t' x_(j + h), and so on (RoAD Eq. 4)."""
    theta, alpha = numbers(layer.road_theta.default, layer.road_alpha.default)
    variant, h = layer.variant["default"], layer.group_size["default"] // 2
    out = np.zeros_like(w)
    for row in range(len(w)):
        group, j = divmod(row, 2 * h)
        other, sign = (row + h, -1) if j < h else (row - h, 1)
        own = {"road_1": group * h + j % h, "road_2": row, "road_4": 4 * h * group + j}[variant]
        cross = own + 2 * h if variant == "road_4" else own
        out[row] = alpha[own] * np.cos(theta[own]) * w[row] + sign * alpha[cross] * np.sin(theta[cross]) * w[other]
    return out


def vblora(layer, w):
    bank, a, b = numbers(layer.vblora_vector_bank.default, layer.vblora_logits_A.default, layer.vblora_logits_B.default)

    def pieces(logits):  # (..., h) -> (..., length): the k best vectors, mixed
        best = np.argsort(-logits, -1)[..., : layer.topk["default"]]
        chosen = np.exp(np.take_along_axis(logits, best, -1))
        return np.einsum("ijk,ijkl->ijl", chosen / chosen.sum(-1, keepdims=True), bank[best])

    left = pieces(b).transpose(0, 2, 1).reshape(len(w), -1)  # (m, r)
    return w + left @ pieces(a).reshape(left.shape[1], -1)


def hira(layer, w):
    a, b = numbers(layer.hira_A.default, layer.hira_B.default)
    return w * (1 + b @ a)


FORMULAS = {
    "lora": (lora, Peft(targets=QKV, rank=4, options={"lora_alpha": 6})),
    "dora": (dora, Peft(targets=QKV, rank=4, options={"lora_alpha": 6, "use_dora": True})),
    "pissa": (lora, Peft(targets=QKV, rank=4, options={"lora_alpha": 6, "init_lora_weights": "pissa"})),
    "boft": (boft, Peft(config="BOFTConfig", targets=QKV, rank=None, options={"boft_block_size": 8})),
    "ia3": (
        ia3,
        Peft(config="IA3Config", targets=("k", "v", "down"), rank=None, options={"feedforward_modules": ["down"]}),
    ),
    **{
        v: (road, Peft(config="RoadConfig", targets=("o", "up"), rank=None, options={"variant": v, "group_size": 8}))
        for v in ("road_1", "road_2", "road_4")
    },
    "vblora": (vblora, Peft(config="VBLoRAConfig", targets=QKV, rank=2, options=VBLORA)),
    "hira": (hira, Peft(config="HiraConfig", targets=QKV, rank=4)),
}


@pytest.mark.parametrize("formula, method", FORMULAS.values(), ids=FORMULAS)
def test_peft_computes_what_the_paper_says(formula, method):
    model = astray(recombine.apply(build("tiny_vit"), method))
    for name in model.recombined.targets:
        layer = model.get_submodule(name)
        base = layer.get_base_layer()
        x = torch.randn(5, base.in_features, dtype=torch.float64)
        expected = torch.from_numpy(formula(layer, base.weight.detach().numpy()))
        scale = torch.ones_like(base.bias)  # IA3 and RoAD act on the output, so on the bias too
        if formula is ia3 and not layer.is_feedforward:
            scale = layer.ia3_l.default.flatten()
        if formula is road:
            scale = torch.from_numpy(road(layer, base.bias.detach().numpy()[:, None])[:, 0]) / base.bias
        y = x @ expected.T + scale * base.bias
        assert torch.allclose(layer(x), y, atol=1e-9)
        plain = merged(layer)
        assert torch.allclose(plain.weight, expected, atol=1e-9) and torch.allclose(plain(x), y, atol=1e-9)


def test_pissa_is_the_principal_part_and_is_never_factored_again(tmp_path, monkeypatch):
    pretrained, (_, method) = build("tiny_vit"), FORMULAS["pissa"]
    roles.split_fused(pretrained, QKV)
    model = recombine.apply(copy.deepcopy(pretrained), method)
    for name in model.recombined.targets:
        layer, w = model.get_submodule(name), pretrained.get_submodule(name).weight.detach().double().numpy()
        u, s, vh = scipy.linalg.svd(w)
        principal = lora(layer, np.zeros_like(w))
        assert np.abs(principal - (u[:, :4] * s[:4]) @ vh[:4]).max() <= 1e-5 * s[0]
        assert np.abs(principal + layer.base_layer.weight.numpy() - w).max() <= 1e-5 * s[0]
        assert (
            f"{name}.base_layer.weight" not in model.recombined.untouched
        )  # the rest is no pretrained weight: it is saved
    train(model, 2)
    recombine.save(model.eval(), tmp_path / "m")

    def forbidden(*_, **__):
        raise AssertionError("factored again")

    monkeypatch.setattr(torch.linalg, "svd", forbidden)
    monkeypatch.setattr(torch, "svd_lowrank", forbidden)
    x = batch(model)
    loaded = recombine.load(tmp_path / "m", build("tiny_vit"))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    method.sizes(find_sites(build("tiny_vit"), method))


def test_boft_refuses_factors_that_peft_would_drop():
    if butterflies():
        pytest.skip("peft's CUDA extension is here")
    method = Peft(config="BOFTConfig", rank=None, options={"boft_n_butterfly_factor": 2})
    with pytest.raises(recombine.UsageError, match="boft_n_butterfly_factor=2.*set it to 1") as error:
        recombine.apply(build("tiny_vit"), method)
    assert "\n" not in str(error.value)


def test_vblora_says_that_it_moved_the_model_and_keeps_one_bank(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        model = recombine.apply(build("tiny_vit"), FORMULAS["vblora"][1])
    (line,) = caplog.messages
    assert "VBLoRAConfig is not the identity" in line and "\n" not in line
    banks = {id(m.vblora_vector_bank.default) for m in model.modules() if hasattr(m, "vblora_vector_bank")}
    assert len(banks) == 1
    recombine.save(model, tmp_path / "m")
    loaded = recombine.load(tmp_path / "m", build("tiny_vit"))
    banks = {id(m.vblora_vector_bank.default) for m in loaded.modules() if hasattr(m, "vblora_vector_bank")}
    assert len(banks) == 1 and recombine.count(loaded) == recombine.count(model)
    with pytest.raises(recombine.UsageError, match="already rewritten"):  # though peft makes it an nn.Linear
        recombine.apply(model, Svd(targets=QKV))


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "boft", "ia3", "road_2", "hira"])
def test_the_others_start_at_the_model_and_say_nothing(name, caplog):
    with caplog.at_level(logging.WARNING):
        recombine.apply(build("tiny_llama"), FORMULAS[name][1])
    assert not caplog.messages


COMPRESSORS = {
    "svd": Svd(targets=SPLIT, ratio=0.6),
    "crisp": Crisp(targets=SPLIT, chunk=8, basis_rank=9),
    "cersa": Cersa(targets=SPLIT, alpha=0.9, beta=0.7),
}


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_llama"])
@pytest.mark.parametrize("adapter", ["lora", "dora", "ssf"])
@pytest.mark.parametrize("first", COMPRESSORS.values(), ids=COMPRESSORS)
def test_adapts_a_compressed_model(arch, adapter, first, tmp_path):
    pretrained = build(arch)
    model, x = recombine.apply(copy.deepcopy(pretrained), first), batch(pretrained)
    second = Ssf() if adapter == "ssf" else Peft(targets=SPLIT, rank=2, options=FORMULAS[adapter][1].options)
    with torch.no_grad():
        before = outputs(model, x)
        dense = {name: model.get_submodule(name).dense_weight() for name in model.recombined.targets}
        sizes = second.sizes(find_sites(model, second))
        recombine.apply(model, second)
        assert torch.allclose(outputs(model, x), before, atol=1e-6)
    assert recombine.count(model).trained_without_head == sizes[1]
    assert stored_in_targets(model) == sizes[0]
    if adapter == "dora":
        for name, w in dense.items():
            magnitude = model.get_submodule(name).lora_magnitude_vector.default.weight
            assert torch.allclose(magnitude, w.norm(dim=1))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    history = train(model.train())
    assert history[-1] < history[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    recombine.save(model.eval(), tmp_path / "m")
    loaded = recombine.load(tmp_path / "m", copy.deepcopy(pretrained))
    with torch.no_grad():
        final = outputs(model, x)
        assert torch.equal(outputs(loaded, x), final)
        assert recombine.count(loaded) == recombine.count(model)
    assert train(loaded.train(), 2) == train(model.train(), 2)
    with torch.no_grad():
        unmerged = outputs(model.eval(), x)
        assert torch.allclose(outputs(recombine.merge(model), x), unmerged, atol=2e-5)
    assert not any(isinstance(m, recombine.RecombinedLinear | ScaleShift) for m in model.modules())


def test_a_budget_counts_what_a_compressed_model_holds():
    def compressed():
        return recombine.apply(build("tiny_vit"), Svd(targets=SPLIT, ratio=0.5))

    model = recombine.apply(compressed(), Peft(targets=SPLIT), "memory_0.5mb")
    rank = model.recombined.steps[-1].fields["rank"]
    assert recombine.count(model).memory_mib <= 0.5
    over = recombine.apply(compressed(), Peft(targets=SPLIT, rank=rank + 1))
    assert recombine.count(over).memory_mib > 0.5


@pytest.mark.parametrize("name", ["pissa", "boft", "ia3", "road_1", "vblora", "hira"])
def test_what_rewrites_a_weight_is_refused_on_a_compressed_model(name):
    model = recombine.apply(build("tiny_vit"), COMPRESSORS["svd"])
    x = batch(model)
    with torch.no_grad():
        before = model(x)
        with pytest.raises(recombine.UsageError) as error:
            recombine.apply(model, FORMULAS[name][1])
        assert "\n" not in str(error.value) and "FactoredLinear" in str(error.value)
        assert torch.equal(model(x), before) and len(model.recombined.steps) == 1
