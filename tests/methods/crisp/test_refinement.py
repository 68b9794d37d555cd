"""CRISP's refinement of weights before the basis is frozen."""

import pytest
import torch
import torch.nn.functional as F

import recombine
from helpers.groups import share
from recombine import Crisp
from recombine.layers import SharedBasisLinear
from recombine.methods.crisp.refinement import Refine, refine
from zoo import build, losses


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
