"""peft's further tuners against their papers' formulas in float64; what none of them can do is refused in one line."""

import numpy as np
import pytest
import scipy.linalg
import torch

import recombine
from helpers import QKV, SPLIT, numbers, refusal
from recombine import Peft, Svd
from recombine.core.checkpoint import merged
from recombine.export.lora import to_lora
from recombine.methods.from_config import from_name
from zoo import astray, batch, build, losses, outputs


def skew(vectors, size):
    """Skew-symmetric matrices (b, size, size) of their upper triangles (b, size (size - 1) / 2)."""
    found = np.zeros((len(vectors), size, size))
    found[:, *np.triu_indices(size, 1)] = vectors
    return found - found.transpose(0, 2, 1)


def rslora(layer, w):
    a, b = numbers(layer.lora_A.default.weight, layer.lora_B.default.weight)
    return w + 6 / len(a) ** 0.5 * b @ a


def miss(layer, w):
    (block,) = numbers(layer.miss_block.default)  # (r, m)
    return w + block[np.arange(w.shape[1]) % len(block)].T


def vera(layer, w):
    a, b, d, g = numbers(
        layer.vera_A["default"], layer.vera_B["default"], layer.vera_lambda_d.default, layer.vera_lambda_b.default
    )
    return w + g[:, None] * b[: len(w)] @ (d[:, None] * a[:, : w.shape[1]])


def randlora(layer, w):
    a, b, lam, gamma = numbers(
        layer.randlora_A["default"],
        layer.randlora_B["default"],
        layer.randlora_lambda.default,
        layer.randlora_gamma.default,
    )
    short, long = sorted(w.shape)
    columns = b[:long, : lam.shape[1]].reshape(long, -1)  # of all bases; which of them pair up is as random as they are
    rows = (lam[:, :, None] * a[..., :short] * gamma).reshape(-1, short)
    delta = layer.scaling["default"] * columns @ rows
    return w + (delta if w.shape[1] == short else delta.T)


def delora(layer, w):
    a, b, lam, norm = numbers(
        layer.delora_A.default, layer.delora_B.default, layer.delora_lambda.default, layer.delora_w_norm["default"]
    )
    directions = lam / len(a) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=0)
    return w + (b * directions) @ a * norm


