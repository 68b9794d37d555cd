"""One basis for several layers: Basis Sharing (arXiv 2410.03765) and data-free joint rank-k (arXiv 2402.16319).

The weights W_i (m_i, n) of a group stand in one stack W (sum m_i, n), of which the best rank k is kept:
W_i ~ left_i right. In the papers' convention (in, out) that is S [W_1^T ... W_g^T] = U Sigma V^T. A group stores
right (k, n), one parameter of all its layers, and left_i (m_i, k) of each. k is the largest with
k (n + sum m_i) <= ratio n sum m_i. With `factor=pivot` the group stores k^2 weights less. Nothing trains.

Basis Sharing groups consecutive layers of one role. It weighs inputs with S S^T = E[x x^T], summed over the group.
Paper: at high ratios the coefficients left_i are fitted again to the inputs that the compressed layers give (`refit`).
Here: they are fitted to the original model's inputs.
Paper's code: refits all at once, to the inputs of the wholly compressed model, with x x^T summed over the group. Here:
`refit` goes block after block, with each layer's own moment.
DFJR groups q with k, and gate with up, of one block. It uses no data.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from recombine.core.calibration import Losses
from recombine.core.drift import Moments
from recombine.core.method import need, need_losses
from recombine.core.sites import Site, consecutive
from recombine.layers import FactoredLinear
from recombine.linalg import project, weighted_svd
from recombine.methods.svd.anchored import target
from recombine.methods.svd.refit import anchored, check_refit, least_squares, refit
from recombine.methods.svd.truncated import Truncated
from recombine.runtime import progress


@dataclass(kw_only=True)
class SharedSvd(Truncated, abstract=True):
    """The base of both methods. The layers of a group read inputs of one width."""

    sizes_need_statistics: ClassVar[bool] = False

    def moment(self, group: list[Site]) -> Tensor | None:
        """E[x x^T] (n, n) of the group's inputs, up to a factor; None: the identity."""
        return None

    def digest(self, group: list[Site]) -> dict[str, Tensor]:
        """left (sum m_i, k) and right (k, n) of the group's stack, as they are stored."""
        weights = [site.module.weight for site in group]
        stack = torch.cat([weight.detach().double() for weight in weights])  # (sum m_i, n)
        u = weighted_svd(stack, self.moment(group))[0][:, : self.group_rank(group)]
        left, right = project(u, stack)
        return {"left": left.to(weights[0]), "right": right.to(weights[0])}

    def factored(self, sites: list[Site]) -> dict[str, FactoredLinear]:
        """The factored layers, by site name; those that stay dense are left out."""
        layers = {}
        for group in progress.of(self.groups(sites), "rewriting", "groups"):
            if self.stays_dense(group):
                continue
            found = self.digested(group)
            basis = nn.Parameter(found["right"], requires_grad=False)  # one parameter: it counts once
            for site, part in zip(group, found["left"].split([len(site.module.weight) for site in group]), strict=True):
                layers[site.name] = FactoredLinear(part.clone(), basis, bias=site.module.bias)
            self.kept.drop(group[0].name)
        return layers

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        layers = self.factored(sites)
        self.finish(layers.values())
        for name, layer in layers.items():
            self.kept.put(model, name, layer)


@dataclass(kw_only=True)
class BasisSharing(SharedSvd):
    """Shares one basis among consecutive layers of a role (Basis Sharing, arXiv 2410.03765).

    Args:
        group_size: how many consecutive layers of a role share a basis.
        shared: the roles that share, such as ["q", "k", "v"]; layers of the others are factored one by one.
        whiten: weigh the inputs by their second moments; without it no data is used.
        refit: fit the coefficients again, block after block, to the inputs that the compressed blocks give. anchored:
            to what the original model gives for them, layer after layer (anchored.py).
        anchor: as in SVD-LLM (weighted.py).
    """

    group_size: int = 2
    shared: tuple[str, ...] = ("qkv", "q", "k", "v", "up", "gate")
    whiten: bool = True
    refit: bool | str = False
    anchor: tuple[float, ...] = (1.0, 1.0)

    def check(self, sites: list[Site]) -> None:
        need(self.group_size >= 1, self, "group_size", "a group has at least one layer")
        super().check(sites)
        check_refit(self, self.anchor)

    def statistics_needed(self) -> set[str]:
        return {"inputs"} if self.whiten else set()

    def before_budget(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        if self.refit:
            need_losses(self, losses)

    def groups(self, sites: list[Site]) -> list[list[Site]]:
        return consecutive(sites, lambda role: self.group_size if role in self.shared else 1)

    def moment(self, group: list[Site]) -> Tensor | None:
        return sum(self.stats[site.name].inputs.xx for site in group) if self.whiten else None

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        if not self.refit:
            return super().rewrite(model, sites)
        layers = self.factored(sites)
        if self.refit == "anchored":
            anchored(
                self, model, sites, losses, lambda site, moments: self.fitted(site, layers.get(site.name), moments)
            )
        else:
            refit(model, [site for site in sites if site.name in layers], layers, losses)
        self.finish(layers.values())

    def fitted(self, site: Site, layer: FactoredLinear | None, moments: Moments) -> FactoredLinear | None:
        """The layer with its coefficients fitted to what the original model gives, in place."""
        if layer is not None:
            aim = target(site.module.weight, moments, self.anchor, layer.left.shape[1])
            layer.left.copy_(least_squares(aim, layer.left, layer.right, moments[1]))
        return layer


@dataclass(kw_only=True)
class Dfjr(SharedSvd):
    """Shares one basis between q and k, and between gate and up, of a block (arXiv 2402.16319)."""

    def groups(self, sites: list[Site]) -> list[list[Site]]:
        """The layers that share a basis, group by group.

        An attention has one layer of every role, so the i-th q and the i-th k are of one attention. Where they read
        inputs of other widths, as in cross-attention, each is alone.
        """
        joint, seen = defaultdict(list), defaultdict(int)
        for site in sites:
            partner = {"k": "q", "up": "gate"}.get(site.role, site.role)
            joint[partner, seen[site.role], site.module.in_features].append(site)
            seen[site.role] += 1
        return list(joint.values())
