"""SVFit and SVFT against their formulas, and CERSA's table of their memory."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import recombine
from helpers.matrices import KINDS, matrix
from recombine import Rosa, Svfit, Svft, models
from recombine.core.method import Site
from recombine.core.rewrite import find_sites
from recombine.methods.svd.spectral import directions
from zoo import batch, build, losses


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
    expected = x @ torch.from_numpy(expected).T + layer.bias
    assert torch.allclose(layer.factored_forward(x), expected, atol=1e-10 * scale)


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
    assert not method.kept.groups and directions(sites[0]) == 1024


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
