"""PruneNet: the distance of spectra, the learnt slice, and its seed."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import recombine
from recombine import PruneNet
from recombine.methods.pruning.prunenet_policy import ks_distance, search, spectrum
from recombine.models import roles
from zoo import build


def test_spectrum_and_distance():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 12, generator=generator)
    b = torch.cat([a[:20], a[:3]])
    assert torch.allclose(spectrum(a), torch.linalg.svdvals(a.double()).flip(0), atol=1e-7)
    for x, y in ((a, b), (a, 0.5 * b), (a, a[:5]), (a.new_zeros(4, 4), b)):
        want = scipy.stats.ks_2samp(spectrum(x).numpy(), spectrum(y).numpy()).statistic
        assert ks_distance(spectrum(x), spectrum(y)) == pytest.approx(want, abs=1e-12)
    assert (spectrum(torch.ones(30, 20)) == 0).sum() == 19  # a singular value that is 0 is no rounding error


@pytest.mark.parametrize("h, d, k", [(60, 20, 24), (1536, 384, 768)])
def test_the_learnt_slice_is_no_worse_than_a_random_one(h, d, k):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(h, d, generator=generator) * torch.logspace(0, -1, d)
    w = w * torch.logspace(0, -1, h)[torch.randperm(h, generator=generator), None]
    whole = spectrum(w)
    kept = search([w], k, episodes=20, lr=1e-3, seed=0)[0]
    random = [torch.randperm(h, generator=generator)[:k] for _ in range(20)]
    mean = sum(ks_distance(whole, spectrum(w[r])) for r in random) / len(random)
    assert ks_distance(whole, spectrum(w[kept])) <= mean
    assert len(kept.unique()) == k and kept.equal(kept.sort().values)


def test_prunenet_as_the_paper_has_it():
    """The authors' algorithm written out: noisy keep probabilities, sum(log o) times the bare discounted reward."""
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(30, 12, generator=generator) * torch.logspace(0, -1, 12) for _ in range(3)]
    kept = search(states, 14, episodes=5, lr=5e-3, seed=0, estimator="paper")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        project, importance = nn.Linear(12, 30), nn.Parameter(torch.rand(30))
    rng, optimizer = torch.Generator().manual_seed(0), torch.optim.AdamW([importance, *project.parameters()], 5e-3)

    def keep_probabilities(w):
        alpha = torch.sigmoid(project(w) @ importance)
        eps = torch.rand(30, generator=rng)
        return torch.sigmoid(torch.log(eps) - torch.log(1 - eps) + torch.log(alpha) - torch.log(1 - alpha))

    def draw(w):
        return torch.multinomial(keep_probabilities(w).detach(), 14, generator=rng).sort().values

    def reward(w, action):
        both = (np.linalg.svd(x.double().numpy(), compute_uv=False) for x in (w, w[action]))
        return 1 / scipy.stats.ks_2samp(*both).statistic

    for _ in range(5):
        actions = [draw(w) for w in states]
        rewards = [0.99**i * reward(w, action) for i, (w, action) in enumerate(zip(states, actions, strict=True))]
        for w, action, gain in zip(states, actions, rewards, strict=True):
            optimizer.zero_grad()
            (-torch.gather(torch.log(keep_probabilities(w)), 0, action).sum() * gain).backward()
            optimizer.step()
    assert [rows.tolist() for rows in kept] == [draw(w).tolist() for w in states]
    assert [rows.tolist() for rows in kept] != [x.tolist() for x in search(states, 14, 5, 5e-3, 0)]


def test_prunenet_depends_on_its_seed_alone():
    def widths(seed):
        torch.manual_seed(torch.seed())  # whatever torch's own state is
        model = recombine.apply(build("tiny_swin"), PruneNet(seed=seed, episodes=3))
        return torch.cat([model.get_submodule(name).weight.flatten() for name in roles.find(model, ("up",))])

    assert torch.equal(widths(0), widths(0)) and not torch.equal(widths(0), widths(1))
