"""CRISP's fit by mimicry ends where the truncated SVD does."""

import itertools
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

import recombine
from helpers.groups import S, group, share, tail
from recombine import Crisp
from recombine.layers.shared_basis import GATES, PLACEMENTS
from recombine.methods.crisp.closed_form import truncate
from recombine.methods.crisp.clustering import Cluster
from recombine.methods.crisp.mimicry import INITS, LOSSES, Mimicry, mimic
from zoo import build


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
    """With no step that is taken the best iterate is the start: N(0, 0.01^2), Kaiming's of B itself, or of a template.

    RECAST's code draws each template (m, n) by kaiming_normal_, so its deviation is that of n inputs.
    """
    weights, _ = group()
    template = torch.nn.init.kaiming_normal_(torch.empty(500, weights[0].shape[1])).std().item()
    for basis, size in (("normal", 0.01), ("kaiming", (6 / 4) ** 0.5 / 3**0.5), ("template", template)):
        for chunk in (1, S):
            how, rng = Mimicry(basis=basis, steps=1), torch.Generator().manual_seed(0)
            found = mimic(weights, 4, chunk, "none", "pre", how, rng)[0]
            assert found.std().item() == pytest.approx(size, rel=0.15)


def test_the_switches_of_recasts_code_run_its_loop():
    """Against its notebook's loop, written out: templates, noise on coefficients, SmoothL1 times 2, clip 1, RMSprop.

    Its notebook/reconstruction-ViT.ipynb, with one coefficient set and one bank.
    """
    weights, _ = group(scale=0.3)
    how = Mimicry(
        basis="template", optimizer="rmsprop", lr=0.1, factor=2, noise=1e-2, clip=0.05, steps=40, decay_every=15
    )
    basis, mixer, reached = mimic(weights, 2, 1, "none", "pre", how, torch.Generator().manual_seed(0))
    rng, (m, n) = torch.Generator().manual_seed(0), weights[0].shape
    templates = (
        torch.empty(m * n, 2).normal_(0, (2 / n) ** 0.5, generator=rng).T.reshape(2, m, n).clone().requires_grad_()
    )
    sets = [torch.nn.init.orthogonal_(torch.empty(2, 1), generator=rng).requires_grad_() for _ in weights]
    optimizer = torch.optim.RMSprop([templates, *sets], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=15, gamma=0.1)
    losses, clipped = [], 0
    for _ in range(40):
        optimizer.zero_grad()
        noise = 1e-2 * torch.randn(2, 2, generator=rng)
        built = [(templates * (a + e[:, None])[:, None]).sum(0) for a, e in zip(sets, noise.T, strict=True)]
        loss = sum(2.0 * F.smooth_l1_loss(b, w.float()) for b, w in zip(built, weights, strict=True))
        losses.append((loss.item(), templates.detach().clone(), [a.detach().clone() for a in sets]))
        loss.backward()
        clipped += torch.nn.utils.clip_grad_norm_([templates, *sets], 0.05) > 0.05
        optimizer.step()
        scheduler.step()
    best, bank, coefficients = min(losses, key=lambda one: one[0])
    assert 0 < clipped < 40 and best < losses[0][0] / 3
    assert reached == pytest.approx(best, rel=1e-4)
    assert torch.allclose(basis.T.reshape(2, m, n), bank, atol=1e-4)
    assert torch.allclose(mixer, torch.cat(coefficients, 1), atol=1e-4)


def test_mimicry_is_deterministic():
    method = Crisp(chunk=8, basis_rank=5, fit="mimicry", mimicry=Mimicry(steps=20))
    one, two = (recombine.apply(build("tiny_vit"), method).state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_options_survive_as_plain_dicts():
    method = Crisp(mimicry=Mimicry(loss="l1"), cluster=Cluster(printed=True), fit="mimicry")
    assert Crisp(**asdict(method)) == method
    for options in ({"loss": "l3"}, {"steps": 0}, {"init": "template"}, {"lr": -1}, {"noise": -1}, {"clip": 0}):
        with pytest.raises(recombine.UsageError, match=rf"^method.mimicry.{next(iter(options))}=[^\n]*$"):
            recombine.apply(build("tiny_vit"), Crisp(chunk=8, mimicry=Mimicry(**options)))
