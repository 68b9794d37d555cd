"""JACTUS's calibration: the subspaces of W, C_x and C_g that make up a layer's union (see method.py)."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from recombine.core.layer_statistics import Inputs
from recombine.core.method import Method, Site, need
from recombine.methods.jactus.union import Covariance, Whole, covariance, union_factors


@dataclass(kw_only=True)
class Subspaces(Method, abstract=True):
    """The part of JACTUS that finds a layer's union of subspaces from calibration data.

    Args:
        alpha, beta, gamma: shares of the energy of W, C_x and C_g that the union keeps, in (0, 1].
        sensitivity: gradient weighs outputs by C_g, none weighs them alike.
        gain: weight, or weight+grad, which turns the subspaces towards the gradient E[g x^T] too.
        eta: how far weight+grad turns them: the norm of the gradient's part relative to the weight's, both whitened.
        floor: least shrinkage of the covariances, in (0, 1].
    """

    alpha: float = 0.99
    beta: float = 0.999
    gamma: float = 0.999
    sensitivity: str = "gradient"
    gain: str = "weight"
    eta: float = 0.3
    floor: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        self._eigen: WeakKeyDictionary[Inputs, Covariance] = WeakKeyDictionary()  # of C_x, while layers share it

    def check(self, sites: list[Site]) -> None:
        for name in ("alpha", "beta", "gamma"):
            need(0 < getattr(self, name) <= 1, self, name, "is a share, so it must lie in (0, 1]")
        need(self.sensitivity in ("gradient", "none"), self, "sensitivity", "must be gradient or none")
        need(self.gain in ("weight", "weight+grad"), self, "gain", "must be weight or weight+grad")
        need(self.eta >= 0, self, "eta", "must be at least 0")
        need(0 < self.floor <= 1, self, "floor", "must lie in (0, 1], or a covariance may be singular")

    def statistics_needed(self) -> set[str]:
        outputs = {"outputs"} if self.sensitivity == "gradient" else set()
        return {"inputs"} | outputs | ({"cross"} if self.gain == "weight+grad" else set())

    def widest(self, site: Site) -> int:
        """The largest rank of the layer that may be needed."""
        raise NotImplementedError(type(self).__name__)

    def digest(self, group: list[Site]) -> dict[str, Tensor]:
        """The tensors of `Whole`, and the largest rank inside the union as `width` ()."""
        (site,) = group
        weight, stats = site.module.weight, self.stats[site.name]
        outputs = None
        if stats.inputs not in self._eigen:
            self._eigen[stats.inputs] = covariance(stats.inputs.xx, stats.inputs.x4, stats.inputs.tokens, self.floor)
        if self.sensitivity == "gradient":
            outputs = covariance(stats.gg, stats.g4, stats.tokens, self.floor)
        shares = (self.alpha, self.beta, self.gamma)
        turn = (stats.gx, self.eta) if self.gain == "weight+grad" else None
        widest, inputs = self.widest(site), self._eigen[stats.inputs]
        factors = union_factors(weight.detach().double(), inputs, outputs, shares, turn, widest)
        factors = factors.truncate(widest, weight.dtype)
        return {name: t.clone() for name, t in factors._asdict().items()} | {"width": torch.tensor(len(factors.right))}

    def whole(self, site: Site) -> Whole:
        """The layer's factors at the largest rank that may be needed, computed once."""
        found = self.digested([site])
        return Whole(*(found[name] for name in Whole._fields))
