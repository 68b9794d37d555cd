"""PruneNet: a policy learns from the weights alone which neurons of the MLPs to keep (arXiv 2501.15296).

One policy for all MLPs of a shape scores the rows of the state W (h, d), which is the gate's weight where there is one
(the second half of a GEGLU) and else up's: a = sigmoid((W P^T + b) s), with P (h, d), b (h,) and s (h,). k rows are
drawn without replacement, with probabilities in proportion to a. The reward is 1 / KS, with KS the Kolmogorov-Smirnov
distance between the singular values of W and those of the drawn rows. The drawn neurons stay: rows of up and gate,
columns of down. An MLP stores k (2 d) weights, or k (3 d) with a gate. All of them train in distillation.

Twenty episodes, AdamW at 1e-3 and a discount of 0.99 per layer are those of the authors' code. There is no KL term,
which is optional in it. The result depends on the seed alone.
Paper: relaxed Bernoulli noise is added to a; sum(log a) of the drawn rows counts as their log-probability; the reward
is taken as it is; the last policy draws once more (`estimator=paper`). Here: the log-probability of a draw without
replacement (Plackett-Luce); the reward less its mean so far; the best of all slices met, among them the k highest
scores. So the result is no worse than the random slices it began with.
Paper's code: run again, its script loads the policy of the best reward. Here: `estimator=paper` is its first run.
Paper's code: 1 / KS is at most 99999, and gradients are clipped too late to matter. Here: 1 / KS is at most the number
of singular values, and gradients are clipped to 1.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from recombine.core.method import Site, need
from recombine.methods.pruning.mlp import Mlp, MlpPruning
from recombine.methods.pruning.prunenet_policy import search
from recombine.runtime.kinds import Epochs, Rate, Seed


@dataclass(kw_only=True)
class PruneNet(MlpPruning):
    """Keeps the neurons that a learnt policy draws from each MLP (arXiv 2501.15296).

    Args:
        ratio: share of the target layers' weights that is kept; every MLP keeps the same share of its neurons.
        episodes: how often rows are drawn from every layer while the policy learns.
        policy_lr: learning rate of the policy.
        seed: of the policy's weights and its draws.
        estimator: of the policy's gradient: exact (Plackett-Luce, with a baseline) or paper (the authors' code).
        as_paper: fields that have their default take those of the paper, which `paper` names.
    """

    episodes: Epochs = 20
    policy_lr: Rate = 1e-3
    seed: Seed = 0
    estimator: str = "exact"
    as_paper: bool = False

    paper: ClassVar[dict[str, Any]] = {"estimator": "paper"}

    def check(self, sites: list[Site]) -> None:
        super().check(sites)
        need(self.episodes >= 1, self, "episodes", "the policy learns for at least one episode")
        need(self.estimator in ("exact", "paper"), self, "estimator", "must be exact or paper")
        need(self.policy_lr > 0, self, "policy_lr", "must be more than 0")

    def choose(self, mlps: list[Mlp], counts: list[int]) -> list[Tensor]:
        alike = defaultdict(list)  # shape of the state -> places
        for i, mlp in enumerate(mlps):
            alike[mlp.up.weight.shape].append(i)
        kept: list[Tensor] = [torch.empty(0)] * len(mlps)
        for places in alike.values():
            states = [mlps[i].into[0].weight.detach()[-mlps[i].width :] for i in places]
            how = self.episodes, self.policy_lr, self.seed, self.estimator
            slices = search(states, counts[places[0]], *how)
            for i, slice_ in zip(places, slices, strict=True):
                kept[i] = slice_
        return kept
