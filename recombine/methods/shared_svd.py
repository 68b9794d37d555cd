"""One basis for several layers: Basis Sharing (arXiv 2410.03765) and data-free joint rank-k (arXiv 2402.16319).

The weights W_i (m_i, n) of a group stand in one stack W (sum m_i, n), of which the best rank k is kept:
W_i ~ left_i right, in the papers' convention (in, out) S [W_1^T ... W_g^T] = U Sigma V^T. Stored per group:
right (k, n), one parameter of all its layers, and left_i (m_i, k) of each; k (n + sum m_i) <= ratio n sum m_i.
Trains: nothing.

Basis Sharing groups consecutive layers of one role and weighs inputs with S S^T = E[x x^T] summed over the group.
Paper: at high ratios the coefficients are fitted again to the inputs that the compressed layers give. Here: not.
DFJR groups q with k, and gate with up, of one block, and looks at no data.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recombine.layers import FactoredLinear
from recombine.linalg import project, weighted_svd
from recombine.methods.base import Site, need
from recombine.methods.svd import Truncated


@dataclass(kw_only=True)
class SharedSvd(Truncated):
    """What both have in common; the layers of a group read inputs of one width."""

    def moment(self, group: list[Site]) -> Tensor | None:
        """E[x x^T] (n, n) of the group's inputs, times any number; None: the identity."""
        return None

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        for group in self.groups(sites):
            weights = [site.linear.weight for site in group]
            stack = torch.cat([weight.detach().double() for weight in weights])  # (sum m_i, n)
            u = weighted_svd(stack, self.moment(group))[0][:, : self.group_rank(group)]
            left, right = project(u, stack)
            basis = nn.Parameter(right.to(weights[0]), requires_grad=False)  # one parameter: it counts once
            for site, part in zip(group, left.split([len(weight) for weight in weights]), strict=True):
                layer = FactoredLinear(part.to(weights[0]), basis, bias=site.linear.bias)
                model.set_submodule(site.name, layer)


@dataclass(kw_only=True)
class BasisSharing(SharedSvd):
    """Args:
    group_size: how many consecutive layers of a role share a basis.
    shared: the roles that do; the others are factored layer by layer.
    whiten: weigh the inputs by their second moments; without it no data is looked at.
    """

    group_size: int = 2
    shared: tuple[str, ...] = ("qkv", "q", "k", "v", "up", "gate")
    whiten: bool = True

    def check(self, sites: list[Site]) -> None:
        need(self.group_size >= 1, self, "group_size", "a group has at least one layer")
        super().check(sites)

    def wants(self) -> set[str]:
        return {"inputs"} if self.whiten else set()

    def groups(self, sites: list[Site]) -> list[list[Site]]:
        """Runs of consecutive layers of one role and shape; the last run may be shorter."""
        alike = defaultdict(list)
        for site in sites:
            alike[site.role, site.linear.weight.shape].append(site)
        size = {role: self.group_size if role in self.shared else 1 for role, _ in alike}
        return [run[i : i + size[role]] for (role, _), run in alike.items() for i in range(0, len(run), size[role])]

    def moment(self, group: list[Site]) -> Tensor | None:
        return sum(self.stats[site.name].inputs.xx for site in group) if self.whiten else None


@dataclass(kw_only=True)
class Dfjr(SharedSvd):
    """Data-free joint rank-k approximation."""

    def groups(self, sites: list[Site]) -> list[list[Site]]:
        """A block has one layer of every role, so the i-th q and the i-th k are of one block."""
        joint, seen = defaultdict(list), defaultdict(int)
        for site in sites:
            partner = {"k": "q", "up": "gate"}.get(site.role, site.role)
            joint[partner, seen[site.role]].append(site)
            seen[site.role] += 1
        return list(joint.values())
