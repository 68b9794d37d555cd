"""The adapters against their papers' formulas in float64, on plain and on compressed models."""

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_closed_forms import KINDS, matrix
from test_run import execute
from torch import nn
from zoo import batch, build, loss, losses, outputs, train

import recombine
from recombine import Cersa, Crisp, Peft, Rosa, Ssf, Svd, Svfit, Svft, models
from recombine.core.account import stored_in_targets
from recombine.core.checkpoint import merged
from recombine.core.method import Site
from recombine.core.rewrite import find_sites
from recombine.layers import FactoredLinear, ScaleShift
from recombine.methods.adapters.peft_checks import butterflies
from recombine.methods.svd.truncated import directions
from recombine.models import roles

QKV = ("q", "k", "v")
SPLIT = ("q", "k", "v", "o", "up", "down", "gate?")


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


def numbers(*tensors):
    return [t.detach().double().numpy() for t in tensors]


VBLORA = {"num_vectors": 6, "vector_length": 12, "init_vector_bank_bound": 0.3}
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
    model = recombine.apply(build("tiny_vit"), method).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
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


def site_of(kind, m, n, seed):
    linear = nn.Linear(n, m, dtype=torch.float64)
    linear.weight.data = matrix(kind, m, n, seed)
    return Site("layer", "q", linear)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), KINDS, st.integers(0, 99), st.integers(1, 12))
def test_svfit_starts_at_the_weight_and_trains_the_largest_singular_values(m, n, kind, seed, rank):
    site = site_of(kind, m, n, seed)
    layer, w = Svfit(rank=rank).recombine(site), site.module.weight.detach()
    s = scipy.linalg.svdvals(w.numpy())
    assert torch.allclose(layer.dense_weight(), w, atol=1e-12 * max(s[0], 1e-300), rtol=0)
    assert np.allclose(layer.core.detach().numpy(), s[:rank], atol=1e-12 * max(s[0], 1e-300))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["core"]
    assert Svfit(rank=rank).sizes([site]) == (sum(p.numel() for p in layer.parameters()) - m, min(rank, m, n))


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), KINDS, st.integers(0, 99), st.data())
def test_svft_is_its_formula(m, n, kind, seed, data):
    pattern = data.draw(st.sampled_from(["plain", "banded", "random", *(["top_k"] if m == n else [])]))
    k, site = min(m, n), site_of(kind, m, n, seed)
    method = Svft(pattern=pattern, band=data.draw(st.integers(0, k - 1)))
    method.check([site])
    layer, w = method.recombine(site), site.module.weight.detach()
    scale = max(scipy.linalg.svdvals(w.numpy())[0], 1e-300)
    assert torch.allclose(layer.dense_weight(), w, atol=1e-12 * scale, rtol=0)
    trained = {name: p.numel() for name, p in layer.named_parameters() if p.requires_grad}
    assert set(trained) == {"entries", "gate"}
    assert method.sizes([site]) == (sum(p.numel() for p in layer.parameters()) - m, sum(trained.values()))

    mask = np.zeros((k, k), bool)
    mask[tuple(layer.index.numpy())] = True
    assert mask.sum() == trained["entries"]  # each place once
    d = 0 if pattern == "plain" else method.band
    band = np.abs(np.subtract.outer(np.arange(k), np.arange(k))) <= d
    assert mask.sum() == band.sum() == k * (2 * d + 1) - d * (d + 1)
    u, s, vh = (t.numpy() for t in method.factors(site))
    if pattern in ("plain", "banded"):
        assert (mask == band).all()
    if pattern == "top_k":
        alignment = np.abs(u.T @ vh.T)
        assert alignment[mask].min() >= alignment[~mask].max(initial=0)

    with torch.no_grad():
        layer.entries.copy_(scale * torch.randn_like(layer.entries))
        layer.gate.fill_(0.7)
    sparse = np.zeros((k, k))
    sparse[tuple(layer.index.numpy())] = layer.entries.detach().numpy()
    expected = u @ (np.diag(s) + sparse / (1 + np.exp(-0.7))) @ vh
    assert np.abs(layer.dense_weight().detach().numpy() - expected).max() <= 1e-11 * scale
    x = torch.randn(3, n, dtype=torch.float64)
    assert torch.allclose(layer.factored_forward(x), x @ torch.from_numpy(expected).T, atol=1e-10 * scale)


