"""Counts and memory equal those that the papers print."""

import copy

import pytest
import torch
from torch import nn

import recombine
from recombine import Cersa, Crisp, Full, Peft, Svfit, Svft, models
from recombine.core.method import Site
from recombine.core.rewrite import find_sites


@pytest.fixture(scope="module")
def vit_l():
    torch.manual_seed(0)
    return models.build("vit_l16", arch="vit_large_patch16_224", pretrained=False, num_classes=100)


@pytest.mark.parametrize(
    "method, printed",
    [
        (Full(), 4629.8),
        (Peft(targets=("q", "k", "v"), rank=8), 1175.9),
        (Peft(targets=("q", "k", "v"), rank=32), 1229.9),
    ],
    ids=["FT", "LoRA r=8", "LoRA r=32"],
)
def test_memory_equals_cersa_table_14(vit_l, method, printed):
    model = recombine.apply(copy.deepcopy(vit_l), method)
    assert recombine.count(model).memory_mib == pytest.approx(printed, rel=1e-3)


def test_cersa_at_full_rank_takes_the_memory_its_formula_gives(vit_l):
    """q, k, v with all 1024 directions: 2597.7 MiB without a head (the paper prints 2519.6, a mean rank of 996)."""
    model, method = copy.deepcopy(vit_l), Cersa(alpha=1.0)
    model.reset_classifier(0)
    sites = find_sites(model, method)
    method.kept.groups = {site.name: {"s": torch.ones(1024)} for site in sites}  # the ranks need no SVD
    stored, trained = method.sizes(sites)
    rest = sum(p.numel() for p in model.parameters()) - 72 * 1024**2
    assert (4 * (rest + stored) + 12 * trained) / 2**20 == pytest.approx(2597.7, rel=1e-3)


def test_vit_s_counts_equal_crisp():
    """CRISP Sec. 4: ViT-S has 21,233,664 weights in its linear layers; (64, 32) in groups of two trains 98,304."""
    model = models.build("vit_s16", arch="vit_small_patch16_224", pretrained=False, num_classes=1000)
    recombine.apply(model, Crisp())
    account = recombine.count(model)
    assert model.recombined.dense == 21_233_664 and account.trained_without_head == 98_304


def test_cersa_uniform_memory_equals_table_5(vit_l):
    """Rank 287 in q, k and v of every block: printed 1122.5 MiB, of which the head's width (unstated) is the rest."""
    model = recombine.apply(copy.deepcopy(vit_l), FlatCersa(rank=287))
    assert recombine.count(model).memory_mib == pytest.approx(1122.5, rel=1e-3)


class FlatCersa(Cersa):
    """Cersa on a weight whose SVD is known, the identity's, for counts alone."""

    def factors(self, site):
        m, n = site.module.weight.shape
        return torch.eye(m, min(m, n)), torch.ones(min(m, n)), torch.eye(min(m, n), n)


@pytest.mark.parametrize("m, n", [(48, 48), (96, 48), (48, 80)])
@pytest.mark.parametrize(
    "method, weights, trained",
    [  # CERSA Table 1, in floats; its 2mn for SVFit and SVFT holds for square layers: N (m + n) in general
        (Full(), lambda m, n: m * n, lambda m, n: m * n),
        (Cersa(rank=7), lambda m, n: 7 * (m + n) + 49, lambda m, n: 49),
        (Peft(rank=7), lambda m, n: m * n + 7 * (m + n), lambda m, n: 7 * (m + n)),
        (Svfit(rank=7), lambda m, n: min(m, n) * (m + n) + min(m, n), lambda m, n: 7),
        (
            Svft(pattern="banded", band=2),
            lambda m, n: min(m, n) * (m + n) + min(m, n) + svft_entries(min(m, n), 2),
            lambda m, n: svft_entries(min(m, n), 2),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, recombine.Method) else "",
)
def test_counts_equal_cersa_table_1(method, weights, trained, m, n):
    site = Site("layer", "q", nn.Linear(n, m))
    assert method.sizes([site]) == (weights(m, n), trained(m, n))


def svft_entries(size: int, d: int) -> int:
    return size * (2 * d + 1) - d * (d + 1) + 1  # and the gate
