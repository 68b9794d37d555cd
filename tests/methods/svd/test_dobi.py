"""Dobi-SVD: soft truncation, its gradient, and the ranks it learns."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import recombine
from helpers import ALL
from helpers.weighted import double_losses, learnt
from recombine import DobiSvd
from recombine.core.rewrite import calibrate, find_sites
from recombine.methods.allocation import round_to_budget
from recombine.methods.svd import dobi
from recombine.methods.svd.low_rank import dims
from recombine.methods.svd.soft_truncation import Truncation
from recombine.models import roles
from zoo import ARCHS, batch, build, losses


@pytest.mark.parametrize("arch", ARCHS)
def test_dobi_learns_ranks_that_lower_the_loss(arch):
    """The budget is kept exactly, the ranks leave the even ones, and the calibration loss falls below theirs."""

    def loss_of(method):
        model = build(arch)
        recombine.apply(model, method, losses=losses(model))
        with torch.no_grad():
            return sum(loss.item() for loss in losses(model)()), model.recombined.targets, model

    even, targets, first = loss_of(DobiSvd(targets=ALL, steps=0))
    value, _, model = loss_of(DobiSvd(targets=ALL))
    again = loss_of(DobiSvd(targets=ALL))[2]
    ranks = [[m.get_submodule(name).rank for name in targets] for m in (first, model, again)]
    assert ranks[1] == ranks[2] != ranks[0]
    assert value < even
    assert all(0.49 < recombine.count(m).retained <= 0.5 for m in (first, model))


def test_dobi_truncates_softly_as_it_will_for_good():
    """With a sharp gate between ranks k and k + 1 the hooks give what the rewritten model gives."""
    model = build("tiny_vit").double()
    method = DobiSvd(targets=ALL, beta=1e4)
    roles.split_fused(model, method.targets)
    sites = find_sites(model, method)
    calibrate(model, method, sites, double_losses(model), method.statistics_needed())
    method._ranks = [3 + i % 5 for i in range(len(sites))]
    real = torch.tensor([k + 0.5 for k in method._ranks], dtype=torch.float64)
    x = batch(model).double()
    with torch.no_grad():
        with method.softly(sites, lambda: real):
            soft = model(x)
        plain = model(x)
        method.rewrite(model, sites)
        assert torch.allclose(model(x), soft, atol=1e-10) and not torch.allclose(soft, plain, atol=1e-3)


@pytest.mark.parametrize("basis", ["pooled", "batch"])
def test_dobi_gradient_of_the_ranks(basis):
    """Against central differences, through the whole model; also through the SVD of each batch."""
    model = build("tiny_vit").double()
    method = DobiSvd(beta=0.5, basis=basis)
    roles.split_fused(model, method.targets)
    sites = find_sites(model, method)
    calibrate(model, method, sites, double_losses(model), method.statistics_needed())
    half = [0.5 * m * n / (m + n) for m, n in map(dims, sites)]
    real = torch.tensor(half, dtype=torch.float64, requires_grad=True)

    def total():
        return sum(double_losses(model)())

    with method.softly(sites, lambda: real):
        (exact,) = torch.autograd.grad(total(), real)
        with torch.no_grad():
            for i in (0, 5, len(sites) - 1):
                step = torch.zeros_like(real)
                step[i] = 1e-4
                real += step
                up = total()
                real -= 2 * step
                down = total()
                real += step
                assert exact[i].item() == pytest.approx((up - down).item() / 2e-4, rel=1e-5, abs=1e-8)


def test_learning_ranks_leaves_the_model_as_it_was():
    model = build("tiny_vit").train()
    before = copy.deepcopy(model.state_dict())
    method = DobiSvd(targets=ALL, steps=2)
    roles.split_fused(model, method.targets)
    sites = find_sites(model, method)
    calibrate(model, method, sites, losses(model), method.statistics_needed())
    method.after_budget(model, sites, losses(model))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(1 <= k <= method.max_rank(site) for k, site in zip(method._ranks, sites, strict=True))


def svd_truncated(y, gate):
    u, s, vh = torch.linalg.svd(y, full_matrices=False)
    return u @ torch.diag(s * F.pad(gate, (0, max(0, len(s) - len(gate))))[: len(s)]) @ vh


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 99), st.data())
def test_dobi_truncates_a_batch_by_its_svd_and_differentiates_it(tokens, m, seed, data):
    """Values and gradients, of y and of the gate, against autograd through torch's SVD, and finite differences."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(max(tokens, m), max(tokens, m), generator=generator, dtype=torch.float64))[0]
    count = min(tokens, m)
    y = (q[:tokens, :count] * torch.logspace(0, -1, count, dtype=torch.float64)) @ q[:m, :count].T
    y = y + 0.01 * torch.randn(tokens, m, generator=generator, dtype=torch.float64)
    gate = torch.rand(data.draw(st.integers(1, count)), generator=generator, dtype=torch.float64)
    y, gate = y.requires_grad_(), gate.requires_grad_()
    weight = torch.randn(tokens, m, generator=generator, dtype=torch.float64)
    values, grads = [], []
    for function in (Truncation.apply, svd_truncated):
        values.append(function(y, gate))
        grads.append(torch.autograd.grad((values[-1] * weight).sum(), (y, gate)))
    assert torch.allclose(*values, atol=1e-10)
    gaps = torch.linalg.svdvals(y.detach()).diff().abs().min()
    assert torch.allclose(grads[0][1], grads[1][1], atol=1e-8)
    if gaps > 1e-3:
        assert torch.allclose(grads[0][0], grads[1][0], atol=1e-6)
        assert torch.autograd.gradcheck(Truncation.apply, (y, gate), atol=1e-4)


