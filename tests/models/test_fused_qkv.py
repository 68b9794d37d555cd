"""Splitting and fusing qkv is exact."""

import copy

import torch
from torch import nn

from recombine.models import roles
from recombine.models.fused_qkv import SplitLinear, fuse, split


def test_split_and_fuse_are_exact(tiny):
    tiny = tiny.double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before, state = tiny(x), copy.deepcopy(tiny.state_dict())
    names = list(roles.find(tiny, ("qkv",)))
    tiny.get_submodule(names[0]).requires_grad_(False)
    split(tiny, names)
    layer = tiny.get_submodule(names[0])
    assert isinstance(layer, SplitLinear) and layer.out_features == 3 * layer.q.out_features
    assert torch.equal(layer.k.weight, state[f"{names[0]}.weight"].chunk(3)[1])
    assert layer.v.weight.untyped_storage().nbytes() == layer.v.weight.nbytes  # a copy: it can be saved by itself
    assert not layer.q.weight.requires_grad and tiny.get_submodule(names[1]).q.weight.requires_grad
    torch.testing.assert_close(tiny(x), before, rtol=0, atol=1e-12)

    tiny.get_submodule(names[1]).q = nn.Identity()  # rewritten: stays split
    assert fuse(tiny) == [names[0], *names[2:]]
    tiny.get_submodule(names[1]).q = nn.Linear(1, 1)
    tiny.set_submodule(names[1], nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64))
    fused = tiny.state_dict()
    assert fused.keys() == state.keys() and list(fused) == list(state)
    assert all(torch.equal(fused[k], state[k]) for k in state if not k.startswith(names[1]))
    tiny.load_state_dict(state)
    torch.testing.assert_close(tiny(x), before, rtol=0, atol=0)
