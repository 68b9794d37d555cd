"""Closed-form compensation behind the methods that cut: what is kept is the same, and the output is nearer."""

import pytest
import torch

import recombine
from helpers import refusal
from helpers.pruned import reload
from recombine import Dgmr, Isomorphic, PruneNet
from recombine.core.rewrite import find_sites
from zoo import ARCHS, batch, build, losses, outputs

DGMR, PRUNENET = Dgmr(ratio=0.4), PruneNet(ratio=0.4, episodes=2)


def with_ridge(method):
    return method.copy(compensate="ridge")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("method", [DGMR, PRUNENET], ids=["dgmr", "prunenet"])
def test_down_makes_up_for_what_is_cut(method, arch, tmp_path):
    plain, better, model = build(arch), build(arch), build(arch)
    recombine.apply(plain, method)
    recombine.apply(better, with_ridge(method), losses=losses(better))
    for (name, p), other in zip(plain.named_parameters(), better.parameters(), strict=True):
        last = next(iter(r for n, r in better.recombined.targets.items() if name.startswith(f"{n}.")), "") == "down"
        assert p.shape == other.shape and (last or torch.equal(p, other))  # the same neurons stay
    with torch.no_grad():
        x = batch(model, seed=10)  # one that it was fitted on
        errors = [float((outputs(m, x) - outputs(model, x)).norm()) for m in (plain, better)]
        assert errors[1] < 0.7 * errors[0]
        assert torch.equal(outputs(reload(better, arch, tmp_path), x), outputs(better, x))


def test_down_is_the_least_squares_optimum():
    """Of the first MLP, whose inputs no cut changes: against lstsq on its activations."""
    model, method = build("tiny_vit").double(), with_ridge(DGMR)
    x, seen = batch(model).double(), []
    hook = model.blocks[0].mlp.fc2.register_forward_hook(
        lambda m, a, y: seen.extend((a[0].flatten(0, 1), y.flatten(0, 1)))
    )
    model(x)
    hook.remove()
    before, sites = build("tiny_vit").blocks[0].mlp.fc1.weight, find_sites(model, method)
    kept = method.choose(method.mlps(sites), method.counts(sites))[0]
    recombine.apply(model, method, losses=lambda: [model(x).sum()])
    assert torch.equal(model.blocks[0].mlp.fc1.weight.float(), before[kept])
    h, y = seen
    fc2 = model.blocks[0].mlp.fc2
    error = (h[:, kept] @ fc2.weight.T + fc2.bias - y).square().sum()
    ones = torch.ones(len(h), 1, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([h[:, kept], ones], 1), y, driver="gelsd").solution
    least = (torch.cat([h[:, kept], ones], 1) @ best - y).square().sum()
    assert least <= error < 1.01 * least + 1e-6 * y.square().sum()


@pytest.mark.parametrize("targets", [("qkv", "o", "up", "down"), ("q", "k", "v", "o", "up", "down")])
@pytest.mark.parametrize("width", [True, False])
def test_heads_and_neurons_of_isomorphic(width, targets, tmp_path):
    model, x, errors = build("tiny_vit"), batch(build("tiny_vit"), seed=10), []
    method = Isomorphic(width=width, head_dims=0.0, targets=targets)
    for how in (method, with_ridge(method)):
        cut = build("tiny_vit")
        recombine.apply(cut, how, "retained_60", losses(cut))
        with torch.no_grad():
            errors.append(float((outputs(cut, x) - outputs(model, x)).norm()))
            assert torch.equal(outputs(reload(cut, "tiny_vit", tmp_path), x), outputs(cut, x))
    assert errors[1] < (1.0 if width else 0.7) * errors[0]


def test_it_needs_data_and_a_known_word():
    for method in (DGMR, PRUNENET, Isomorphic()):
        assert "losses=" in refusal(recombine.apply, build("tiny_vit"), with_ridge(method))
        assert "none or ridge" in refusal(recombine.apply, build("tiny_vit"), method.copy(compensate="yes"))


def test_a_failure_leaves_the_weights(monkeypatch):
    model, before = build("tiny_vit"), build("tiny_vit").state_dict()
    monkeypatch.setattr(recombine.methods.pruning.isomorphic_graph.Parts, "prune", lambda self, kept: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recombine.apply(model, with_ridge(Isomorphic()), losses=losses(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
