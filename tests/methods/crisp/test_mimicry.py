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
