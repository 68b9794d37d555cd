"""CRISP and RECAST: every fit against an oracle of its own, gates and placements, penalties, and the paper's counts."""

import itertools
import math
from dataclasses import asdict

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
import torch.nn.functional as F
from torch import nn
from zoo import batch, build, losses, outputs

import recombine
from recombine import Crisp, Recast
from recombine.core.rewrite import find_sites
from recombine.layers import SharedBasisLinear
from recombine.layers.shared_basis import GATES, PLACEMENTS
from recombine.linalg import GELU_MIN, gelu_inverse, shrink
from recombine.methods.crisp import activation_aware
from recombine.methods.crisp.activation_aware import fit_outputs, solve_basis, solve_mixer
from recombine.methods.crisp.closed_form import random_orthogonal, truncate, ungate
from recombine.methods.crisp.clustering import Cluster, kmeans, merge
from recombine.methods.crisp.mimicry import INITS, LOSSES, Mimicry, mimic
from recombine.methods.crisp.refinement import Refine, refine
from recombine.methods.crisp.regularizers import PENALTIES

M, N, S = 12, 16, 4  # a weight and its chunk


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group(count=2, scale=0.05, seed=0):
    """Weights (M, N) with decaying spectra, at the scale of pretrained ones, and M = [M_1 ... M_g]."""
    weights = [scale * randn(M, N, seed=seed + i) * torch.logspace(0, -1, N) for i in range(count)]
    return weights, torch.cat([w.reshape(-1, S) for w in weights], 1)


def tail(m, rank):
    """The error of the best approximation of that rank (Eckart & Young), as a share of |m|."""
    s = scipy.linalg.svdvals(m.numpy())
    return math.sqrt((s[rank:] ** 2).sum() / (s**2).sum())


def share(built, m):
    return ((built - m).norm() / m.norm()).item()


# Layer


@pytest.mark.parametrize("gate, placement", list(itertools.product(GATES, PLACEMENTS)))
def test_layer_applies_the_map(gate, placement):
    """Against numpy, both forwards and their gradients, and through a checkpoint's spec."""
    basis, mixer, x = randn(M * N // S, 3), randn(3, S, seed=1), randn(5, 7, N, seed=2)
    phi = {
        "silu": lambda a: a / (1 + np.exp(-a)),
        "gelu": lambda a: a * (1 + np.vectorize(math.erf)(a / 2**0.5)) / 2,
        "relu": lambda a: np.maximum(a, 0),
        "none": lambda a: a,
    }[gate]
    b, a = basis.numpy(), mixer.numpy()
    weight = {"pre": b @ phi(a), "post": phi(b @ a), "temp": phi(b) @ a}[placement].reshape(M, N)
    layer = SharedBasisLinear(basis, mixer, N, gate, None, placement).requires_grad_(True)
    assert np.allclose(layer.dense_weight().detach().numpy(), weight)
    results = []
    for cheap in (0, 1):
        layer.flops = lambda tokens, train, c=cheap: (c, 1 - c, 0)
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [layer.basis, layer.mixer])))
        with torch.no_grad():
            assert torch.allclose(layer.eval()(x), y) and torch.allclose(layer(x), y)
        layer.train()
    assert np.allclose(results[0][0].detach().numpy(), x.numpy() @ weight.T)
    assert all(torch.allclose(p, q) for p, q in zip(*results, strict=True))
    again = SharedBasisLinear.empty(**layer.spec()).double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dense_weight(), layer.dense_weight())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("tokens", [1, 1000])
def test_flops_rule_counts_what_runs(placement, tokens):
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = SharedBasisLinear(torch.randn(24, 3), torch.randn(3, 4), 8, placement=placement), torch.randn(tokens, 8)
    with FlopCounterMode(display=False) as counted:
        layer.factored_forward(x)
    assert counted.get_total_flops() == 2 * layer.flops(tokens, False)[0]


# Closed form


