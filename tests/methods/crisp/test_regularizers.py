"""The penalties of CRISP's mixers (Tab. 4) are their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recombine
from helpers.groups import randn
from recombine import Crisp
from recombine.layers import SharedBasisLinear
from recombine.methods.crisp.regularizers import PENALTIES
from zoo import build


@pytest.mark.parametrize("r, s", [(3, 8), (8, 3)])
@pytest.mark.parametrize("gate", ["silu", "none"])
def test_penalties_are_their_formulas(r, s, gate):
    layer = SharedBasisLinear(randn(16, r), randn(r, s, seed=1), 2 * s, gate)
    layer.mixer.requires_grad_(True)
    a = layer.mixer.detach().clone().requires_grad_(True)
    g = a * torch.sigmoid(a) if gate == "silu" else a
    d, k = min(r, s), g @ g.T if r < s else g.T @ g
    v = torch.ones(s).double()
    for _ in range(2000):  # power iteration
        v = F.normalize(a.detach().T @ (a.detach() @ v), dim=0)
    u = F.normalize(a.detach() @ v, dim=0)
    formulas = {
        "l2": (a * a).sum(),
        "orthogonal": ((k * d / torch.trace(k) - torch.eye(d).double()) ** 2).sum() / d,
        "spectral": u @ a @ v,
    }
    assert formulas.keys() == PENALTIES.keys()
    for name, formula in formulas.items():
        value = PENALTIES[name](layer)
        ours, theirs = torch.autograd.grad(value, layer.mixer)[0], torch.autograd.grad(formula, a, retain_graph=True)[0]
        assert torch.allclose(value, formula) and torch.allclose(ours, theirs, atol=1e-9)


def test_penalty_counts_what_trains():
    model = recombine.apply(build("tiny_vit"), Crisp(chunk=8))
    for name in ("none", *PENALTIES):
        assert Crisp(regulariser=name, strength=0).penalty(model) == 0.0
    mixers = [m.mixer for m in model.modules() if isinstance(m, SharedBasisLinear)]
    expected = 0.5 * sum(m.square().sum() for m in mixers)
    assert torch.allclose(Crisp(regulariser="l2", strength=0.5).penalty(model), expected)
    orthonormal = SharedBasisLinear(randn(16, 4), 7 * nn.init.orthogonal_(torch.empty(4, 8)).double(), 16, "none")
    assert PENALTIES["orthogonal"](orthonormal) < 1e-10
    model.requires_grad_(False)
    assert Crisp(regulariser="l2").penalty(model) == 0.0