def test_svft_starts_as_the_papers_code():
    """start=kaiming: M from N(0, 2 / e) and sigmoid(0) of it added; top_k_signed: the largest u_i . v_j."""
    site = site_of("random", 24, 24, 0)
    torch.manual_seed(3)
    layer = Svft(band=2, start="kaiming").recombine(site)
    torch.manual_seed(3)
    e = 24 * 5 - 6
    values = torch.randn(1, e, dtype=torch.float64)[0] * (2 / e) ** 0.5
    assert torch.allclose(layer.entries, values) and layer.gate == 0
    assert abs(layer.entries.detach().std().item() - (2 / e) ** 0.5) < 0.2 * (2 / e) ** 0.5
    u, s, vh = (t.numpy() for t in Svft(band=2).factors(site))
    sparse = np.zeros((24, 24))
    sparse[tuple(layer.index.numpy())] = values.numpy()
    assert np.allclose(layer.dense_weight().detach().numpy(), u @ (np.diag(s) + sparse / 2) @ vh)
    taken = np.zeros((24, 24), bool)
    taken[tuple(Svft(band=2, pattern="top_k_signed").recombine(site).index.numpy())] = True
    inner = u.T @ vh.T
    assert taken.sum() == e and inner[taken].min() >= inner[~taken].max()
    assert np.abs(inner)[taken].min() < np.abs(inner)[~taken].max()  # not the same as top_k


@pytest.mark.parametrize(
    "method, printed, formula",
    [
        (Svfit(), 1351.5, 48 * (12 * 768)),
        (Svfit(rank=1024), 1351.5, 48 * (12 * 1024)),
        (Svft(), 1355.8, 48 * (16 * (7 * 1024 - 12 + 1))),
    ],
    ids=["SVFit r=768", "SVFit, all values", "SVFT d=3"],
)
def test_memory_equals_cersa_table_14(method, printed, formula):
    """ViT-L, q and v, 100 classes: U, s, V beside the rest. No SVD is needed to count."""
    with torch.device("meta"):
        model = models.build("vit_l16", arch="vit_large_patch16_224", pretrained=False, num_classes=100)
    sites = find_sites(model, method)
    stored, trained = method.sizes(sites)
    rest = sum(p.numel() for p in model.parameters()) - 48 * 1024**2
    memory = (4 * (rest + stored) + 12 * (trained + 102_500)) / 2**20
    assert memory == pytest.approx(printed, rel=3e-4)
    assert memory * 2**20 == 4 * (303_301_632 + 102_500 + 48 * (1024**2 + 1024)) + 12 * 102_500 + formula
    assert not method._factors and directions(sites[0]) == 1024


