"""The ways to find a group's basis (m n / s, r) and mixers [A_1 ... A_g] (r, g s): CRISP's `fit` (see crisp.py).

m (m n / s, g s): the group's weights, stacked.
"""

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recombine.core.method import Site
from recombine.layers.shared_basis import GATES
from recombine.linalg import shrink
from recombine.methods.crisp.activation_aware import fit_outputs
from recombine.methods.crisp.closed_form import random_orthogonal, stack, truncate, ungate
from recombine.methods.crisp.clustering import merge
from recombine.methods.crisp.mimicry import mimic

if TYPE_CHECKING:
    from recombine.methods.crisp.method import Crisp

log = logging.getLogger(__name__)


def closed(group: list[Site], m: Tensor, rank: int, how: "Crisp", rng: torch.Generator) -> tuple[Tensor, Tensor]:
    return ungate(*truncate(m, rank), how.gate, how.gauge)


def random(group: list[Site], m: Tensor, rank: int, how: "Crisp", rng: torch.Generator) -> tuple[Tensor, Tensor]:
    return ungate(*random_orthogonal(m, rank, rng), how.gate, how.gauge)


def mimicry(group: list[Site], m: Tensor, rank: int, how: "Crisp", rng: torch.Generator) -> tuple[Tensor, Tensor]:
    *factors, loss = mimic(dense(group), rank, how.chunk, how.gate, how.placement, how.mimicry, rng)
    log.info("%s and %d more: mimicry's loss %.3g", group[0].name, len(group) - 1, loss)
    return factors


def cluster(group: list[Site], m: Tensor, rank: int, how: "Crisp", rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Alg. 5 from an exact teacher."""
    if how.cluster.teacher == "mimicry":
        basis, mixers, _ = mimic(dense(group), m.shape[1], how.chunk, how.gate, "pre", how.mimicry, rng)
        basis, mixers = basis.double(), mixers.double()
    else:
        basis, mixers = closed(group, m, m.shape[1], how, rng)
    if how.cluster.printed:
        return merge(basis, mixers, m, rank, how.cluster)
    return ungate(*merge(basis, GATES[how.gate](mixers), m, rank, how.cluster), how.gate, how.gauge)


def aware(group: list[Site], m: Tensor, rank: int, how: "Crisp", rng: torch.Generator) -> tuple[Tensor, Tensor]:
    inputs = [how.stats[site.name].inputs for site in group]
    moments = [shrink(one.xx, one.x4, one.tokens, floor=0.01) for one in inputs]
    return ungate(*fit_outputs(dense(group), moments, rank, how.chunk, how.alternations), how.gate, how.gauge)


FITS = {"closed": closed, "aware": aware, "cluster": cluster, "random": random, "mimicry": mimicry}


def dense(group: list[Site]) -> list[Tensor]:
    return [site.linear.weight.detach().double() for site in group]


def fit(group: list[Site], rank: int, how: "Crisp", rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The basis (m n / s, r) and the mixers [A_1 ... A_g] (r, g s) of a group."""
    return FITS[how.fit](group, stack(group, how.chunk), rank, how, rng)
