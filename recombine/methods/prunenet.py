"""PruneNet: a policy learns from the weights alone which neurons of the MLPs to keep (arXiv 2501.15296).

One policy for all MLPs of a shape scores the rows of the state W (h, d): a = sigmoid((W P^T + b) s), with
P (h, d), b (h,) and s (h,). k rows are drawn without replacement, with probabilities in proportion to a. The reward is
1 / KS, the Kolmogorov-Smirnov distance between the singular values of W and of the drawn rows. The drawn neurons stay:
rows of up and gate, columns of down. Stores k (2 d) per MLP, or k (3 d) with a gate; all of it trains in distillation.

The state is the gate where there is one, else up; twenty episodes, AdamW at 1e-3 and a discount of 0.99 per layer, as
in the authors' code. Paper: adds relaxed Bernoulli noise to a, takes sum(log a) of the drawn rows as their
log-probability and the bare reward, and at last draws once more. Here: the log-probability of a draw without
replacement (Plackett-Luce), the reward less its mean so far, and at last the best of all slices met, among them the k
highest scores: so the result depends on the seed alone and is no worse than the random slices it began with. The
optional KL term is left out. 1 / KS is at most the number of singular values, where the paper's code says 99999.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recombine.methods.base import Site, need
from recombine.methods.mlp_pruning import Mlp, MlpPruning

DISCOUNT = 0.99
ZERO = 1e-7  # share of the largest singular value below which one is 0


@dataclass(kw_only=True)
class PruneNet(MlpPruning):
    """Args:
    ratio: share of the target layers' weights that is kept, the same of every MLP.
    episodes: how often every layer is sliced while the policy learns.
    policy_lr: learning rate of the policy.
    seed: of the policy's weights and its draws.
    """

    episodes: int = 20
    policy_lr: float = 1e-3
    seed: int = 0

    def check(self, sites: list[Site]) -> None:
        super().check(sites)
        need(self.episodes >= 1, self, "episodes", "the policy learns for at least one episode")
        need(self.policy_lr > 0, self, "policy_lr", "must be more than 0")

    def choose(self, mlps: list[Mlp], counts: list[int]) -> list[Tensor]:
        alike = defaultdict(list)  # shape of the state -> places
        for i, mlp in enumerate(mlps):
            alike[mlp.up.weight.shape].append(i)
        kept: list[Tensor] = [torch.empty(0)] * len(mlps)
        for places in alike.values():
            states = [mlps[i].into[0].weight.detach() for i in places]
            slices = search(states, counts[places[0]], self.episodes, self.policy_lr, self.seed)
            for i, slice_ in zip(places, slices, strict=True):
                kept[i] = slice_
        return kept


class Policy(nn.Module):
    """State W (h, d) -> log of each row's weight in the draw (h,)."""

    def __init__(self, h: int, d: int):
        super().__init__()
        self.project, self.importance = nn.Linear(d, h), nn.Parameter(torch.rand(h))

    def forward(self, w: Tensor) -> Tensor:
        # (W P^T + b) s = W (P^T s) + b s
        return F.logsigmoid(w @ (self.project.weight.T @ self.importance) + self.project.bias @ self.importance)


@torch.enable_grad()
def search(states: list[Tensor], k: int, episodes: int, lr: float, seed: int) -> list[Tensor]:
    """The k rows (k,), ascending, that stay of each state (h, d)."""
    if k == len(states[0]):
        return [torch.arange(k)] * len(states)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Policy(*states[0].shape)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr)
    whole = [spectrum(w) for w in states]
    best: list[tuple[float, Tensor]] = [(0.0, torch.empty(0))] * len(states)
    total = [0.0] * len(states)

    def reward(i: int, kept: Tensor) -> float:
        value = 1 / max(ks_distance(whole[i], spectrum(states[i][kept.to(states[i].device)])), 1 / len(whole[i]))
        if value > best[i][0]:
            best[i] = (value, kept.sort().values)
        return value

    for episode in range(episodes):
        for i, w in enumerate(states):
            scores = policy(w.float().cpu())  # (h,)
            noise = -torch.log(-torch.log(torch.rand(len(scores), generator=generator).clamp(1e-20, 1 - 1e-7)))
            order = (scores.detach() + noise).argsort(descending=True)  # its first k: a draw without replacement
            drawn = scores[order]
            rest = drawn.flip(0).logcumsumexp(0).flip(0)  # log of the weight of all that was left at each draw
            gain = reward(i, order[:k])
            advantage = gain - total[i] / episode if episode else 0.0
            total[i] += gain
            loss = -(DISCOUNT**i) * advantage * (drawn - rest)[:k].sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
    with torch.no_grad():
        for i, w in enumerate(states):
            reward(i, policy(w.float().cpu()).topk(k).indices)
    return [kept for _, kept in best]


def spectrum(w: Tensor) -> Tensor:
    """Singular values (min(h, d),), ascending, by the smaller Gram matrix; those below ZERO of the largest are 0."""
    w = w.double()
    values = torch.linalg.eigvalsh(w.T @ w if len(w) >= w.shape[1] else w @ w.T).clamp(min=0).sqrt()
    return values.where(values > ZERO * values[-1], 0.0)


def ks_distance(a: Tensor, b: Tensor) -> float:
    """Largest gap between the empirical distributions of two ascending samples."""
    both = torch.cat([a, b])
    below = [torch.searchsorted(sample, both, right=True).double() / len(sample) for sample in (a, b)]
    return float((below[0] - below[1]).abs().max())
