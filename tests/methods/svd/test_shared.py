"""Basis Sharing and DFJR are the optimum of what shares a basis."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recombine
from helpers.weighted import INPUTS, WEIGHTS, agrees, group_of, tail
from recombine import BasisSharing, Dfjr
from recombine.models import roles
from zoo import ARCHS, build


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(2, 8), st.integers(2, 8), WEIGHTS, INPUTS, st.integers(0, 99), st.data())
def test_basis_sharing_is_the_optimum_of_its_group(g, m, n, kind, inputs, seed, data):
    """The group's output error on all its inputs is the tail of [W_1; ...] [X_1 ...]; without data, of [W_1; ...]."""
    model, sites, stats, xs = group_of([(m, n)] * g, "q" * g, kind, inputs, seed)
    stack = np.concatenate([site.module.weight.detach().numpy() for site in sites])
    rank, whiten = data.draw(st.integers(1, min(g * m, n))), data.draw(st.booleans())
    method = BasisSharing(rank=rank, group_size=3, whiten=whiten)
    method.stats = stats
    assert method.sizes(sites) == (rank * (g * m + n), 0)
    method.rewrite(model, sites)
    layers = list(model.children())
    assert len({id(layer.right) for layer in layers}) == 1 and not any(p.requires_grad for p in model.parameters())
    built = np.concatenate([layer.dense_weight().detach().numpy() for layer in layers])
    x = np.concatenate(xs, 1) if whiten else np.eye(n)
    agrees(
        np.linalg.norm((stack - built) @ x), tail(stack @ x, rank), np.linalg.norm(stack) * np.linalg.norm(x) + 1e-300
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(2, 8), WEIGHTS, st.integers(0, 99), st.data())
def test_dfjr_is_the_optimum_of_its_pairs(m, n, kind, seed, data):
    named = ["q", "k", "v", "gate", "up"]
    model, sites, *_ = group_of([(m, n), (m + 1, n), (m, n), (m, n), (m, n)], named, kind, "random", seed)
    rank = data.draw(st.integers(1, min(m, n)))
    Dfjr(rank=rank).rewrite(model, sites)
    layers = list(model.children())
    assert layers[0].right is layers[1].right and layers[3].right is layers[4].right
    assert len({id(layer.right) for layer in layers}) == 3
    for pair in ((0, 1), (2,), (3, 4)):
        stack = np.concatenate([sites[i].module.weight.detach().numpy() for i in pair])
        built = np.concatenate([layers[i].dense_weight().detach().numpy() for i in pair])
        agrees(np.linalg.norm(stack - built), tail(stack, rank), np.linalg.norm(stack) + 1e-300)


@pytest.mark.parametrize("method", [BasisSharing(whiten=False), Dfjr()], ids=["basis_sharing", "dfjr"])
@pytest.mark.parametrize("arch", ARCHS)
def test_who_shares_a_basis(method, arch, tmp_path):
    """Of consecutive layers, or of one block; counted once, and still one after loading."""
    model = recombine.apply(build(arch), method)
    recombine.save(model, tmp_path / "m")
    loaded = recombine.load(tmp_path / "m", build(arch))
    stored = 0
    for m in (model, loaded):
        users = {}
        for name, role in m.recombined.targets.items():
            users.setdefault(id(m.get_submodule(name).right), []).append((name, role))
        for names in users.values():
            inside = {role for _, role in names}
            blocks = {re.match(roles.family(m).blocks, name)[0] for name, _ in names}
            if isinstance(method, Dfjr):
                assert inside in ({"q", "k"}, {"gate", "up"}, {"up"}, {"v"}, {"o"}, {"down"})
                assert len(names) == len(inside) and len(blocks) == 1
            else:
                assert len(inside) == 1 and len(names) == (1 if inside <= {"o", "down"} else 2)
        layers = [m.get_submodule(name) for name in m.recombined.targets]
        bases = {id(layer.right): layer.right for layer in layers}.values()
        stored = sum(p.numel() for p in bases) + sum(layer.left.numel() for layer in layers)
        assert recombine.count(m).retained == stored / m.recombined.dense <= 0.5