def test_gelu_inverse_is_exact():
    y = torch.cat([torch.linspace(-0.1699, 0.2, 5001), torch.arange(30)]).double()
    y = torch.cat([y, torch.tensor([GELU_MIN], dtype=torch.float64)])
    x = gelu_inverse(y)
    assert torch.allclose(F.gelu(x), y, atol=1e-12) and x.min() >= -0.7518


@pytest.mark.parametrize("gate, gauge", list(itertools.product(["silu", "gelu", "none"], ["svd", "balanced"])))
def test_a_gauge_changes_nothing_but_the_gauge(gate, gauge):
    """For any rows, not only orthogonal ones; dead and constant ones too."""
    basis, gated = randn(20, 5), 100 * randn(5, 8, seed=1)
    gated[1], gated[2], gated[3] = 0, 1, -1e-9
    b, a = ungate(basis, gated, gate, gauge)
    assert torch.isfinite(a).all() and torch.allclose(b @ GATES[gate](a), basis @ gated, atol=1e-9)


@pytest.mark.parametrize("fit", ["aware", "cluster", "random", "closed"])
@pytest.mark.parametrize("gate, placement", [("relu", "pre"), ("silu", "post"), ("gelu", "temp")])
def test_what_has_no_inverse_needs_mimicry(fit, gate, placement):
    with pytest.raises(recombine.UsageError, match=r"^[^\n]*mimicry[^\n]*$"):
        recombine.apply(build("tiny_vit"), Crisp(chunk=8, fit=fit, gate=gate, placement=placement))


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_truncated_teacher_is_the_compressed_weight(rank):
    """What CRISP calls the top eigenvectors of the teacher's A and B, in a form that no gauge changes."""
    for gauge, chunk in itertools.product(("svd", "balanced"), (8, 16)):
        teacher = recombine.apply(build("tiny_vit").double(), Crisp(chunk=chunk, gauge=gauge))  # exact
        student = recombine.apply(recombine.merge(teacher), Crisp(chunk=8, basis_rank=rank))
        direct = recombine.apply(build("tiny_vit").double(), Crisp(chunk=8, basis_rank=rank))
        for name in direct.recombined.targets:
            ours, theirs = (model.get_submodule(name).dense_weight() for model in (student, direct))
            assert torch.allclose(ours, theirs, atol=1e-9)


def test_random_start_has_the_scale_and_nothing_else():
    _, m = group()
    basis, rows = random_orthogonal(m, 5, torch.Generator().manual_seed(0))
    assert torch.allclose((basis @ rows).norm(), m.norm())
    assert torch.allclose(rows @ rows.T, torch.eye(5).double(), atol=1e-12)
    gram = basis.T @ basis
    assert torch.allclose(gram, gram[0, 0] * torch.eye(5).double(), atol=1e-12 * gram[0, 0].item())
    method = Crisp(chunk=8, fit="random")
    one, two = (recombine.apply(build("tiny_vit"), method).state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)  # the run's seed and nothing else


# Mimicry


@pytest.mark.parametrize("loss, init", [*itertools.product(LOSSES, ["orthogonal"]), *(("mse", i) for i in INITS)])
def test_mimicry_ends_at_the_truncated_svd(loss, init):
    weights, m = group()
    how, rng = Mimicry(loss=loss, init=init), torch.Generator().manual_seed(0)
    basis, mixer, reached = mimic(weights, 4, S, "silu", "pre", how, rng)
    built = (basis @ F.silu(mixer)).double()
    if loss == "l1":  # another optimum
        svd_built = torch.matmul(*truncate(m, 4))
        assert (built - m).abs().sum() < (svd_built - m).abs().sum()
    else:
        assert share(built, m) <= 1.02 * tail(m, 4)
    again = sum(LOSSES[loss](b, w) for b, w in zip(built.split(S, 1), m.split(S, 1), strict=True))
    assert reached == pytest.approx(again.item(), rel=1e-4)


