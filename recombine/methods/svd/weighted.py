"""SVD that weighs the inputs of a layer: FWSVD (arXiv 2207.00112), ASVD (2312.05821), SVD-LLM (2403.07378).

With D = W - W' and W' of rank k, each method minimises tr(D M D^T) for its own M (n, n):

    FWSVD     M = diag(sum_i F_ij), F = E[(dL/dW)^2]     SVD(I^1/2 W) in the paper's convention, W (in, out)
    ASVD      M = diag(E|x_j|^(2 alpha))                 SVD(W S) S^-1, S = diag(E|x_j|^alpha)
    SVD-LLM   M = E[x x^T]                               SVD(W S) S^-1, S S^T = M: the least output error

A layer stores left (m, k) and right (k, n) with left right = U_k U_k^T W, where U are the left singular vectors of
W M^1/2. That is the papers' W' without their S^-1, so some inputs, or all, may be zero. Nothing trains.

FWSVD. The paper writes y = x W with W (in, out). It gives every row of W, the weights that multiply one input, the sum
of their Fisher information. Of an nn.Linear's weight (out, in) those are the columns.
Paper: F is the mean over samples (`calibration.batch_size=1`). Here: it is the mean over calibration batches.

ASVD. Paper: ranks come from a search over sensitivities. Here: the same ratio for every layer, as other papers compare
it.

SVD-LLM. Paper: at high ratios its first version fits left again to the inputs that compressed layers give (`refit`).
Here: all layers are fitted to the original model's inputs. With `refit=anchored` they are those of AA-SVD or SAES-SVD.
Paper: LoRA on U, then on V. Here: LoRA on the whole layer (method@compressor=svd_llm method=lora).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from recombine.core.calibration import Losses
from recombine.core.drift import Moments
from recombine.core.method import Site, need, need_losses
from recombine.layers import FactoredLinear
from recombine.linalg import project, weighted_svd
from recombine.methods.svd.allocated import Allocated
from recombine.methods.svd.anchored import target
from recombine.methods.svd.refit import anchored, check_refit, least_squares, refit


@dataclass(kw_only=True)
class WeightedSvd(Allocated, abstract=True):
    """The base of the three methods.

    Args:
        refit: fit the left factors again, block after block, to the inputs that the compressed blocks give. anchored:
            fit both factors to what the original model gives for them, layer after layer (anchored.py); ASVD and FWSVD
            keep their right factors.
        anchor: the least and the largest share of the original model's outputs in what anchored layers aim at. [1, 1]:
            AA-SVD. [0.25, 0.75]: SAES-SVD, which chooses it for every layer.
    """

    refit: bool | str = False
    anchor: tuple[float, ...] = (1.0, 1.0)

    def check(self, sites: list[Site]) -> None:
        super().check(sites)
        check_refit(self, self.anchor)

    @property
    def only_anchored(self) -> bool:
        """Whether nothing is computed from the original model's inputs."""
        return self.refit == "anchored" and self.allocation == "uniform"

    def before_budget(self, model: nn.Module, sites: list[Site], losses: Losses | None) -> None:
        super().before_budget(model, sites, losses)
        if self.refit:
            need_losses(self, losses)

    def moment(self, site: Site) -> Tensor:
        """The layer's M (n, n), or its diagonal (n,)."""
        raise NotImplementedError(type(self).__name__)

    def optimum(self, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """left (m, k) and right (k, n) at the largest rank k that may be needed, and the spectrum s (N,), in float64.

        The first columns and rows of left and right are the optimum at a smaller rank.
        """
        weight = site.module.weight
        u, s = weighted_svd(weight, self.moment(site))
        return *project(u[:, : self.largest(site)], weight), s

    def digest(self, group: list[Site]) -> dict[str, Tensor]:
        """left and right of `optimum`, in the type of W; and s, where ranks depend on it."""
        left, right, s = self.optimum(group[0])
        found = {"left": left.to(group[0].module.weight), "right": right.to(group[0].module.weight)}
        return found if self.allocation == "uniform" else found | {"s": s}

    def pair(self, site: Site, k: int) -> tuple[Tensor, Tensor]:
        found = self.digested([site])
        return found["left"][:, :k].clone(), found["right"][:k].clone()

    def anchored_pair(self, site: Site, moments: Moments, k: int) -> tuple[Tensor, Tensor]:
        """left and right of a layer at rank k, fitted to what the original model gives, in the type of its weight."""
        left, right = self.pair(site, k)
        aim = target(site.module.weight, moments, self.anchor, k)
        return least_squares(aim, left, right, moments[1]).to(left), right

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        if not self.refit:
            return super().rewrite(model, sites)
        if self.refit == "anchored":
            return self.rewrite_anchored(model, sites, losses)
        layers = dict(self.factored(sites))
        refit(model, [site for site in sites if site.name in layers], layers, losses)
        self.finish(layers.values())

    def rewrite_anchored(self, model: nn.Module, sites: list[Site], losses: Losses) -> None:
        """`rewrite` with refit=anchored."""
        ranks = {site.name: k for site, k in zip(sites, self.ranks(sites), strict=True)}

        def fitted(site: Site, moments: Moments) -> FactoredLinear | None:
            if (k := ranks[site.name]) is None:
                return None
            layer = FactoredLinear(*self.anchored_pair(site, moments, k), bias=site.module.bias)
            self.finish([layer])
            self.kept.drop(site.name)
            return layer

        anchored(self, model, sites, losses, fitted)


def truncated(site: Site, u: Tensor) -> FactoredLinear:
    """The layer with the weight u u^T W, for an orthonormal u (m, k)."""
    return FactoredLinear(*stored(u, site.module.weight), bias=site.module.bias)


def stored(u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """left (m, k) and right (k, n) of u u^T W, in the type of W (m, n)."""
    left, right = project(u, weight)
    return left.to(weight), right.to(weight)


@dataclass(kw_only=True)
class Fwsvd(WeightedSvd):
    """Weighs each input by the Fisher information of its weights (FWSVD)."""

    def statistics_needed(self) -> set[str]:
        return {"fisher"}

    def moment(self, site: Site) -> Tensor:
        return self.stats[site.name].fisher.sum(0)


@dataclass(kw_only=True)
class Asvd(WeightedSvd):
    """Weighs each input by a power of its mean magnitude (ASVD).

    Args:
        alpha: that power; 0 is the plain SVD.
    """

    alpha: float = 0.5

    def check(self, sites: list[Site]) -> None:
        super().check(sites)
        need(self.alpha >= 0, self, "alpha", "is the power of a magnitude, so it must be 0 or more")

    def statistics_needed(self) -> set[str]:
        return {"magnitudes"}

    def moment(self, site: Site) -> Tensor:
        return self.stats[site.name].inputs.absolute.pow(2 * self.alpha)


@dataclass(kw_only=True)
class SvdLlm(WeightedSvd):
    """Weighs the inputs by their second moments, which gives the least output error (SVD-LLM)."""

    def statistics_needed(self) -> set[str]:
        return set() if self.only_anchored else {"inputs"}

    def moment(self, site: Site) -> Tensor:
        return self.stats[site.name].inputs.xx

    def anchored_pair(self, site: Site, moments: Moments, k: int) -> tuple[Tensor, Tensor]:
        aim = target(site.module.weight, moments, self.anchor, k)
        left, right = project(weighted_svd(aim, moments[1])[0][:, :k], aim)
        return left.to(site.module.weight), right.to(site.module.weight)
