"""CERSA keeps the energy with the fewest directions."""

import numpy as np
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.matrices import KINDS, group_of
from recombine import Cersa, Svd


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), KINDS, st.integers(0, 99), st.floats(0.05, 1), st.floats(0.05, 1))
def test_cersa_keeps_the_energy_with_the_fewest_directions(m, n, kind, seed, a, b):
    site, (beta, alpha) = group_of(kind, m, n, 1, seed)[0], sorted((a, b))
    layer = Cersa(alpha=alpha, beta=beta).recombine(site)
    s = scipy.linalg.svdvals(site.module.weight.detach().numpy())
    energy = np.cumsum(s**2) / max((s**2).sum(), 1e-300)
    if s[0] > 0:
        assert energy[layer.rank - 1] >= alpha - 1e-12
        assert layer.rank == 1 or alpha == 1 or energy[layer.rank - 2] < alpha + 1e-12
        assert energy[len(layer.core) - 1] >= beta - 1e-12
    truncated = Svd(rank=layer.rank).recombine(site).dense_weight()
    assert torch.allclose(layer.dense_weight(), truncated, atol=1e-9 * max(s[0], 1e-300))
