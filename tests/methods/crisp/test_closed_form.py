"""CRISP's closed form against the Eckart-Young optimum, with every gate."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recombine
from helpers.groups import group, randn
from helpers.matrices import KINDS, group_of
from recombine import Crisp
from recombine.layers import SharedBasisLinear
from recombine.layers.shared_basis import GATES
from recombine.methods.crisp.closed_form import random_orthogonal, stack, truncate, ungate
from zoo import build

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), KINDS, st.integers(0, 99), st.data())
def test_crisp_is_the_eckart_young_optimum(shape, chunk, g, kind, seed, data):
    """|M - B G| equals the tail of M's singular values, whatever the gate and the gauge."""
    m, n = 4 * shape[0], 8 * shape[1]
    group = group_of(kind, m, n, g, seed)
    rank = data.draw(st.integers(1, g * chunk))
    stacked = np.concatenate([s.module.weight.detach().numpy().reshape(-1, chunk) for s in group], 1)
    s = scipy.linalg.svdvals(stacked)
    optimum, scale = np.sqrt((s[rank:] ** 2).sum()), max(s[0], 1e-300)
    for gauge in ("svd", "balanced", "rotated"):
        for gate in ("silu", "none"):
            basis, mixers = ungate(*truncate(stack(group, chunk), rank), gate, gauge)
            layers = [SharedBasisLinear(basis, a, n, gate) for a in mixers.split(chunk, 1)]
            built = np.concatenate([layer.dense_weight().detach().numpy().reshape(-1, chunk) for layer in layers], 1)
            assert np.isfinite(built).all()
            assert abs(np.linalg.norm(stacked - built) - optimum) <= 1e-6 * scale


@pytest.mark.parametrize(
    "gate, gauge", list(itertools.product(["silu", "gelu", "none"], ["svd", "balanced", "rotated"]))
)
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
    for gauge, chunk in itertools.product(("svd", "balanced", "rotated"), (8, 16)):
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


def test_a_rotation_mixes_the_singular_vectors_and_keeps_their_share():
    """G of the balanced gauge has orthogonal rows, and of the rotated one others of the same singular values."""
    _, m = group()
    grams = []
    for gauge in ("balanced", "rotated"):
        mixers = GATES["silu"](ungate(*truncate(m, 5), "silu", gauge)[1])
        grams.append(mixers @ mixers.T / mixers.square().sum())
    straight, turned = grams
    assert torch.allclose(straight, straight.diagonal().diag(), atol=1e-9)
    assert not torch.allclose(turned, turned.diagonal().diag(), atol=1e-2)
    assert torch.allclose(*(torch.linalg.eigvalsh(gram) for gram in grams), atol=1e-9)
