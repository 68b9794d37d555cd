"""SVDs weighted by inputs or outputs, against explicit inputs and the papers' formulas."""

import copy

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recombine
from helpers import ALL
from helpers.weighted import INPUTS, WEIGHTS, agrees, double_losses, inputs_of, tail, weight_of
from recombine import Asvd, Fwsvd, Svd, SvdLlm
from recombine.linalg import project, weighted_svd
from recombine.models import roles
from zoo import ARCHS, build, losses


@settings(max_examples=250, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), WEIGHTS, INPUTS, st.integers(0, 99), st.data())
def test_whitened_svd_has_the_least_output_error(m, n, kind, inputs, seed, data):
    """|(W - W') X| is the tail of the singular values of W X, by scipy from X itself; nothing near is better."""
    w, x = weight_of(kind, m, n, seed), inputs_of(inputs, n, seed)
    rank = data.draw(st.integers(1, min(m, n)))
    u, s = weighted_svd(torch.from_numpy(w), torch.from_numpy(x @ x.T))
    left, right = (t.numpy() for t in project(u[:, :rank], torch.from_numpy(w)))
    scale = np.linalg.norm(w) * np.linalg.norm(x) + 1e-300
    error = np.linalg.norm((w - left @ right) @ x)
    agrees(error, tail(w @ x, rank), scale)
    agrees(s[rank:].square().sum().sqrt().item(), tail(w @ x, rank), scale)
    assert np.allclose(u.T @ u, np.eye(min(m, n)), atol=1e-12) and np.isfinite(left).all() and np.isfinite(right).all()
    size = np.linalg.norm(right, axis=1)
    assert np.allclose(np.linalg.norm(left, axis=0), np.where(size > 0, size, 1))  # balanced
    rng = np.random.default_rng(seed)
    for step in (1e-4, 1e-2, 1):
        other_left = left + step * np.abs(left).max() * rng.standard_normal(left.shape)
        other_right = right + step * np.abs(right).max() * rng.standard_normal(right.shape)
        for other in (other_left @ right, left @ other_right, other_left @ other_right):
            assert np.linalg.norm((w - other) @ x) >= error - 1e-6 * scale


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.data())
def test_projection_on_the_output_pca_is_the_papers_whitening(m, n, seed, data):
    """Dobi-SVD's P_k P_k^T W equals SVD-LLM's svd_k(W S) S^-1, S S^T = X X^T, to 1e-8."""
    w, x = weight_of("random", m, n, seed), inputs_of("random", n, seed, 60)
    rank = data.draw(st.integers(1, min(m, n)))
    s = scipy.linalg.cholesky(x @ x.T, lower=True)
    u, sigma, vh = scipy.linalg.svd(w @ s, full_matrices=False)
    papers = (u[:, :rank] * sigma[:rank]) @ vh[:rank] @ np.linalg.inv(s)
    p = np.linalg.svd(w @ x)[0][:, :rank]  # principal components of the outputs
    w_, moment = torch.from_numpy(w), torch.from_numpy(x @ x.T)
    left, right = project(weighted_svd(w_, moment)[0][:, :rank], w_)
    gap = 1e-8 * np.linalg.norm(w)
    if rank == min(m, n) or sigma[rank - 1] - sigma[rank] > 1e-4 * sigma[0]:  # else the best W' is not unique
        assert np.linalg.norm(p @ p.T @ w - papers) <= gap
        assert np.linalg.norm((left @ right).numpy() - papers) <= gap


def explicit(arch: str):
    """A float64 model; {layer: (W, X (tokens, n), [dL/dW per batch])} by plain autograd, padding left out."""
    model = build(arch).double()
    probe = copy.deepcopy(model)
    roles.split_fused(probe, ALL)
    found = roles.find(probe, ALL)
    seen = {name: [] for name in found}

    def keep(name):
        def hook(_, args):
            x = args[0].detach()
            if mask[0] is not None and x.shape[:2] == mask[0].shape:
                x = x[mask[0].bool()]
            seen[name].append(x.flatten(0, -2))

        return hook

    mask = [None]
    for name in found:
        probe.get_submodule(name).register_forward_pre_hook(keep(name))
    probe.register_forward_pre_hook(
        lambda _, args, kwargs: mask.__setitem__(0, kwargs.get("attention_mask")), with_kwargs=True
    )
    weights = {name: probe.get_submodule(name).weight for name in found}
    gradients = {name: [] for name in found}
    for loss in double_losses(probe)():
        for name, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            gradients[name].append(g.numpy())
    return model, {
        name: (w.detach().numpy(), torch.cat(seen[name]).numpy(), gradients[name]) for name, w in weights.items()
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_weights_equal_the_papers_formulas(arch):
    """On every family: FWSVD in the paper's convention W (in, out), ASVD with S^-1; SVD-LLM by its output error."""
    (model, layers), built = explicit(arch), {}
    for cls in (Fwsvd, Asvd, SvdLlm):
        built[cls] = copy.deepcopy(model)
        recombine.apply(built[cls], cls(targets=ALL, rank=7), losses=double_losses(built[cls]))
    for name, (w, x, gradients) in layers.items():
        now = {cls: m.get_submodule(name).dense_weight().numpy() for cls, m in built.items()}
        importance = np.sqrt(np.mean([g**2 for g in gradients], 0).sum(0))  # of each input: a row of the paper's W
        u, s, vh = scipy.linalg.svd(importance[:, None] * w.T, full_matrices=False)
        papers = (((u[:, :7] / importance[:, None]) * s[:7]) @ vh[:7]).T
        assert np.linalg.norm(now[Fwsvd] - papers) <= 1e-8 * np.linalg.norm(w)
        magnitude = np.sqrt(np.abs(x).mean(0))
        u, s, vh = scipy.linalg.svd(w * magnitude, full_matrices=False)
        papers = (u[:, :7] * s[:7]) @ vh[:7] / magnitude
        assert np.linalg.norm(now[Asvd] - papers) <= 1e-8 * np.linalg.norm(w)
        agrees(np.linalg.norm((w - now[SvdLlm]) @ x.T), tail(w @ x.T, 7), np.linalg.norm(w) * np.linalg.norm(x))


def test_weighted_methods_without_weights_are_the_plain_svd():
    plain = recombine.apply(build("tiny_vit"), Svd(targets=ALL, rank=9))
    flat = build("tiny_vit")
    recombine.apply(flat, Asvd(targets=ALL, rank=9, alpha=0.0), losses=losses(flat))
    for name in plain.recombined.targets:
        a, b = (m.get_submodule(name) for m in (plain, flat))
        assert torch.allclose(a.dense_weight(), b.dense_weight(), atol=1e-6)
        assert torch.allclose(a.right.norm(dim=1), b.right.norm(dim=1), atol=1e-5)  # the same balance
