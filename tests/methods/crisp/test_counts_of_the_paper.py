"""The counts that CRISP prints."""

import pytest
import timm
import torch

from recombine import Crisp, Recast
from recombine.core.rewrite import find_sites


def shapes(arch, **fields):
    """(the model without memory, the method's sites, parameters of all else)."""
    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=1000)
    sites = find_sites(model, Crisp(**fields))
    return sites, sum(p.numel() for p in model.parameters()) - sum(s.module.weight.numel() for s in sites)


SPLIT = ("q", "k", "v", "o", "up", "down")


@pytest.mark.parametrize(
    "label, printed, fused, split",
    [  # Fig. 5 swaps r and s of Eq. 4: its s counts the columns of the basis, its r is the chunk's length
        ((8, 16), 22.1, 22.06, 22.06),
        ((64, 16), 3.5, 3.52, 3.55),
        ((16, 8), 6.1, 6.13, 6.14),
        ((16, 32), 22.1, 22.08, 22.09),
        ((16, 64), 43.4, 43.33, 43.36),
        ((32, 16), 6.0, 6.15, 6.16),
    ],
)
def test_totals_of_figure_5(label, printed, fused, split):
    for targets, total in ((("qkv", "o", "up", "down"), fused), (SPLIT, split)):
        sites, rest = shapes("vit_small_patch16_224", targets=targets, chunk=1)
        method = OverComplete(chunk=label[0], basis_rank=label[1], group_size=2)
        millions = (method.sizes(sites)[0] + rest) / 1e6
        assert millions == pytest.approx(total, abs=0.006) and millions == pytest.approx(printed, abs=0.2)


class OverComplete(Crisp):
    """(16, 64) has more columns than group_size * chunk: only the figure has use for that."""

    def group_rank(self, group):
        return self.basis_rank


@pytest.mark.parametrize("ratio, bases, total", [(0.5, 42.47, 44.10), (0.25, 21.23, 22.87)])
def test_compressed_totals_of_vit_b(ratio, bases, total):
    """CRISP Tab. 2 and 9: 44M counts all; 21M, the bases alone."""
    sites, rest = shapes("vit_base_patch16_224")
    stored, mixers = Crisp(basis_rank=int(64 * ratio)).sizes(sites)
    assert (stored - mixers) / 1e6 == pytest.approx(bases, abs=0.006)
    assert (stored - mixers + rest) / 1e6 == pytest.approx(total, abs=0.006) and mixers < 1e5


def test_trainable_parameters_of_table_1():
    sites, _ = shapes("vit_small_patch16_224")
    assert Crisp().sizes(sites)[1] == 98_304  # 4.5e-3 of the model
    assert Crisp(chunk=8).sizes(sites)[1] == 48 * 128  # fewer than 200 a layer
    assert Recast().sizes(sites)[1] == 48 * 2
