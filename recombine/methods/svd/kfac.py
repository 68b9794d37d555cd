"""KFAC-SVD: the SVD that changes the loss least, to second order (ICML 2026, openreview IjIgNPFuCt, with LEMS).

With the Fisher information as C_x (x) C_g (K-FAC, arXiv 1503.05671), C_x = E[x x^T] and C_g = E[g g^T], g = dL/dy, a
weight W' changes the loss by |C_g^1/2 (W - W') C_x^1/2|_F^2. With C_g = A^T A and U the left singular vectors of
A W C_x^1/2, the best weight of rank k is

    W_k = A^-1 U_k U_k^T A W,    and it loses sum(s[k:]^2).

Both are shrunk first: (1 - a) C + a mean(diag C) I. A layer stores left (m, k) and right (k, n). Nothing trains.

The paper was read from its abstract and its code.
Paper's code: takes the lower Cholesky factor L of C_g = L L^T for A, whose metric is L^T L and not C_g
(`left=chol_as_released`). Here: the upper one. With C_x and C_g shrunk alike, W_k is then JACTUS's optimum in the whole
space (jactus/union.py).
Paper's code: for language models it leaves out the first and the last eighth of every sequence. Here: all tokens count.
Paper: the same ratio for every layer, or LEMS. Here: also `allocation` share, BALF's, and error, which takes what a
layer loses as it is: an estimate of the loss, so layers compare.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from recombine.core.drift import Moments
from recombine.core.layer_statistics import Stats
from recombine.core.method import Site, need
from recombine.linalg import project, weighted_svd
from recombine.methods.svd.anchored import target
from recombine.methods.svd.weighted import WeightedSvd

LEFT = ("cholesky", "chol_as_released")


@dataclass(kw_only=True)
class KfacSvd(WeightedSvd):
    """Weighs inputs by E[x x^T] and outputs by E[g g^T], the least change of the loss to second order (KFAC-SVD).

    Args:
        shrink_inputs: a of C_x, in [0, 1].
        shrink_outputs: a of C_g, in (0, 1]; the paper's code has 0.3 for language models and 0.7 for vision.
        clip: scale the gradient of every token to a norm of 0.1 to 10 times the mean norm of its sequence.
        left: the factor A of C_g: cholesky, with A^T A = C_g; or chol_as_released, A A^T = C_g, as in the paper's code.
        as_paper: fields that have their default take those of the paper, which `paper` names.
    """

    shrink_inputs: float = 0.1
    shrink_outputs: float = 0.3
    clip: bool = True
    left: str = "cholesky"
    as_paper: bool = False

    paper: ClassVar[dict[str, Any]] = {"left": "chol_as_released"}
    needs_trained_head: ClassVar[bool] = True

    def check(self, sites: list[Site]) -> None:
        super().check(sites)
        need(0 <= self.shrink_inputs <= 1, self, "shrink_inputs", "is a share, so it must lie in [0, 1]")
        need(0 < self.shrink_outputs <= 1, self, "shrink_outputs", "must lie in (0, 1], or C_g may be singular")
        need(self.left in LEFT, self, "left", f"must be one of {', '.join(LEFT)}")

    def statistics_needed(self) -> set[str]:
        wanted = {"outputs"} if self.only_anchored else {"inputs", "outputs"}
        return wanted | ({"clipped"} if self.clip else set())

    @property
    def upper(self) -> bool:
        """Whether A is an upper triangle."""
        return self.left == "cholesky"

    def root(self, stats: Stats) -> tuple[Tensor, Tensor]:
        """A (m, m) of the outputs' covariance over its mean on the diagonal, and that mean."""
        scale = stats.gg.diagonal().mean()  # gradients are tiny, so A without it would be too
        outputs = stats.gg / torch.where(scale > 0, scale, 1.0)
        return torch.linalg.cholesky(shrunk(outputs, self.shrink_outputs), upper=self.upper), scale

    def optimum(self, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        stats = self.stats[site.name]
        root, scale = self.root(stats)
        turned = root @ site.module.weight.detach().double()
        u, s = weighted_svd(turned, shrunk(stats.inputs.xx, self.shrink_inputs))
        tokens = stats.tokens if self.allocation == "error" else 1  # layers compare by the sum over theirs
        return *self.turned_back(root, u[:, : self.largest(site)], turned), s * (scale * tokens).sqrt()

    def turned_back(self, root: Tensor, u: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """left (m, k) and right (k, n) of A^-1 u u^T (A W)."""
        left, right = project(u, turned)
        return torch.linalg.solve_triangular(root, left, upper=self.upper), right

    def digest(self, group: list[Site]) -> dict[str, Tensor]:
        found = {} if self.only_anchored else super().digest(group)
        if self.refit == "anchored":
            found["root"] = self.root(self.stats[group[0].name])[0].float()
        return found

    def anchored_pair(self, site: Site, moments: Moments, k: int) -> tuple[Tensor, Tensor]:
        weight, root = site.module.weight.detach(), self.digested([site])["root"].double()
        aim = target(root @ weight.double(), moments, self.anchor, k)
        u, _ = weighted_svd(aim, shrunk(moments[1], self.shrink_inputs))
        left, right = self.turned_back(root, u[:, :k], aim)
        return left.to(weight), right.to(weight)


def shrunk(moment: Tensor, share: float) -> Tensor:
    """(1 - share) C + share mean(diag C) I, for C (d, d); the identity, where C = 0, counts as its mean."""
    mean = moment.diagonal().mean()
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return (1 - share) * moment + share * torch.where(mean > 0, mean, 1.0) * eye
