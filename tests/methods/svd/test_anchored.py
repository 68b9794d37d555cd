"""Anchored layers against least squares in float64 from explicit inputs of both models."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch

import recombine
from helpers import ALL, refusal
from helpers.weighted import double_losses
from recombine import Asvd, BasisSharing, KfacSvd, SvdLlm
from recombine.core.drift import groups_of
from recombine.core.rewrite import find_sites
from recombine.methods.svd import anchored
from recombine.methods.svd.anchored import correction, least, share, target
from recombine.models import roles
from zoo import build

RANK = 7


@pytest.fixture(autouse=True)
def no_ridge(monkeypatch):
    """The plain optimum; the spectra of tiny random models fall below the ridge."""
    monkeypatch.setattr(anchored, "RIDGE", 1e-13)


def inputs(model, losses, names):
    """{name: (tokens, n)} of all batches, without padding."""
    seen, masks = {name: [] for name in names}, []

    def keep(name):
        def hook(_, args):
            x, mask = args[0], masks[-1]  # relative positions, which are no tokens, have another shape
            seen[name].append((x if mask is None or mask.shape != x.shape[:2] else x[mask.bool()]).flatten(0, -2))

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    hooks.append(
        model.register_forward_pre_hook(
            lambda _, a, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
        )
    )
    with torch.no_grad():
        for _ in losses():
            pass
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).numpy() for name, parts in seen.items()}


def steps(arch, method):
    """(layer, W, x, z) of every layer of a model that the method compressed, and the compressed model."""
    dense = build(arch).double()
    model = copy.deepcopy(dense)
    recombine.apply(model, method, losses=double_losses(model))
    roles.split_fused(dense, ALL)
    names = [[site.name for site in group] for group in groups_of(find_sites(dense, method))]
    original, run = inputs(dense, double_losses(dense), sum(names, [])), copy.deepcopy(dense)
    for group in names:
        found = inputs(run, double_losses(run), group)
        for name in group:
            w = dense.get_submodule(name).weight.detach().numpy()
            yield model.get_submodule(name), w, original[name], found[name]
            run.set_submodule(name, model.get_submodule(name))


def best(y, z, rank):
    """The least |y - z M^T| of all M of that rank: what no M reaches, and the tail of what the best one gives.

    Directions of z below 1e-6 of the largest are left out: E[z z^T] squares them, beyond float64.
    """
    fit = z @ np.linalg.lstsq(z, y, rcond=1e-6)[0]
    tail = scipy.linalg.svd(fit, compute_uv=False, lapack_driver="gesvd")[rank:]  # gesdd may not converge
    return np.sqrt(np.linalg.norm(y - fit) ** 2 + (tail**2).sum())


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_llama", "tiny_deberta", "tiny_swin"])
def test_a_layer_is_the_best_of_its_rank_for_what_the_original_gives(arch):
    """By lstsq and an SVD, with x of the original model and z of the model as far as it is compressed."""
    drifted = 0
    for layer, w, x, z in steps(arch, SvdLlm(targets=ALL, rank=RANK, refit="anchored")):
        y, rank = x @ w.T, min(RANK, *w.shape)
        error = np.linalg.norm(y - z @ layer.dense_weight().detach().numpy().T)
        assert error <= best(y, z, rank) * (1 + 1e-4) + 1e-9 * np.linalg.norm(y)
        drifted += not np.allclose(x, z)
    assert drifted


@pytest.mark.parametrize(
    "method", [Asvd(rank=RANK), BasisSharing(rank=RANK, shared=("qkv", "up"))], ids=["asvd", "basis"]
)
def test_where_the_right_factor_is_the_methods_own_left_is_least_squares(method):
    for layer, w, x, z in steps("tiny_llama", method.copy(targets=ALL, refit="anchored")):
        y, seen = x @ w.T, z @ layer.right.detach().numpy().T
        least_error = np.linalg.norm(y - seen @ np.linalg.lstsq(seen, y, rcond=1e-6)[0])
        error = np.linalg.norm(y - seen @ layer.left.detach().numpy().T)
        assert error <= least_error * (1 + 1e-4) + 1e-9 * np.linalg.norm(y)


def test_kfac_weighs_the_outputs_too():
    """At equal weights of outputs it is SVD-LLM's; at those of the gradients it is not."""
    weights = []
    for method in (SvdLlm(), KfacSvd(shrink_outputs=1.0, shrink_inputs=0.0), KfacSvd(shrink_inputs=0.0)):
        model = build("tiny_llama").double()
        chosen = method.copy(targets=ALL, rank=RANK, refit="anchored")
        recombine.apply(model, chosen, losses=double_losses(model))
        weights.append([model.get_submodule(name).dense_weight() for name in model.recombined.targets])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*weights[:2], strict=True))
    assert not torch.allclose(weights[0][0], weights[2][0], atol=1e-4)


