"""Pruning of MLPs, for DGMR and PruneNet: every MLP loses the same share of its neurons; linear layers stay linear."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from recombine.core.method import Method, Site, need
from recombine.core.sites import parent
from recombine.errors import UsageError
from recombine.methods.pruning.base import Structural, reconfigure, say_neurons
from recombine.methods.pruning.compensation import RIDGE, Moments, compensated
from recombine.models import roles


class Mlp(NamedTuple):
    """The layers of one MLP. Neuron i is row i of up, row i of gate where there is one, and column i of down.

    Where up holds both halves of a gated MLP, twice as many rows as down has columns, it is row i of each half.
    """

    up: nn.Linear
    down: nn.Linear
    gate: nn.Linear | None

    @property
    def into(self) -> list[nn.Linear]:
        """The layers that a neuron reads its inputs through."""
        return [self.up] if self.gate is None else [self.gate, self.up]

    @property
    def width(self) -> int:
        """Its neurons."""
        return self.down.in_features

    @property
    def neuron(self) -> int:
        """Weights of one neuron."""
        return sum(linear.weight.numel() for linear in self.into) // self.width + self.down.out_features


@dataclass(kw_only=True)
class MlpPruning(Structural, abstract=True):
    """The base of the methods that cut neurons out of MLPs.

    Args:
        ratio: share of all target layers' weights that is kept. Targets outside of the MLPs stay as they are, so the
            MLPs lose more: with ViT-B's q, k, v, o, up and down at 0.5, a quarter of the neurons is left.
        compensate: none; or ridge, down makes up for what is cut, which needs calibration data (`compensation.py`).
    """

    targets: tuple[str, ...] = ("up", "down", "gate?")
    ratio: float = 0.5
    compensate: str = "none"

    budget_fields: ClassVar[dict[str, str]] = {"retained": "ratio", "memory": "ratio"}

    def choose(self, mlps: list[Mlp], counts: list[int]) -> list[Tensor]:
        """The indices of the neurons that stay, counts[i] of them in MLP i, ascending."""
        raise NotImplementedError(type(self).__name__)

    @property
    def sizes_need_statistics(self) -> bool:
        """Never: what is compensated is known first."""
        return self.compensate == "none"

    def check(self, sites: list[Site]) -> None:
        need(self.compensate in ("none", "ridge"), self, "compensate", "must be none or ridge")
        need(0 < self.ratio <= 1, self, "ratio", "is a share of the weights, so it must lie in (0, 1]")
        need({"up", "down"} <= {site.role for site in sites}, self, "targets", "a neuron is cut out of up and down")
        whole = all(mlp.up.out_features in (mlp.width, 2 * mlp.width) for mlp in self.mlps(sites))
        need(whole, self, "targets", "up is neither as wide as down here nor twice as wide")
        least = math.ceil(1000 * self.least(sites)) / 1000
        need(self.ratio >= least, self, "ratio", f"must be at least {least}: one neuron an MLP, other targets whole")

    def statistics_needed(self) -> set[str]:
        return set() if self.compensate == "none" else {"inputs", "mean"}

    def groups(self, sites: list[Site]) -> list[list[Site]]:
        """Each down by itself; which neurons stay is chosen by then."""
        downs = [site for site in sites if site.role == "down"]
        chosen = self.choose(self.mlps(sites), self.counts(sites))
        self.chosen = {site.name: kept for site, kept in zip(downs, chosen, strict=True)}
        return [[site] for site in downs]

    def digest(self, group: list[Site]) -> dict[str, Tensor]:
        """The new weight (m, k) of a down and its bias, where it has one."""
        (site,) = group
        down, inputs = site.module, self.stats[site.name].inputs
        moments = Moments(inputs.xx, inputs.mean)
        weight, bias = compensated(down.weight, down.bias, moments, self.chosen[site.name], RIDGE)
        return {"weight": weight.to(down.weight)} | ({} if bias is None else {"bias": bias.to(down.bias)})

    def before_budget(self, model: nn.Module, sites: list[Site], losses) -> None:
        require_whole(self, model, sites)

    def budget_values(self, field: str, sites: list[Site]) -> list[float]:
        return [i / 1000 for i in range(math.ceil(1000 * self.least(sites)), 1001)]

    def mlps(self, sites: list[Site]) -> list[Mlp]:
        """The MLPs among the target layers."""
        up, down, gate = ([site.module for site in sites if site.role == role] for role in ("up", "down", "gate"))
        return [Mlp(*layers) for layers in zip(up, down, gate or [None] * len(up), strict=True)]

    def weights(self, sites: list[Site]) -> tuple[int, int]:
        """Weights (of all target layers, of the MLPs among them)."""
        total = sum(site.module.weight.numel() for site in sites)
        return total, sum(mlp.neuron * mlp.width for mlp in self.mlps(sites))

    def least(self, sites: list[Site]) -> float:
        """The ratio that leaves one neuron in the narrowest MLP, and the same share in the others."""
        total, mlp = self.weights(sites)
        return (total - mlp + mlp / min(m.width for m in self.mlps(sites))) / total

    def counts(self, sites: list[Site]) -> list[int]:
        """Neurons left in each MLP."""
        total, mlp = self.weights(sites)
        share = (self.ratio * total - (total - mlp)) / mlp
        return [max(1, int(m.width * share + 1e-9)) for m in self.mlps(sites)]

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        total, mlp = self.weights(sites)
        left = sum(m.neuron * k for m, k in zip(self.mlps(sites), self.counts(sites), strict=True))
        return total - mlp + left, 0

    def prune(self, model: nn.Module, sites: list[Site]) -> None:
        mlps, counts = self.mlps(sites), self.counts(sites)
        ridge = self.compensate == "ridge"
        downs = [site for site in sites if site.role == "down"]
        chosen = [self.chosen[site.name] for site in downs] if ridge else self.choose(mlps, counts)
        for mlp, kept, site in zip(mlps, chosen, downs, strict=True):
            if len(kept) < mlp.width:
                say_neurons(model.get_submodule(parent(site.name)), mlp.width, len(kept))
                for linear in mlp.into:
                    cut(linear, torch.cat([kept + start for start in range(0, linear.out_features, mlp.width)]), 0)
                cut(mlp.down, kept, 1)
                for key, tensor in self.digested([site]).items() if ridge else ():
                    setattr(mlp.down, key, nn.Parameter(tensor, requires_grad=False))
        if hasattr(model, "config") and len(set(counts)) == 1:
            reconfigure(model, intermediate_size=counts[0])


def require_whole(method: Method, model: nn.Module, sites: list[Site]) -> None:
    """Checks that MLPs are named as a whole, and hold nothing else.

    Raises:
        UsageError: they are not.
    """
    parts = roles.find(model, ("up", "down", "gate?"), nn.Module)
    if missing := parts.keys() - {site.name for site in sites}:
        role = parts[min(missing)]
        raise UsageError(f"method.targets={list(method.targets)}: a neuron is cut out of {role} too, name it as well")
    known = {id(p) for name in parts for p in model.get_submodule(name).parameters()}
    holders = {name.rpartition(".")[0] for name, role in parts.items() if role == "up"}
    if any(id(p) not in known for name in holders for p in model.get_submodule(name).parameters()):
        owner = f"{type(method).__name__}: the MLPs of this {type(model).__name__}"
        raise UsageError(f"{owner} hold more than up, down and gate: take a compressor that leaves their width")


def cut(linear: nn.Linear, kept: Tensor, dim: int) -> None:
    """Leaves these rows (dim 0) or columns (dim 1) of a linear layer."""
    kept = kept.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, kept), requires_grad=False)
    if dim == 1:
        linear.in_features = len(kept)
        return
    linear.out_features = len(kept)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[kept], requires_grad=False)


def rows(mlp: Mlp) -> Tensor:
    """The input weights of every neuron, in float64: (h, d), or [gate, up] (h, 2 d) of a gated MLP."""
    return torch.cat([half.double() for linear in mlp.into for half in linear.weight.detach().split(mlp.width)], 1)
