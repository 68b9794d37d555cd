"""CRISP's fit by clustering, step by step."""

import pytest
import torch

import recombine
from helpers.groups import group, randn, share, tail
from recombine import Crisp
from recombine.methods.crisp.closed_form import truncate
from recombine.methods.crisp.clustering import Cluster, kmeans, merge
from zoo import build


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