@pytest.mark.parametrize("y", [torch.zeros(5, 4), torch.eye(4), torch.ones(3, 6), torch.eye(6)[:3]])
def test_dobi_truncation_bears_equal_singular_values(y):
    y = y.clone().requires_grad_()
    gate = torch.tensor([1.0, 0.7, 0.1], requires_grad=True)
    Truncation.apply(y, gate).square().sum().backward()
    assert y.grad.isfinite().all() and gate.grad.isfinite().all()


@pytest.mark.parametrize("unit, size", [("ratio", 0.03), ("rank", 2.0)])
def test_adam_moves_ratios_or_ranks(unit, size, monkeypatch):
    """The first step of Adam is the step size, in the unit that it moves."""
    found = []
    monkeypatch.setattr(
        dobi, "round_to_budget", lambda ranks, *more: found.append(ranks) or round_to_budget(ranks, *more)
    )
    method, sites = learnt(DobiSvd(targets=ALL, steps=1, unit=unit, step_size=size), build("tiny_vit"))
    shapes = torch.tensor([dims(site) for site in sites], dtype=torch.float64)
    one = shapes.sum(1) / shapes.prod(1)  # the ratio of one rank
    moved = (found[0] - 0.5 / one).abs() * (one if unit == "ratio" else 1)
    assert torch.allclose(moved, torch.full_like(moved, size), rtol=0.02)


def test_dobi_as_the_paper_has_it_lowers_the_loss():
    def loss_of(steps):
        model = build("tiny_vit")
        method = DobiSvd(targets=ALL, steps=steps, basis="batch", unit="rank", step_size=0.5, beta=0.3)
        recombine.apply(model, method, losses=losses(model))
        assert recombine.count(model).retained <= 0.5
        with torch.no_grad():
            return sum(loss.item() for loss in losses(model)())

    assert loss_of(30) < loss_of(0)


def test_the_switches_of_the_papers_code_move_ranks():
    """With its step and weight most ranks change by more than rounding; without them the run is refused."""
    code = {"targets": ALL, "basis": "batch", "unit": "rank", "beta": 10.0}
    model = build("tiny_vit")
    found = {}
    for steps in (0, 6):
        method, _ = learnt(DobiSvd(steps=steps, step_size=5.0, weight=200.0, loss="exp", **code), model)
        found[steps] = torch.tensor(method._ranks)
    assert ((found[6] - found[0]).abs() > 1).sum() > len(found[0]) / 2
    with pytest.raises(
        recombine.UsageError, match=r"^method.step_size=0.02: moves a rank by some 0.6 in steps=30[^\n]*$"
    ):
        recombine.apply(build("tiny_vit"), DobiSvd(**code), losses=losses(model))


def test_exp_of_the_loss_has_its_gradient(monkeypatch):
    """d exp(l) = exp(l) dl: the ratios' gradient is the plain one times the perplexity."""
    grads, model = {}, build("tiny_vit")
    step = torch.optim.Adam.step
    for name in ("plain", "exp"):
        with monkeypatch.context() as patch:

            def catch(self, *args, name=name):
                grads[name] = self.param_groups[0]["params"][0].grad.clone()
                return step(self, *args)

            patch.setattr(torch.optim.Adam, "step", catch)
            learnt(DobiSvd(targets=ALL, steps=1, step_size=0.1, weight=0.0, loss=name), model)
    share = grads["exp"] / grads["plain"]
    assert share.std() < 1e-3 * share.mean() and share.mean() > 1.5
