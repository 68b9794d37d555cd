"""RoSA: where its sparse part lies, its warm-up and its budget."""

import copy
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import recombine
from helpers import SPLIT, numbers
from recombine import Rosa
from recombine.models import roles
from zoo import batch, build, loss, losses


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
