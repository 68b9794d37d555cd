"""CRISP: a basis shared by a group of layers and a small gated mixer for each (CRISP Eq. 4, Alg. 1-4).

W_i = reshape(B . G_i, (m, n)), G_i = silu(A_i). g consecutive layers of one role and shape share B
(m n / s, r), frozen in adaptation; A_i (r, s) trains. Stored per group: r m n / s + g r s. Exact at r = g s.

Paper: neural mimicry fits B and A_i by gradient descent; r and s trade places in its Fig. 5. Here: the closed
form, of which mimicry is an approximation, and the names `basis_rank` (r) and `chunk` (s). With
M = [M_1 ... M_g] (m n / s, g s), M_i = reshape(W_i, (m n / s, s)), and the eigenvectors V of M^T M,
B = M V_r and [G_1 ... G_g] = V_r^T minimise |M - B G|. A row of G is only defined up to its scale, so each is
turned and scaled until it lies where SiLU can be inverted.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor, nn

from recombine.errors import UsageError
from recombine.layers import SharedBasisLinear
from recombine.linalg import energy_rank, silu_inverse
from recombine.methods.base import Method, Site, need

LOWEST = -0.2  # the gated mixers' minimum: SiLU reaches -0.278, where its slope is 0
HIGHEST = 8.0  # and their maximum, for rows without a negative entry worth the name


@dataclass(kw_only=True)
class Crisp(Method):
    """Args:
    chunk: length s of the pieces that rows are cut into; divides the width of every target layer.
    group_size: how many consecutive layers of a role share a basis.
    basis_rank: columns r of a basis, at most group_size * chunk; None: that many, which is exact.
    energy: the smallest basis_rank per group that keeps this share of the energy, instead of `basis_rank`.
    gate: silu, or none for the linear map of RECAST.
    gauge: svd scales every row of G alone (B's columns differ in norm), balanced all rows of a group alike.
    """

    targets: tuple[str, ...] = ("qkv", "o", "up", "down", "gate?")
    chunk: int = 32
    group_size: int = 2
    basis_rank: int | None = None
    energy: float | None = None
    gate: str = "silu"
    gauge: str = "svd"

    compresses: ClassVar[bool] = True
    rivals: ClassVar[tuple[str, ...]] = ("basis_rank", "energy")
    knobs: ClassVar[dict[str, str]] = {
        "retained": "basis_rank",
        "memory": "basis_rank",
        "energy": "energy",
        "trainable": "chunk",
    }

    def check(self, sites: list[Site]) -> None:
        need(self.group_size >= 1, self, "group_size", "a group has at least one layer")
        need(self.chunk >= 1, self, "chunk", "a chunk has at least one entry")
        for site in sites:
            width = site.linear.in_features
            divisors = [d for d in range(1, width + 1) if width % d == 0]
            near = min(divisors, key=lambda d: abs(d - self.chunk))
            need(width % self.chunk == 0, self, "chunk", f"does not divide {site.name}'s width {width}; {near} does")
        if self.basis_rank is not None:
            most = self.group_size * self.chunk
            why = f"must be from 1 to group_size * chunk = {most}, where the model is exact"
            need(1 <= self.basis_rank <= most, self, "basis_rank", why)
        if self.energy is not None:
            need(0 < self.energy <= 1, self, "energy", "is a share of the energy, so it must lie in (0, 1]")
        need(self.gate in ("silu", "none"), self, "gate", "must be silu or none")
        need(self.gauge in ("svd", "balanced"), self, "gauge", "must be svd or balanced")

    def choices(self, knob: str, sites: list[Site]) -> Sequence[int]:
        if knob == "basis_rank":
            return range(1, self.group_size * self.chunk + 1)
        width = gcd(*(site.linear.in_features for site in sites))
        return [d for d in range(1, width + 1) if width % d == 0]

    def groups(self, sites: list[Site]) -> list[list[Site]]:
        """Runs of `group_size` consecutive layers of one role and shape; the last run may be shorter."""
        alike = defaultdict(list)
        for site in sites:
            alike[site.role, site.linear.weight.shape].append(site)
        g = self.group_size
        return [layers[i : i + g] for layers in alike.values() for i in range(0, len(layers), g)]

    def group_rank(self, group: list[Site]) -> int:
        most = len(group) * self.chunk
        if self.energy is not None:
            return energy_rank(spectrum(group, self.chunk)[0].sqrt(), self.energy)
        return most if self.basis_rank is None else min(self.basis_rank, most)

    def sizes(self, sites: list[Site]) -> tuple[int, int]:
        groups = self.groups(sites)
        ranks = [self.group_rank(group) for group in groups]
        mixers = sum(len(group) * r * self.chunk for group, r in zip(groups, ranks, strict=True))
        bases = sum(group[0].linear.weight.numel() // self.chunk * r for group, r in zip(groups, ranks, strict=True))
        return bases + mixers, mixers

    def rewrite(self, model: nn.Module, sites: list[Site], losses=None) -> None:
        for group in self.groups(sites):
            basis, mixers = retrofit(group, self.group_rank(group), self.chunk, self.gate, self.gauge)
            weight = group[0].linear.weight
            basis = nn.Parameter(basis.to(weight), requires_grad=False)  # one parameter: it counts once
            for site, mixer in zip(group, mixers, strict=True):
                linear = site.linear
                layer = SharedBasisLinear(basis, mixer.to(weight), linear.in_features, self.gate, linear.bias)
                layer.mixer.requires_grad_(True)
                model.set_submodule(site.name, layer)


def stack(group: list[Site], chunk: int) -> Tensor:
    """M = [M_1 ... M_g], (m n / s, g s) in float64."""
    return torch.cat([site.linear.weight.detach().double().reshape(-1, chunk) for site in group], 1)


def spectrum(group: list[Site], chunk: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (g s,), descending and not negative, and eigenvectors (g s, g s) of M^T M."""
    m = stack(group, chunk)
    values, vectors = torch.linalg.eigh(m.T @ m)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def retrofit(group: list[Site], rank: int, chunk: int, gate: str, gauge: str) -> tuple[Tensor, list[Tensor]]:
    """The basis (m n / s, r) and the mixers A_i (r, s) that fit the group's weights best, in float64."""
    values, vectors = spectrum(group, chunk)
    if not torch.isfinite(values).all():
        raise UsageError(f"{group[0].name} has weights that are not finite: the checkpoint is damaged, load another")
    gated = vectors[:, :rank].T  # (r, g s)
    sign = gated.gather(1, gated.abs().argmax(1, keepdim=True)).sign()
    gated = gated * torch.where(sign == 0, 1.0, sign)  # the largest entry of each row positive
    if gauge == "balanced":  # rows in proportion to the square root of their singular value
        gated = gated * (values[:rank, None] / values[0].clamp(min=1e-300)).clamp(min=1e-12).pow(0.25)
    low, high = gated.amin(1, keepdim=True), gated.amax(1, keepdim=True)
    if gauge == "balanced":
        low, high = low.amin(), high.amax()
    gated = gated * torch.minimum(LOWEST / low.clamp(max=-1e-12), HIGHEST / high)
    # rows of `gated` are orthogonal: the best B for them is M G^T / |row|^2
    basis = stack(group, chunk) @ (gated / gated.square().sum(1, keepdim=True)).T
    mixer = silu_inverse(gated) if gate == "silu" else gated
    return basis, list(mixer.split(chunk, 1))
