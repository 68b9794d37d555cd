"""q, k and v as three layers where a model has them as one fused projection.

The fused weight is [Wq; Wk; Wv] (3d, in). timm's attention only calls ``self.qkv(x)`` (never reads its weight), so
any module with the same output will do. Nothing here happens by itself: `split` and `fuse` are called by who rewrites.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class SplitQKV(nn.Module):
    """A fused projection as three layers: x (..., in) -> [q(x), k(x), v(x)] (..., 3d)."""

    def __init__(self, fused: nn.Linear):
        super().__init__()
        assert fused.out_features % 3 == 0, fused
        self.in_features, self.out_features = fused.in_features, fused.out_features
        for i, name in enumerate("qkv"):
            self.add_module(name, _third(fused, i, copy=True))
        self.train(fused.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to q, k and v side by side (..., 3d)."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def split(model: nn.Module, names: Iterable[str]) -> None:
    """Replaces the fused nn.Linear layers of these names, in place, one after the other."""
    for name in names:
        model.set_submodule(name, SplitQKV(model.get_submodule(name)))


def fuse(model: nn.Module, keep: frozenset[str] = frozenset()) -> list[str]:
    """Undoes `split` wherever q, k and v are plain nn.Linear again, but for the layers of the names `keep`.

    Returns the names of the layers that are fused now.
    """
    splits = {name: module for name, module in model.named_modules() if isinstance(module, SplitQKV)}
    fused = [name for name, module in splits.items() if _plain(module) and name not in keep]
    for name in fused:
        model.set_submodule(name, _join(model.get_submodule(name)))
    return fused


def layer_at(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name; of a fused qkv also its q, k or v, as an nn.Linear that views the fused tensors."""
    owner, _, part = name.rpartition(".")
    fused = model.get_submodule(owner)
    if part in ("q", "k", "v") and isinstance(fused, nn.Linear) and not hasattr(fused, part):
        return _third(fused, "qkv".index(part), copy=False)
    return model.get_submodule(name)


def _third(fused: nn.Linear, i: int, copy: bool) -> nn.Linear:
    """The i-th third of the rows; copied where it stays: shared storage can be neither saved nor sharded."""
    linear = nn.Linear(fused.in_features, fused.out_features // 3, bias=fused.bias is not None, device="meta")
    for key, parameter in fused.named_parameters():
        rows = parameter.detach().chunk(3)[i]
        setattr(linear, key, nn.Parameter(rows.clone() if copy else rows, requires_grad=parameter.requires_grad))
    return linear


def _join(split: SplitQKV) -> nn.Linear:
    fused = nn.Linear(split.in_features, split.out_features, bias=split.q.bias is not None, device="meta")
    for key in dict(fused.named_parameters()):
        parts = [getattr(linear, key) for linear in (split.q, split.k, split.v)]
        value = torch.cat([part.detach() for part in parts])
        setattr(fused, key, nn.Parameter(value, requires_grad=any(part.requires_grad for part in parts)))
    return fused.train(split.training)


def _plain(split: SplitQKV) -> bool:
    parts = (split.q, split.k, split.v)
    return all(type(part) is nn.Linear for part in parts) and len({part.bias is None for part in parts}) == 1
