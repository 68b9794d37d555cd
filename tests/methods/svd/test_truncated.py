"""The truncated SVD is the Eckart-Young optimum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.matrices import KINDS, group_of
from recombine import Svd


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), KINDS, st.integers(0, 99), st.data())
def test_svd_is_the_eckart_young_optimum(m, n, kind, seed, data):
    rank = data.draw(st.integers(1, min(m, n)))
    site = group_of(kind, m, n, 1, seed)[0]
    for core in (False, True):
        built = Svd(rank=rank, train_core=core).recombine(site).dense_weight().detach()
        s = torch.linalg.svdvals(site.module.weight.detach())
        error = torch.linalg.norm(built - site.module.weight.detach())
        assert abs(error - s[rank:].square().sum().sqrt()) <= 1e-9 * max(s[0].item(), 1e-300)


@pytest.mark.parametrize("factor", ["plain", "pivot"])
def test_the_largest_rank_that_fits_is_found_at_every_share(factor):
    """0.29 x 40,000 is a little less than 11,600 in binary numbers."""
    method = Svd(factor=factor)
    for m, n in ((200, 200), (300, 100)):
        for percent in range(1, 100):
            k = method.whole_rank(m, n, percent / 100)
            most = percent * m * n // 100
            assert k == 1 or method.form.weights(m, n, k) <= most
            assert k == min(m, n) or method.form.weights(m, n, k + 1) > most