def moments(seed, n=9, tokens=60):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, n)) @ rng.standard_normal((n, tokens))
    z = x + 0.4 * rng.standard_normal((n, n)) @ np.tanh(x) / n
    return x, z, (torch.from_numpy(x @ z.T / tokens), torch.from_numpy(z @ z.T / tokens))


@pytest.mark.parametrize("seed", range(5))
def test_the_mix_is_least_squares(seed):
    """The target of SAES-SVD (Eq. 13) from explicit inputs."""
    x, z, found = moments(seed)
    w = np.random.default_rng(seed + 50).standard_normal((6, len(x)))
    aim = target(torch.from_numpy(w), found, (0.4, 0.4), 3).numpy()
    mixed = np.linalg.lstsq(z.T, (0.6 * w @ z + 0.4 * w @ x).T, rcond=None)[0].T
    assert np.allclose(aim, mixed, atol=1e-4)


@pytest.mark.parametrize("ridge", [1e-13, 1e-2, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_share_of_the_mix_loses_least(seed, ridge, monkeypatch):
    """b of SAES-SVD, by explicit roots, subspaces and a fine grid (Eq. 17 to 19), at every ridge."""
    monkeypatch.setattr(anchored, "RIDGE", ridge)
    x, _, found = moments(seed)
    w, rank = np.random.default_rng(seed + 50).standard_normal((6, len(x))), 3
    weight = torch.from_numpy(w)
    cross, own = (m.numpy() for m in found)
    values, vectors = np.linalg.eigh(own)
    root = vectors * np.sqrt(values) @ vectors.T
    ridged = own + ridge * own.trace() / len(own) * np.eye(len(own))
    s, g = w @ root, w @ np.linalg.solve(ridged, (cross - own).T).T @ root
    u, _, vh = np.linalg.svd(s)
    p, q = np.eye(6) - u[:, :rank] @ u[:, :rank].T, np.eye(len(x)) - vh[:rank].T @ vh[:rank]

    def lost(b):
        return (np.linalg.norm(p @ (s + b * g) @ q) / np.linalg.norm(s + b * g)) ** 2

    step = correction(weight, found)
    for low, high in ((0.0, 1.0), (0.25, 0.75), (-40.0, 40.0)):  # the last one holds a root
        b = share(weight, step, found, (low, high), rank)
        grid = np.linspace(low, high, 4001)
        assert low <= b <= high
        assert lost(b) <= min(map(lost, grid)) + 1e-9


def test_the_least_ratio_is_at_a_root_or_a_bound():
    assert least(1, -1, 1, 1, 0, 0, 0, 3) == pytest.approx(1)  # (1 - t)^2
    assert least(1, 0, 0, 1, 1, 0, 0, 3) == 3  # 1 / (1 + 2 t)
    assert least(0, 0, 0, 0, 0, 0, 0.2, 0.7) == 0.2  # nothing to lose


def test_no_drift_is_svd_llm():
    """Of the first layers both are the same; what has no inputs stays finite."""
    _, z, (_, own) = moments(0)
    w = torch.from_numpy(np.random.default_rng(1).standard_normal((6, len(z))))
    assert torch.equal(target(w, (own, own), (1.0, 1.0), 3), w)
    nothing = torch.zeros_like(own)
    assert torch.equal(target(w, (nothing, nothing), (0.0, 1.0), 3), w)


@pytest.mark.parametrize(
    "bad", [{"refit": "later"}, {"anchor": (0.5,)}, {"anchor": (0.8, 0.2)}, {"anchor": (0.0, 2.0)}]
)
def test_bad_fields_are_one_line(bad):
    (field,) = bad
    message = refusal(recombine.apply, build("tiny_llama"), SvdLlm(**bad), losses=lambda: iter(()))
    assert message.startswith(f"method.{field}=")


def test_the_bounds_hold_pairs():
    """One pair of layers after the other: a smaller b moves the target less."""
    w = torch.from_numpy(np.random.default_rng(3).standard_normal((6, 9)))
    found = moments(2)[2]
    moves = [float((target(w, found, (b, b), 3) - w).norm()) for b in (0.0, 0.25, 0.75, 1.0)]
    assert moves[0] == 0 and all(a < b for a, b in pairwise(moves))