def gralora(layer, w):
    a, b = numbers(layer.gralora_A.default, layer.gralora_B.default)  # (k, n / k, r), (k, r, m / k)
    k, r = len(a), a.shape[2]
    chunk = [slice(i * r // k, (i + 1) * r // k) for i in range(k)]
    blocks = [[b[i, chunk[j]].T @ a[j][:, chunk[i]].T for j in range(k)] for i in range(k)]
    return w + layer.scaling["default"] * np.block(blocks)


def oft(layer, w):
    (r,) = numbers(layer.oft_R.default.weight)
    q = skew(r, 8)
    rotation = scipy.linalg.block_diag(*((np.eye(8) - x) @ np.linalg.inv(np.eye(8) + x) for x in q))
    assert np.allclose(rotation @ rotation.T, np.eye(len(rotation)))
    return w @ rotation.T


def psoft(layer, w):
    r = layer.psoft_R.default
    vector, left, right = numbers(r.weight, r.vector_b, r.vector_a)
    q = skew(vector[None], len(left))[0]
    rotation = np.linalg.solve((np.eye(len(q)) - q).T, (np.eye(len(q)) + q).T).T
    a, b = numbers(layer._psoft_A_cache["default"], layer._psoft_B_cache["default"])
    u, s, vh = scipy.linalg.svd(w, full_matrices=False)
    assert np.allclose(b @ a, (u[:, : len(q)] * s[: len(q)]) @ vh[: len(q)], atol=1e-4)
    return w + b @ (left[:, None] * rotation * right - np.eye(len(q))) @ a


def loha(layer, w):
    one, two, three, four = numbers(
        *(getattr(layer, f"hada_w{i}_{x}").default for i, x in ((1, "a"), (1, "b"), (2, "a"), (2, "b")))
    )
    return w + layer.scaling["default"] * (one @ two) * (three @ four)


def lokr(layer, w):
    outer, left, right = numbers(layer.lokr_w1.default, layer.lokr_w2_a.default, layer.lokr_w2_b.default)
    return w + layer.scaling["default"] * np.kron(outer, left @ right)


def tinylora(layer, w):
    (v,) = numbers(layer.tinylora_v["default"][layer._tinylora_v_key["default"]])
    (p,) = numbers(layer.tinylora_P["default"])
    a, b = numbers(layer.tinylora_A["default"], layer.tinylora_B["default"])
    u, s, vh = scipy.linalg.svd(w, full_matrices=False)
    assert np.allclose(b @ a, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-4)
    return w + b @ np.einsum("i,ijk->jk", v, p) @ a


def unilora(layer, w):
    (theta,) = numbers(layer.unilora_theta_d["default"])
    a, b = (getattr(layer, f"unilora_indices_{x}")["default"].numpy() for x in "AB")
    scales = numbers(layer.unilora_scales_A["default"], layer.unilora_scales_B["default"])
    return w + (theta[b] * scales[1]) @ (theta[a] * scales[0])


def hra(layer, w):
    (u,) = numbers(layer.hra_u.default)
    for vector in (u / np.linalg.norm(u, axis=0)).T:
        w = w - 2 * np.outer(w @ vector, vector)
    return w


def shira(layer, w):
    (values,) = numbers(layer.shira_weight.default)
    rows, columns = layer.shira_indices["default"].numpy()
    assert len({*zip(rows, columns, strict=True)}) == len(values)
    w = w.copy()
    w[rows, columns] += values
    return w


def tuner(config, rank=4, targets=SPLIT, **options):
    return Peft(config=config, targets=targets, rank=rank, options=options)


FORMULAS = {
    "rslora": (rslora, tuner("LoraConfig", lora_alpha=6, use_rslora=True)),
    "miss": (miss, tuner("MissConfig", 7)),
    "vera": (vera, tuner("VeraConfig", 16)),
    "randlora": (randlora, tuner("RandLoraConfig", 7, randlora_alpha=70)),
    "delora": (delora, tuner("DeloraConfig")),
    "gralora": (gralora, tuner("GraloraConfig", 8, gralora_k=4)),
    "oft": (oft, tuner("OFTConfig", None, oft_block_size=8, use_cayley_neumann=False)),
    "psoft": (psoft, tuner("PsoftConfig", 6, psoft_alpha=6)),
    "loha": (loha, tuner("LoHaConfig")),
    "lokr": (lokr, tuner("LoKrConfig", 3)),
    "tinylora": (tinylora, tuner("TinyLoraConfig", 2, u=8)),
    "unilora": (unilora, tuner("UniLoraConfig", theta_d_length=64)),
    "hra": (hra, tuner("HRAConfig")),
    "shira": (shira, tuner("ShiraConfig")),
}


@pytest.mark.parametrize("formula, method", FORMULAS.values(), ids=FORMULAS)
def test_peft_computes_what_the_paper_says(formula, method):
    torch.manual_seed(0)
    model = astray(recombine.apply(build("tiny_vit"), method))
    for name in model.recombined.targets:
        layer = model.get_submodule(name)
        base = layer.get_base_layer()
        x = torch.randn(5, base.in_features, dtype=torch.float64)
        expected = torch.from_numpy(formula(layer, base.weight.detach().numpy()))
        assert torch.allclose(layer(x), x @ expected.T + base.bias, atol=1e-9)
        assert torch.allclose(merged(layer).weight, expected, atol=1e-9)


FIXED = ["vera", "randlora", "psoft", "tinylora", "unilora", "delora", "shira"]  # what they draw or factor is kept


@pytest.mark.parametrize("name", FIXED)
def test_an_adapter_file_holds_what_a_task_trained(name, tmp_path):
    base, x = build("tiny_vit"), batch(build("tiny_vit"))
    expected = {}
    for task in ("one", "two"):
        model = recombine.apply(build("tiny_vit"), FORMULAS[name][1])
        torch.manual_seed(len(expected))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
            expected[task] = model.eval()(x)
        recombine.save_adapter(model, tmp_path / task)
        recombine.load_adapter(base, tmp_path / task, name=task)
    for task, y in expected.items():
        recombine.set_adapter(base, task)
        with torch.no_grad():
            assert torch.equal(base(x), y)


@pytest.mark.parametrize("name", ["c3a", "hra", "waveft"])
def test_a_lora_holds_any_of_them(name):
    """Of full rank, for these: what is exported has the outputs of the tuner."""
    model, x = build("tiny_vit"), batch(build("tiny_vit"))
    small = {"c3a": {"block_size": 8, "init_weights": True}, "waveft": {"n_frequency": 50}, "hra": {}}[name]
    recombine.apply(model, from_name(name, {"options": small}, "method"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01 * torch.randn_like(p))
        expected, other = model(x), build("tiny_vit")
        factors, errors = to_lora(model, base=other)
        assert max(errors.values()) < 1e-5
        for layer, (b, a) in factors.items():
            other.get_submodule(layer).weight.add_(b @ a)
        other.head.load_state_dict(model.head.state_dict())
        assert torch.allclose(other(x), expected, atol=1e-4)


@pytest.mark.parametrize(
    "method, why",
    [
        (tuner("OFTConfig", None, oft_block_size=10), "oft_block_size=10: must divide the input width"),
        (tuner("OFTConfig", 5, oft_block_size=0), "rank=5: must divide"),
        (tuner("C3AConfig", None, block_size=10), "factor of the input size"),
        (tuner("GraloraConfig", 5), "divisible by gralora_k"),
        (tuner("MissConfig", 7, init_weights="bat"), "divisible into"),
        (tuner("ShiraConfig", 25), "more shira params"),
        (tuner("FourierFTConfig", None, n_frequency=5000), "n_frequency"),
        (tuner("WaveFTConfig", None, wavelet_family="db0"), "not supported"),
        (tuner("VeraConfig", 100), "rank=100: must be from 1 to 48"),
        (tuner("FourierFTConfig", 4), "has no rank"),
        (tuner("LilyConfig"), "cannot be merged"),
        (tuner("AdaLoraConfig", None, total_step=9), "training loop"),
        (tuner("LoraConfig", init_lora_weights="lora_ga"), "take eva or corda"),
        (tuner("NewestConfig"), "has no such class"),
        (tuner("VeraConfig", vera_lambda=1), "takes no such option"),
    ],
)
def test_what_it_cannot_do_is_one_line(method, why):
    model = build("tiny_vit")
    assert why in refusal(recombine.apply, model, method) and not hasattr(model, "recombined")


@pytest.mark.parametrize("name", ["oft", "vera", "shira", "hra", "miss"])
def test_none_but_lora_adapts_a_compressed_model(name):
    model = recombine.apply(build("tiny_vit"), Svd(targets=SPLIT, ratio=0.6))
    assert "FactoredLinear" in refusal(recombine.apply, model, FORMULAS[name][1])


@pytest.mark.parametrize(
    "method, budget, trained",
    [
        (tuner("MissConfig", targets=QKV), "trainable_2k", 12 * 48 * 3),
        (tuner("RandLoraConfig", targets=QKV), "trainable_2k", 12 * 2 * (24 + 48)),  # a smaller rank trains more
        (tuner("GraloraConfig", targets=QKV), "trainable_3k", 12 * 2 * 96),  # k divides the rank
        (tuner("HRAConfig", targets=QKV), "trainable_2k", 12 * 2 * 48),  # and pairs cancel
        (tuner("PsoftConfig", targets=QKV), "trainable_1k", 12 * (11 * 10 // 2 + 22)),
        (tuner("ShiraConfig", targets=QKV), "trainable_100k", 12 * 24 * 96),  # all of the weight
        (tuner("FourierFTConfig", None, QKV, init_weights=True), "trainable_1k", 12 * 83),
        (tuner("WaveFTConfig", None, QKV, n_frequency=5), "trainable_100k", 12 * 48 * 48),
        (tuner("TinyLoraConfig", 2, QKV), "trainable_40", 12 * 3),
        (tuner("UniLoraConfig", 4, QKV), "trainable_777", 777),
    ],
)
def test_a_budget_sets_what_the_tuner_can_have(method, budget, trained):
    model = recombine.apply(build("tiny_vit"), method, budget)
    assert recombine.count(model).trained_without_head == trained


def test_a_file_holds_the_singular_vectors(tmp_path, monkeypatch):
    """PSOFT and TinyLoRA look at the SVD of a weight, whose vectors may have another sign elsewhere."""
    svd = torch.linalg.svd
    for name in ("psoft", "tinylora"):
        model = recombine.apply(build("tiny_vit"), FORMULAS[name][1])
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
            expected = outputs(model, batch(model))
        recombine.save(model, tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "svd", lambda *a, **k: [-x for x in svd(*a, **k)])
            loaded = recombine.load(tmp_path / name, build("tiny_vit"))
        with torch.no_grad():
            assert torch.equal(outputs(loaded, batch(loaded)), expected)


def test_the_default_of_every_yaml_starts_at_the_model_or_says_so(caplog):
    """At the width of a small ViT, which all of them divide."""
    names = "rslora miss randlora vera delora gralora psoft oft fourierft c3a loha lokr tinylora hra shira waveft"
    for name in [*names.split(), "unilora", "eva", "corda"]:
        model = recombine.models.build(
            "tiny_vit",
            arch="vit_tiny_patch16_224",
            pretrained=False,
            image_size=32,
            embed_dim=384,
            depth=1,
            num_classes=5,
        )
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            before = model.eval()(x)
            caplog.clear()
            recombine.apply(model, from_name(name, {}, "method"), losses=losses(model))
            assert torch.allclose(model(x), before, atol=1e-3 if name == "unilora" else 1e-5), name
        assert bool(caplog.messages) == (name == "unilora")