@pytest.mark.parametrize("method", [Svfit(rank=7), Svft(), Rosa(rank=3, density=0.05)], ids=["svfit", "svft", "rosa"])
def test_both_forwards_agree(method, monkeypatch):
    """Materialised and structured give the same outputs and gradients, away from the start."""
    results = []
    for cheap in (0, 1):
        model = build("tiny_vit")
        recombine.apply(model, method, losses=losses(model)).double().train()
        torch.manual_seed(0)
        for layer in model.modules():
            if isinstance(layer, recombine.RecombinedLinear):
                monkeypatch.setattr(layer, "flops", lambda tokens, train, c=cheap: (c, 1 - c, 0))
                for name, p in layer.named_parameters():
                    if p.requires_grad:
                        p.data = p.data * (name not in ("left", "right")) + 0.3 * torch.randn_like(p.data)
        y = model(batch(model).double())
        grads = torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])
        results.append((y, grads))
        with torch.no_grad():
            assert torch.allclose(model.eval()(batch(model).double()), y)
    assert torch.allclose(results[0][0], results[1][0])
    assert all(torch.allclose(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_rosa_takes_the_entries_with_the_largest_mean_squared_gradient():
    pretrained = build("tiny_vit")
    roles.split_fused(pretrained, SPLIT)
    method = Rosa(targets=SPLIT, rank=2, alpha=6, density=0.02)
    model = copy.deepcopy(pretrained)
    recombine.apply(model, method, losses=losses(model))
    reference = copy.deepcopy(pretrained).double()
    squares = {name: 0 for name in model.recombined.targets}
    for i in range(4):
        reference.zero_grad()
        loss(reference, batch(pretrained, seed=10 + i).double()).backward()
        for name in squares:
            squares[name] = squares[name] + reference.get_submodule(name).weight.grad ** 2 / 4
    for name, square in squares.items():
        layer, square = model.get_submodule(name), square.flatten()
        taken = torch.zeros_like(square, dtype=torch.bool)
        taken[layer.index] = True
        assert taken.sum() == len(layer.index) == round(0.02 * len(square))
        assert square[taken].min() >= square[~taken].max() * (1 - 1e-4)  # calibrated in float32
        with torch.no_grad():
            layer.double().entries.normal_()
            layer.left.normal_()
        sparse = np.zeros(len(square))
        sparse[layer.index.numpy()] = layer.entries.detach().numpy()
        w, b, a = numbers(pretrained.get_submodule(name).weight, layer.left, layer.right)
        built = layer.dense_weight().detach().numpy()
        assert np.abs(built - (w + 3 * b @ a + sparse.reshape(w.shape))).max() <= 1e-12


def test_rosa_makes_its_mask_after_a_warm_up():
    """warmup: LoRA alone trains by Adam on the calibration batches, and its model's gradients choose the entries."""
    pretrained = build("tiny_vit")
    roles.split_fused(pretrained, SPLIT)
    method, masks = Rosa(targets=SPLIT, rank=3, alpha=6, density=0.02, warmup=6, lr=0.02), []
    for one in (method, replace(method, warmup=0)):
        model = copy.deepcopy(pretrained)
        torch.manual_seed(0)
        recombine.apply(model, one, losses=losses(model))
        masks.append({name: model.get_submodule(name).index for name in model.recombined.targets})
        assert all(not m.left.any() and not m.entries.any() for m in map(model.get_submodule, masks[-1]))
        assert not any(m._forward_hooks for m in model.modules())
        with torch.no_grad():
            assert torch.allclose(model(batch(model)), pretrained(batch(model)), atol=1e-5)  # it begins anew
    assert any(not torch.equal(masks[0][name], masks[1][name]) for name in masks[0])

    reference, weights, parts = copy.deepcopy(pretrained), {}, {}
    torch.manual_seed(0)
    for name in masks[0]:
        w = weights[name] = reference.get_submodule(name).weight.detach().clone().requires_grad_()
        a = nn.init.kaiming_uniform_(torch.empty(3, w.shape[1]), a=5**0.5).requires_grad_()
        parts[name] = (torch.zeros(len(w), 3, requires_grad=True), a)

    def task(i):
        adapted = {f"{name}.weight": w + 2 * parts[name][0] @ parts[name][1] for name, w in weights.items()}
        logits = torch.func.functional_call(reference, adapted, batch(pretrained, seed=10 + i % 4))
        return F.cross_entropy(logits, torch.arange(6) % 5)

    optimizer = torch.optim.Adam([p for pair in parts.values() for p in pair], lr=0.02)
    for i in range(6):
        optimizer.zero_grad()
        task(i).backward()
        optimizer.step()
    grads = [torch.autograd.grad(task(i), list(weights.values())) for i in range(4)]
    for j, index in enumerate(masks[0].values()):
        square = sum(g[j].square() for g in grads).flatten()
        rest = torch.ones(len(square), dtype=torch.bool)
        rest[index] = False
        assert square[index].min() >= square[rest].max() * (1 - 1e-2)


def test_rosa_spends_a_budget_on_its_rank():
    for limit in (9_000, 30_000):
        model = build("tiny_vit")
        method = Rosa(targets=SPLIT, density=0.02)
        recombine.apply(model, method, f"trainable_{limit}", losses=losses(model))
        rank = model.recombined.steps[0].fields["rank"]
        sparse = sum(len(m.index) for m in model.modules() if hasattr(m, "index"))
        step = sum(sum(model.get_submodule(n).dense_weight().shape) for n in model.recombined.targets)
        assert recombine.count(model).trained_without_head == sparse + rank * step <= limit
        assert rank in (0, 48) or sparse + (rank + 1) * step > limit


def test_ssf_counts_what_the_paper_counts():
    model = models.build("vit_s16", arch="vit_small_patch16_224", pretrained=False, num_classes=1000)
    recombine.apply(model, Ssf())
    assert recombine.count(model).trained_without_head == 102_912
    assert len(model.recombined.targets) == 12 * 6 + 2


def test_ssf_starts_as_the_paper_has_it():
    torch.manual_seed(0)
    model = recombine.apply(build("tiny_vit"), Ssf(start="normal"))
    layers = [m for m in model.modules() if isinstance(m, ScaleShift)]
    for name, mean in (("gamma", 1.0), ("beta", 0.0)):
        values = torch.cat([getattr(layer, name).detach() for layer in layers]).double().numpy()
        assert len(values) > 2000 and scipy.stats.kstest((values - mean) / 0.02, "norm").pvalue > 0.01
    assert all(p.requires_grad for layer in layers for p in (layer.gamma, layer.beta))


def test_ssf_merges_exactly():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    x, picture = torch.randn(4, 6, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    factored = FactoredLinear(torch.randn(5, 2), torch.randn(2, 6))
    bases = [nn.Linear(6, 5), nn.Linear(6, 5, bias=False), nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.RMSNorm(6),
             LlamaRMSNorm(6), nn.Conv2d(3, 5, 4, 4), nn.Conv2d(3, 5, 4, 4, bias=False), factored]  # fmt: skip
    for base in bases:
        base, given = base.double(), picture if isinstance(base, nn.Conv2d) else x
        for p in base.parameters():
            p.data = torch.randn_like(p)
        layer, before = ScaleShift(base), base(given)
        assert torch.equal(layer(given), before)
        layer.gamma.data, gamma = (torch.randn_like(layer.gamma),) * 2
        shift = torch.zeros(())
        if layer.beta is not None:
            layer.beta.data, shift = (torch.randn_like(layer.beta),) * 2
        assert (layer.beta is None) == isinstance(base, nn.RMSNorm | LlamaRMSNorm)
        y = before * gamma + shift if given is x else torch.einsum("bchw,c->bchw", before, gamma) + shift[:, None, None]
        assert torch.allclose(layer(given), y, atol=1e-12, rtol=0)
        plain = layer.merged()
        assert type(plain) is (nn.Linear if base is factored else type(base))
        assert torch.allclose(plain(given), y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_deberta"])
def test_ssf_leaves_the_modules_as_they_were_where_every_layer_has_a_bias(arch):
    pretrained = build(arch)
    model = recombine.merge(recombine.apply(copy.deepcopy(pretrained), Ssf()))
    assert model.state_dict().keys() == pretrained.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in pretrained.modules()]
    recombine.apply(model, Ssf())  # and again, on what was merged
    assert train(model.train())[-1] < F.cross_entropy(torch.zeros(6, 5), torch.arange(6) % 5)


@pytest.mark.parametrize("first", [Ssf(), Peft(targets=QKV)], ids=["ssf", "lora"])
def test_ssf_on_an_adapter_is_refused(first):
    model = recombine.apply(build("tiny_vit"), first)
    with pytest.raises(recombine.UsageError, match="already adapted") as error:
        recombine.apply(model, Ssf())
    assert "\n" not in str(error.value)
    with pytest.raises(recombine.UsageError, match="already rewritten"):
        recombine.apply(model, Svft(targets=("qkv",)))


@pytest.mark.parametrize(
    "name, more",
    [
        *((name, []) for name in ("pissa", "boft", "ia3", "hira", "svfit", "svft", "ssf", "rosa")),
        ("road", ["method.options.group_size=8"]),
        ("vblora", ["method.options.vector_length=24"]),
        ("ssf", ["method@compressor=svd"]),
        ("dora", ["method@compressor=svd"]),
    ],
)
def test_runs_from_the_command_line(name, more, tmp_path):
    result = execute(tmp_path, f"method={name}", *more, "trainer.epochs=1", "data.limit=32")
    assert 0 <= result["test"]["acc"] <= 1 and result["account"]["trained_without_head"] > 0
    again = f"stage.checkpoint={tmp_path}/best.safetensors"
    same = execute(tmp_path / "again", f"method={name}", *more, "stage=evaluate", again, "data.limit=32")
    assert same["test"]["loss"] == pytest.approx(result["test"]["loss"], rel=1e-5)