@pytest.mark.parametrize("gate, placement", list(itertools.product(GATES, PLACEMENTS)))
def test_mimicry_fits_every_gate_in_every_place(gate, placement):
    """ReLU as badly as the paper says: what starts at 0 stays there, and after it no weight is negative."""
    weights, m = group()
    basis, mixer, _ = mimic(weights, 8, S, gate, placement, Mimicry(), torch.Generator().manual_seed(0))
    built = PLACEMENTS[placement](basis, mixer, GATES[gate]).double()
    assert share(built, m) < (0.9 if gate == "relu" else 0.02)


def test_mimicry_starts_from_the_basis_that_is_asked_for():
    """With no step that is taken the best iterate is the start: RECAST's Kaiming templates, or N(0, 0.01^2)."""
    weights, _ = group()
    for basis, size in (("normal", 0.01), ("kaiming", (6 / 4) ** 0.5 / 3**0.5)):
        found = mimic(weights, 4, S, "silu", "pre", Mimicry(basis=basis, steps=1), torch.Generator().manual_seed(0))[0]
        assert found.std().item() == pytest.approx(size, rel=0.1)


def test_mimicry_is_deterministic():
    method = Crisp(chunk=8, basis_rank=5, fit="mimicry", mimicry=Mimicry(steps=20))
    one, two = (recombine.apply(build("tiny_vit"), method).state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_options_survive_as_plain_dicts():
    method = Crisp(mimicry=Mimicry(loss="l1"), cluster=Cluster(printed=True), fit="mimicry")
    assert Crisp(**asdict(method)) == method
    for options in ({"loss": "l3"}, {"steps": 0}, {"init": "zeros"}, {"lr": -1}):
        with pytest.raises(recombine.UsageError, match=rf"^method.mimicry.{next(iter(options))}=[^\n]*$"):
            recombine.apply(build("tiny_vit"), Crisp(chunk=8, mimicry=Mimicry(**options)))


# Activation-aware


def inputs(count=2, tokens=40, seed=50):
    """X (tokens, N) with correlated, uneven columns, and E[x x^T], for every layer."""
    xs = [
        randn(tokens, N, seed=seed + i) @ (randn(N, N, seed=seed + 10 + i) * torch.logspace(0, -2, N))
        for i in range(count)
    ]
    return xs, [x.T @ x / tokens for x in xs]


def output_error(weights, built, moments):
    """sum_i E|W_i x - W'_i x|^2 / E|W_i x|^2"""
    each = [((w - b) @ c * (w - b)).sum() / (w @ c * w).sum() for w, b, c in zip(weights, built, moments, strict=True)]
    return sum(each).item()


def compose(basis, gated):
    """W'_i (M, N) from B (M N / S, r) and [G_1 ... G_g] (r, g S)."""
    return [(basis.reshape(-1, basis.shape[-1]) @ g).reshape(M, N) for g in gated.split(S, 1)]


def test_both_steps_are_least_squares(monkeypatch):
    """Against numpy's lstsq on the tokens themselves; the mixer's after enough conjugate gradients."""
    weights, (xs, moments), r, q = group()[0], inputs(), 3, N // S
    gated, shares = [randn(r, S, seed=i) for i in (1, 2)], [0.7, 2.0]
    outs = [w @ c for w, c in zip(weights, moments, strict=True)]
    basis = solve_basis(outs, moments, shares, gated)
    features = [(x.reshape(-1, q, S) @ g.T).flatten(1) for x, g in zip(xs, gated, strict=True)]  # (tokens, q r)
    a = np.concatenate([math.sqrt(p) * f.numpy() for p, f in zip(shares, features, strict=True)])
    y = np.concatenate([math.sqrt(p) * (x @ w.T).numpy() for p, x, w in zip(shares, xs, weights, strict=True)])
    assert np.allclose(basis.flatten(1).numpy().T, np.linalg.lstsq(a, y, rcond=None)[0], atol=1e-8)

    monkeypatch.setattr(activation_aware, "STEPS", 60)
    columns = torch.einsum("maf,tae->tmfe", basis, xs[0].view(-1, q, S)).reshape(-1, r * S)  # d y_m / d G_fe
    oracle = np.linalg.lstsq(columns.numpy(), (xs[0] @ weights[0].T).reshape(-1).numpy(), rcond=None)[0]
    solved = solve_mixer(basis, outs[0], moments[0], gated[0])
    assert np.allclose(solved.reshape(-1).numpy(), oracle, atol=1e-6 * np.abs(oracle).max())


def test_alternations_only_help_and_beat_the_truncation():
    weights, m = group()
    moments = inputs()[1]
    errors = [output_error(weights, compose(*fit_outputs(weights, moments, 4, S, k)), moments) for k in (0, 1, 3, 10)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    assert errors[0] < 0.7 * output_error(weights, compose(*truncate(m, 4)), moments)


def test_a_chunk_as_wide_as_the_layer_is_the_whitened_svd():
    (w,), (c,) = group(1)[0], inputs(1)[1]
    basis, gated = fit_outputs([w], [c], 3, N, 0)
    s = scipy.linalg.svdvals((w @ torch.linalg.cholesky(c)).numpy())
    error = output_error([w], [basis @ gated], [c])
    assert error == pytest.approx((s[3:] ** 2).sum() / (s**2).sum(), rel=1e-6)


def test_aware_is_exact_at_full_size():
    weights, _ = group()
    moments = [shrink(c, 0.0, 40, floor=0.01) for c in inputs()[1]]
    for built, w in zip(compose(*fit_outputs(weights, moments, 2 * S, S, 2)), weights, strict=True):
        assert torch.allclose(built, w, atol=1e-9)


def test_aware_bears_degenerate_weights_and_inputs():
    x = randn(9, N)
    for w, c in itertools.product(
        (torch.zeros(M, N).double(), torch.ones(M, N).double(), 1e-12 * randn(M, N), torch.eye(M, N).double()),
        (torch.zeros(N, N).double(), x[:1].T @ x[:1], x.T @ x, torch.eye(N).double(), 1e9 * x[:2].T @ x[:2]),
    ):
        c = shrink(c, c.diagonal().sum().square(), 9, floor=0.01)
        basis, gated = fit_outputs([w, randn(M, N)], [c, x.T @ x + torch.eye(N)], 3, S, 3)
        assert basis.isfinite().all() and gated.isfinite().all()
        b, a = ungate(basis, gated, "silu", "svd")
        assert b.isfinite().all() and torch.allclose(b @ F.silu(a), basis @ gated, atol=1e-8)


def test_aware_changes_outputs_less():
    def distance(**fields):
        model = build("tiny_vit")
        x, before = batch(model), outputs(model, batch(model))
        recombine.apply(model, Crisp(chunk=16, **fields), "retained_60", losses(model))
        return (outputs(model, x) - before).square().mean().item()

    assert distance(fit="aware") < 0.6 * distance()


# Clustering


def test_kmeans_finds_separate_clusters_and_bears_equal_points():
    points = torch.cat([5 * torch.eye(3).double()[i] + 0.1 * randn(4, 3, seed=i) for i in range(3)])
    label = kmeans(points, torch.tensor([2.0, 1, 1, 1] * 3).double(), 3)
    assert [len(set(label[i : i + 4].tolist())) for i in (0, 4, 8)] == [1, 1, 1] and len(set(label.tolist())) == 3
    assert kmeans(torch.zeros(5, 2).double(), torch.zeros(5).double(), 3).tolist() == [0] * 5


@pytest.mark.parametrize("rank", [2, 5, 8])
def test_cluster_lies_between_two_truncations(rank):
    """From the SVD's columns it keeps the r - 1 heaviest and merges the rest into one: never better than rank r."""
    _, m = group()
    basis, rows = merge(*truncate(m, m.shape[1]), m, rank, Cluster())
    error = share(basis @ rows, m)
    assert tail(m, rank) - 1e-9 <= error <= tail(m, rank - 1) + 1e-9
    if rank == m.shape[1]:
        assert error < 1e-6


def test_cluster_has_no_gauge_and_the_printed_form_has():
    _, m = group()
    mix, scale = randn(8, 8), torch.tensor([1.0, -3, 0.1, 7, -1, 2, 0.5, 11]).double()
    basis, rows = (t.double() for t in truncate(m, 8))
    basis, rows = basis @ torch.linalg.inv(mix), mix @ rows  # a teacher as mimicry finds it: no orthogonal columns
    for resolve in (True, False):
        how = [Cluster(printed=p, resolve=resolve) for p in (False, True)]
        one = [b @ r for b, r in (merge(basis, rows, m, 3, h) for h in how)]
        two = [b @ r for b, r in (merge(basis / scale, rows * scale[:, None], m, 3, h) for h in how)]
        assert torch.allclose(one[0], two[0]) and not torch.allclose(one[1], two[1], rtol=1e-3)
        assert share(one[0], m) >= tail(m, 3)


def test_cluster_steps_by_hand():
    """Two equal columns become one: powers kept, coefficients summed, and least squares finds the same."""
    basis = torch.tensor([[3.0, 3.0, 0.0], [0.0, 0.0, 1.0]]).double()
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    for resolve in (False, True):
        b, g = merge(basis, rows, basis @ rows, 2, Cluster(resolve=resolve))
        assert torch.allclose(b @ g, basis @ rows)
    zero = torch.zeros(4, 3).double()
    assert all(t.isfinite().all() for t in merge(zero, rows, zero @ rows, 2, Cluster()))


def test_cluster_as_printed_halves_what_is_gated():
    """Least squares on ungated mixers: silu(x) is about x / 2, so half of the weight is lost."""

    def error(**fields):
        model = build("tiny_vit")
        method = Crisp(chunk=8, basis_rank=12, fit="cluster", cluster=Cluster(printed=True), **fields)
        recombine.apply(model, method)
        dense = build("tiny_vit")
        return min(
            share(model.get_submodule(n).dense_weight().detach(), dense.get_submodule(n).weight.detach())
            for n in model.recombined.targets
        )

    assert error(gate="none") < 0.4 < error(gate="silu")


# Refinement


def test_refine_trains_weights_and_task_then_freezes_the_basis():
    dense = build("tiny_vit")

    def measure(**options):
        model = build("tiny_vit")
        method = Crisp(chunk=8, basis_rank=8, refine=options)
        recombine.apply(model, method, losses=losses(model))
        names = model.recombined.targets
        errors = [share(model.get_submodule(n).dense_weight(), dense.get_submodule(n).weight) ** 2 for n in names]
        with torch.no_grad():
            task = torch.stack(list(losses(model)())).mean().item()
        assert {n.rpartition(".")[2] for n in model.recombined.trainable if "blocks" in n} == {"mixer"}
        assert all(p.grad is None for p in model.parameters())
        return sum(errors) / len(errors), task

    start, task = measure(steps=0)
    assert measure(steps=30, task=1.0, weight=0.0)[1] < task
    assert measure(steps=30, task=0.0, weight=1.0)[0] < start + 1e-4  # it starts at the optimum of the weights
    with pytest.raises(recombine.UsageError, match="calibrates"):
        recombine.apply(build("tiny_vit"), Crisp(chunk=8, refine={"steps": 1}))
    with pytest.raises(recombine.UsageError, match="at least one"):
        recombine.apply(build("tiny_vit"), Crisp(chunk=8, refine={"steps": 1}), losses=lambda: [])


@pytest.mark.parametrize("relative", [True, False])
def test_refine_descends_the_errors_it_names(relative, monkeypatch):
    """One plain gradient step: of sum |W - W'|^2 as Alg. 5 prints it, or of the mean of |W - W'|^2 / |W|^2."""
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    torch.manual_seed(0)
    layers = [SharedBasisLinear(torch.randn(12, 3), torch.randn(3, 4), 8) for _ in range(2)]
    goals = [10.0**i * torch.randn(6, 8) for i in range(2)]
    parts = [[p.detach().clone().requires_grad_() for p in (layer.basis, layer.mixer)] for layer in layers]
    errors = [((b @ F.silu(a)).view(6, 8) - w).square().sum() for (b, a), w in zip(parts, goals, strict=True)]
    if relative:
        errors = [error / w.square().sum() / 2 for error, w in zip(errors, goals, strict=True)]
    sum(errors).backward()
    losses = lambda: iter([torch.zeros((), requires_grad=True)])  # noqa: E731
    refine(list(zip(layers, goals, strict=True)), losses, Refine(steps=1, lr=1e-3, task=0.0, relative=relative))
    for layer, (b, a) in zip(layers, parts, strict=True):
        for p, start in ((layer.basis, b), (layer.mixer, a)):
            assert torch.allclose(p, start - 1e-3 * start.grad, atol=1e-5, rtol=1e-4)


# Penalties of the mixers (Tab. 4)


@pytest.mark.parametrize("r, s", [(3, 8), (8, 3)])
@pytest.mark.parametrize("gate", ["silu", "none"])
def test_penalties_are_their_formulas(r, s, gate):
    layer = SharedBasisLinear(randn(16, r), randn(r, s, seed=1), 2 * s, gate)
    layer.mixer.requires_grad_(True)
    a = layer.mixer.detach().clone().requires_grad_(True)
    g = a * torch.sigmoid(a) if gate == "silu" else a
    d, k = min(r, s), g @ g.T if r < s else g.T @ g
    v = torch.ones(s).double()
    for _ in range(2000):  # power iteration
        v = F.normalize(a.detach().T @ (a.detach() @ v), dim=0)
    u = F.normalize(a.detach() @ v, dim=0)
    formulas = {
        "l2": (a * a).sum(),
        "orthogonal": ((k * d / torch.trace(k) - torch.eye(d).double()) ** 2).sum() / d,
        "spectral": u @ a @ v,
    }
    assert formulas.keys() == PENALTIES.keys()
    for name, formula in formulas.items():
        value = PENALTIES[name](layer)
        ours, theirs = torch.autograd.grad(value, layer.mixer)[0], torch.autograd.grad(formula, a, retain_graph=True)[0]
        assert torch.allclose(value, formula) and torch.allclose(ours, theirs, atol=1e-9)


def test_penalty_counts_what_trains():
    model = recombine.apply(build("tiny_vit"), Crisp(chunk=8))
    for name in ("none", *PENALTIES):
        assert Crisp(regulariser=name, strength=0).penalty(model) == 0.0
    mixers = [m.mixer for m in model.modules() if isinstance(m, SharedBasisLinear)]
    expected = 0.5 * sum(m.square().sum() for m in mixers)
    assert torch.allclose(Crisp(regulariser="l2", strength=0.5).penalty(model), expected)
    orthonormal = SharedBasisLinear(randn(16, 4), 7 * nn.init.orthogonal_(torch.empty(4, 8)).double(), 16, "none")
    assert PENALTIES["orthogonal"](orthonormal) < 1e-10
    model.requires_grad_(False)
    assert Crisp(regulariser="l2").penalty(model) == 0.0


# RECAST


def test_recast_is_the_mean_of_its_coefficient_sets():
    model = build("tiny_vit")
    recombine.apply(model, Recast())
    fc1 = [model.get_submodule(f"blocks.{i}.mlp.fc1") for i in (0, 1)]
    assert fc1[0].mixer.shape == (2, 1) and fc1[0].basis is fc1[1].basis  # one vector of r coefficients
    templates = fc1[0].basis.detach().T.reshape(2, *fc1[0].dense_weight().shape)
    sets = fc1[0].mixer.detach().T + torch.randn(3, 2)
    sets += fc1[0].mixer.detach().T - sets.mean(0)
    folds = sum(torch.einsum("t,tmn->mn", a, templates) for a in sets) / len(sets)
    assert torch.allclose(folds, fc1[0].dense_weight(), atol=1e-5)


def test_recast_compresses_to_the_closest_template():
    model, dense = build("tiny_vit"), build("tiny_vit")
    recombine.apply(model, Recast(), "retained_50")
    assert model.recombined.steps[0].fields["basis_rank"] == 1 and recombine.count(model).retained < 0.501
    names = ["blocks.2.attn.proj", "blocks.3.attn.proj"]
    both = np.stack([dense.get_submodule(n).weight.detach().double().flatten().numpy() for n in names])
    u, s, v = np.linalg.svd(both, full_matrices=False)
    for i, name in enumerate(names):
        built = model.get_submodule(name).dense_weight().detach().flatten().numpy()
        assert np.allclose(built, s[0] * u[i, 0] * v[0], atol=1e-6)
    for fields in ({"chunk": 2}, {"gate": "silu"}):
        with pytest.raises(recombine.UsageError, match="method=crisp"):
            recombine.apply(build("tiny_vit"), Recast(**fields))


# The paper's counts


def shapes(arch, **fields):
    """(the model without memory, the method's sites, parameters of all else)."""
    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=1000)
    sites = find_sites(model, Crisp(**fields))
    return sites, sum(p.numel() for p in model.parameters()) - sum(s.module.weight.numel() for s in sites)


SPLIT = ("q", "k", "v", "o", "up", "down")


@pytest.mark.parametrize(
    "label, printed, fused, split",
    [  # Fig. 5 swaps r and s of Eq. 4: its s counts the columns of the basis, its r is the chunk's length
        ((8, 16), 22.1, 22.06, 22.06),
        ((64, 16), 3.5, 3.52, 3.55),
        ((16, 8), 6.1, 6.13, 6.14),
        ((16, 32), 22.1, 22.08, 22.09),
        ((16, 64), 43.4, 43.33, 43.36),
        ((32, 16), 6.0, 6.15, 6.16),
    ],
)
def test_totals_of_figure_5(label, printed, fused, split):
    for targets, total in ((("qkv", "o", "up", "down"), fused), (SPLIT, split)):
        sites, rest = shapes("vit_small_patch16_224", targets=targets, chunk=1)
        method = OverComplete(chunk=label[0], basis_rank=label[1], group_size=2)
        millions = (method.sizes(sites)[0] + rest) / 1e6
        assert millions == pytest.approx(total, abs=0.006) and millions == pytest.approx(printed, abs=0.2)


class OverComplete(Crisp):
    """(16, 64) has more columns than group_size * chunk: only the figure has use for that."""

    def group_rank(self, group):
        return self.basis_rank


@pytest.mark.parametrize("ratio, bases, total", [(0.5, 42.47, 44.10), (0.25, 21.23, 22.87)])
def test_compressed_totals_of_vit_b(ratio, bases, total):
    """CRISP Tab. 2 and 9: 44M counts all; 21M, the bases alone."""
    sites, rest = shapes("vit_base_patch16_224")
    stored, mixers = Crisp(basis_rank=int(64 * ratio)).sizes(sites)
    assert (stored - mixers) / 1e6 == pytest.approx(bases, abs=0.006)
    assert (stored - mixers + rest) / 1e6 == pytest.approx(total, abs=0.006) and mixers < 1e5


def test_trainable_parameters_of_table_1():
    sites, _ = shapes("vit_small_patch16_224")
    assert Crisp().sizes(sites)[1] == 98_304  # 4.5e-3 of the model
    assert Crisp(chunk=8).sizes(sites)[1] == 48 * 128  # fewer than 200 a layer
    assert Recast().sizes(sites)[1] == 48 * 2
