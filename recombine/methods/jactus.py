"""JACTUS: joint adaptation and compression with a task-aware union of subspaces (arXiv 2605.02829, Alg. 1).

Calibration gives C_x = E[x x^T] and C_g = E[g g^T], g = dL/dy, each scaled to a mean eigenvalue of 1 and shrunk
(Ledoit & Wolf 2004). U_w, V_w hold the share alpha of the energy of W = U S V^T, V_x the share beta of C_x, U_g the
share gamma of C_g; Q_L = orth[U_w, U_g], Q_R = orth[V_w, V_x]. Inside the union, W_k minimises
|C_g^1/2 (W - W_k) C_x^1/2|_F: with Q_L^T C_g Q_L = R_L^T R_L, Q_R^T C_x Q_R = R_R^T R_R (Cholesky),

    T = R_L^-T Q_L^T C_g W C_x Q_R R_R^-1 = P L R^T,   W_k = (Q_L R_L^-1 P_k) L_k (Q_R R_R^-1 R_k)^T.

Ranks are allocated over all layers by marginal gain L_j^2 per weight. QR of the outer factors leaves orthonormal
left (m, k) and right (k, n), frozen, and a dense core (k, k), which trains. Stored: k (m + n) + k^2; after training
the core folds away, which leaves k (m + n).

Paper (read from its abstract, figures and reviews; no code): the caption gives the gradient directions to the input
side. Here: C_g weighs the output side, where g lives. Paper: no values of alpha, beta, gamma. Here: large, as only the
calibration pays for a wide union, and .95, .99, .99 lose accuracy (experiments/LOG.md). Paper: every layer is factored.
Here: a layer may stay dense where that is cheaper (`dense`), or not, as the paper has it: dense="none".
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from recombine.allocation import greedy, lagrangian
from recombine.layers import DeltaLinear, FactoredLinear
from recombine.methods.base import Method, Site, need
from recombine.methods.jactus_union import Covariance, Whole, covariance, union_factors

SHARES = ("alpha", "beta", "gamma", "ratio")


@dataclass(kw_only=True)
class Jactus(Method):
    """Args:
    alpha, beta, gamma: shares of the energy of W, C_x and C_g that the union keeps, in (0, 1].
    ratio: share of the target layers' weights that is kept.
    counted: stored counts the core's k^2 as well, deployed what is left once it is folded away.
    allocation: greedy (the paper's) or lagrangian.
    gain: weight, or weight+grad, which turns the subspaces towards the gradient E[g x^T] as well.
    eta: how much: the gradient's share relative to the weight's, both as Frobenius norms of the whitened matrices.
    dense: a layer left dense trains nothing (frozen), itself (full) or a core on its top directions (core_on_top_k);
        none: no layer is left dense.
    top_k: the size of that core.
    floor: least shrinkage of the covariances.
    """

    alpha: float = 0.99
    beta: float = 0.999
    gamma: float = 0.999
    ratio: float = 0.8
    counted: str = "stored"
    allocation: str = "greedy"
    gain: str = "weight"
    eta: float = 0.3
    dense: str = "core_on_top_k"
    top_k: int = 32
    floor: float = 0.01

    compresses: ClassVar[bool] = True
    knobs: ClassVar[dict[str, str]] = {"retained": "ratio", "memory": "ratio"}

    def __post_init__(self):
        super().__post_init__()
        self._whole: dict[str, Whole] = {}  # by site, for one model
        self._eigen: dict[int, Covariance] = {}  # of C_x, by the statistics that layers share

    def check(self, sites: list[Site]) -> None:
        for name in SHARES:
            need(0 < getattr(self, name) <= 1, self, name, "is a share, so it must lie in (0, 1]")
        need(self.counted in ("stored", "deployed"), self, "counted", "must be stored or deployed")
        need(self.allocation in ("greedy", "lagrangian"), self, "allocation", "must be greedy or lagrangian")
        need(self.gain in ("weight", "weight+grad"), self, "gain", "must be weight or weight+grad")
        need(self.eta >= 0, self, "eta", "must be at least 0")
        rules = ("none", "frozen", "full", "core_on_top_k")
        need(self.dense in rules, self, "dense", f"must be one of {', '.join(rules)}")
        need(self.top_k >= 1, self, "top_k", "a core has at least one direction")
        need(0 < self.floor <= 1, self, "floor", "must lie in (0, 1], or a covariance may be singular")

    def wants(self) -> set[str]:
        return {"inputs", "outputs"} | ({"cross"} if self.gain == "weight+grad" else set())

    def choices(self, knob: str, sites: list[Site]) -> list[float]:
        dense = sum(site.linear.weight.numel() for site in sites)
        least = sum(self.cost(*site.linear.weight.shape, 1) for site in sites) / dense
        return [i / 1000 for i in range(int(1000 * least) + 1, 1001)]

    def whole(self, site: Site) -> Whole:
        """The layer's factors at the largest rank that may be asked for."""
        if site.name not in self._whole:
            weight, stats = site.linear.weight, self.stats[site.name]
            key = id(stats.inputs)
            if key not in self._eigen:
                self._eigen[key] = covariance(stats.inputs.xx, stats.inputs.x4, stats.inputs.tokens, self.floor)
            outputs = covariance(stats.gg, stats.g4, stats.tokens, self.floor)
            shares = (self.alpha, self.beta, self.gamma)
            turn = (stats.gx, self.eta) if self.gain == "weight+grad" else None
            found = union_factors(weight.detach().double(), self._eigen[key], outputs, shares, turn)
            r = max(self.most(*weight.shape), self.top_k)
            keep = torch.promote_types(weight.dtype, torch.float32)  # float64 is too much
            self._whole[site.name] = Whole(
                found.left[:, :r].to(keep), found.inner[:r, :r].to(keep), found.right[:r].to(keep), found.gains
            )
        return self._whole[site.name]

    def cost(self, m: int, n: int, k: int) -> int:
        return k * (m + n) + (k * k if self.counted == "stored" else 0)

    def dense_cost(self, m: int, n: int, core: int) -> int:
        core = core if self.dense == "core_on_top_k" and self.counted == "stored" else 0
        return m * n + self.cost(m, n, core)

    def top(self, site: Site) -> int:
        """The size of the core on a layer that stays dense."""
        return min(self.top_k, len(self.whole(site).right))

    def most(self, m: int, n: int) -> int:
        """The largest rank that is worth its weights."""
        if self.dense == "none":
            return min(m, n)
        return max(
            k for k in range(1, min(m, n) + 1) if k == 1 or self.cost(m, n, k) < self.dense_cost(m, n, self.top_k)
        )

    def ranks(self, sites: list[Site]) -> list[int | None]:
        """The rank of every layer; None: it stays dense."""
        costs, losses, top = [], [], []
        for site in sites:
            m, n = site.linear.weight.shape
            whole = self.whole(site)
            tail = whole.gains.sum() - whole.gains.cumsum(0)
            r = min(len(whole.right), self.most(m, n))
            costs.append([self.cost(m, n, k) for k in range(1, r + 1)])
            losses.append(tail[:r].tolist())
            if self.dense != "none":
                costs[-1].append(self.dense_cost(m, n, self.top(site)))
                losses[-1].append(0.0)
            top.append(r)
        budget = self.ratio * sum(site.linear.weight.numel() for site in sites)
        spend = {"greedy": greedy, "lagrangian": lagrangian}[self.allocation]
        chosen = spend([torch.tensor(c) for c in costs], [torch.tensor(x) for x in losses], budget)
        return [None if i == r else i + 1 for i, r in zip(chosen, top, strict=True)]

    def kept(self, sites: list[Site]) -> int:
        kept = 0
        for site, k in zip(sites, self.ranks(sites), strict=True):
            m, n = site.linear.weight.shape
            kept += self.dense_cost(m, n, self.top(site)) if k is None else self.cost(m, n, k)
        return kept

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        stored = trained = 0
        for site, k in zip(sites, self.ranks(sites), strict=True):
            m, n = site.linear.weight.shape
            core = k or (self.top(site) if self.dense == "core_on_top_k" else 0)
            stored += core * (m + n) + core * core + (m * n if k is None else 0)
            trained += m * n if k is None and self.dense == "full" else core * core
        return stored, trained

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        for site, k in zip(sites, self.ranks(sites), strict=True):
            model.set_submodule(site.name, self.layer(site, k))
            del self._whole[site.name]

    def layer(self, site: Site, k: int | None) -> nn.Module:
        """Rank k as orthonormal factors around a core; None: the dense layer, under the rule for those."""
        linear, weight = site.linear, site.linear.weight
        if k is None and self.dense in ("frozen", "full"):
            weight.requires_grad_(self.dense == "full")
            return linear
        left, inner, right, _ = self.whole(site)
        k_top = self.top(site) if k is None else k
        ql, tl = torch.linalg.qr(left[:, :k_top].double())
        qr, tr = torch.linalg.qr(right[:k_top].T.double())
        if k is None:
            core = torch.zeros(k_top, k_top, dtype=weight.dtype)
            layer = DeltaLinear(weight, ql.to(weight), qr.T.to(weight), bias=linear.bias, core=core.to(weight))
        else:
            core = tl @ inner[:k, :k].double() @ tr.T
            layer = FactoredLinear(ql.to(weight), qr.T.to(weight), core=core.to(weight), bias=linear.bias)
        layer.core.requires_grad_(True)
        return layer
