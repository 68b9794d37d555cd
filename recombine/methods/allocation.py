"""Spends one budget over many layers.

`greedy` and `lagrangian`: each layer offers a list of options, a multiple-choice knapsack. `round_to_budget`: each layer has a
real number that is to be rounded.

A layer's options are two tensors, costs (whole numbers, ascending) and losses (descending). For ranks 1, 2, ... and
then the dense layer itself, the cost is what each stores and the loss what each gets wrong. Both functions return the
index of the option that every layer takes, within the budget; the first option of every layer is always affordable or
refused.
"""

import heapq

from torch import Tensor

from recombine.errors import UsageError


def greedy(costs: list[Tensor], losses: list[Tensor], budget: float) -> list[int]:
    """One option at a time to the layer where it saves most loss per cost (JACTUS Alg. 1), while it still fits."""
    chosen, left = [0] * len(costs), budget - least(costs, budget)
    heap: list[tuple[float, int]] = []

    def offer(layer: int) -> None:
        i = chosen[layer]
        if i + 1 < len(costs[layer]):
            gain, cost = losses[layer][i] - losses[layer][i + 1], costs[layer][i + 1] - costs[layer][i]
            heapq.heappush(heap, (-gain / max(cost, 1e-12), layer))

    costs, losses = [c.tolist() for c in costs], [loss.tolist() for loss in losses]
    for layer in range(len(costs)):
        offer(layer)
    while heap:
        _, layer = heapq.heappop(heap)
        step = costs[layer][chosen[layer] + 1] - costs[layer][chosen[layer]]
        if step <= left:  # a layer whose next option does not fit is done
            chosen[layer] += 1
            left -= step
            offer(layer)
    return chosen


def lagrangian(costs: list[Tensor], losses: list[Tensor], budget: float, fill: bool = True) -> list[int]:
    """Each layer minimises loss + price * cost; the lowest price that the budget allows, by bisection.

    That is optimal for what it spends. The rest goes to the layers that are undecided at this price, each to the better
    of its two options while it fits, and then to single options, greedily: the loss is within one layer's of the least.
    Not fill: the rest stays unspent.
    """
    least(costs, budget)
    costs, losses = [c.double().cpu() for c in costs], [loss.double().cpu() for loss in losses]

    def at(price: float) -> list[int]:
        return [int((loss + price * cost).argmin()) for cost, loss in zip(costs, losses, strict=True)]

    def spent(chosen: list[int]) -> float:
        return sum(float(cost[i]) for cost, i in zip(costs, chosen, strict=True))

    low, high = 0.0, 1e-12
    if spent(at(low)) <= budget:
        return at(low)
    while spent(at(high)) > budget:
        low, high = high, high * 16
    for _ in range(60):
        middle = (low * high) ** 0.5 if low else high / 16
        low, high = (low, middle) if spent(at(middle)) <= budget else (middle, high)
    chosen = at(high)
    if not fill:
        return chosen
    left = budget - spent(chosen)
    for layer, better in enumerate(at(low)):
        step = float(costs[layer][better] - costs[layer][chosen[layer]])
        if 0 < step <= left:
            chosen[layer], left = better, left - step
    rest = [cost[i:] for cost, i in zip(costs, chosen, strict=True)]
    more = greedy(rest, [loss[i:] for loss, i in zip(losses, chosen, strict=True)], budget)
    return [i + j for i, j in zip(chosen, more, strict=True)]


def least(costs: list[Tensor], budget: float) -> float:
    """The cost of every layer's first option, which the budget must allow."""
    total = sum(float(cost[0]) for cost in costs)
    if total > budget:
        raise UsageError(f"budget: {budget:.0f} weights are fewer than the {total:.0f} that the smallest choice stores")
    return total


def round_to_budget(ranks: Tensor, cost: Tensor, scale: Tensor, top: Tensor, budget: float) -> list[int]:
    """Whole ranks nearest to real ones, after those have moved up or down together until they just fit the budget.

    Args:
        ranks: (layers,), float64.
        cost: of one rank in each layer.
        scale: how far each layer moves together with the others.
        top: the largest rank of each; the least is 1.
    """

    def moved(by: float) -> Tensor:
        return (ranks + by * scale).clamp(min=1).minimum(top)

    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if moved(middle) @ cost <= budget else (low, middle)
    whole = moved(low).floor()
    left = budget - float(whole @ cost)
    for i in (moved(low) - whole).argsort(descending=True, stable=True).tolist():  # the nearest to the next rank first
        if cost[i] <= left and whole[i] < top[i]:
            whole[i] += 1
            left -= float(cost[i])
    return [int(k) for k in whole]
