"""Divides one budget among many layers.

`greedy` and `lagrangian` solve a multiple-choice knapsack. Every layer has a list of options, such as the ranks 1, 2,
... and then the dense layer itself. A list is two tensors (options,): costs, whole numbers of weights that each option
stores, ascending; and losses, the error that each leaves, descending. Both functions return the index of the option
that every layer takes, within the budget.

`round_to_budget` has one real rank for each layer and rounds them all.
"""

import heapq
from collections.abc import Callable

from torch import Tensor

from recombine.errors import UsageError


def greedy(costs: list[Tensor], losses: list[Tensor], budget: float) -> list[int]:
    """Gives one layer at a time its next option: the layer that saves most loss per weight (JACTUS Alg. 1).

    A layer whose next option does not fit any more stays where it is.

    Raises:
        UsageError: the first options of all layers together cost more than the budget.
    """
    if losses[0].is_meta:
        return even(costs, budget)
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
    """Gives every layer the option of least loss + price * cost, at one price for all (Lagrangian relaxation).

    The price is the lowest that the budget allows, found by bisection. The choice is optimal for what it spends.
    What is left of the budget goes first to the layers that have two equally good options at this price: each takes the
    larger one while it fits. Then `greedy` spends the rest. The loss is within one layer's loss of the least.

    Args:
        fill: spend what the price leaves of the budget; otherwise it stays unspent.

    Raises:
        UsageError: the first options of all layers together cost more than the budget.
    """
    if losses[0].is_meta:
        return even(costs, budget)
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


def even(costs: list[Tensor], budget: float) -> list[int]:
    """Gives every layer the largest option within the same share of its costliest one: where losses have no values.

    Raises:
        UsageError: the first options of all layers together cost more than the budget.
    """
    least(costs, budget)
    share = budget / sum(float(cost[-1]) for cost in costs)
    return [max(0, int((cost <= share * cost[-1]).sum()) - 1) for cost in costs]


def least(costs: list[Tensor], budget: float) -> float:
    """The cost of the first options of all layers together.

    Raises:
        UsageError: it is more than the budget.
    """
    total = sum(float(cost[0]) for cost in costs)
    if total > budget:
        raise UsageError(f"budget: {budget:.0f} weights are fewer than the {total:.0f} that the smallest choice stores")
    return total


def round_to_budget(
    ranks: Tensor, stored: Callable[[Tensor], Tensor], scale: Tensor, top: Tensor, budget: float
) -> list[int]:
    """Rounds real ranks to whole ones that spend the budget.

    First all ranks move up or down together until they just fit. Then each is rounded down, and what is left goes to
    the ranks nearest to their next whole number.

    Args:
        ranks: (layers,), float64.
        stored: ranks (layers,) to the weights (layers,) that they store, which rise with the ranks.
        scale: (layers,), how far each rank moves for one unit of the common move.
        top: (layers,), the largest rank of each layer; the least is 1.
        budget: weights that all layers together may store.
    """

    def moved(by: float) -> Tensor:
        return (ranks + by * scale).clamp(min=1).minimum(top)

    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if stored(moved(middle)).sum() <= budget else (low, middle)
    whole = moved(low).floor()
    left, cost = budget - float(stored(whole).sum()), stored(whole + 1) - stored(whole)
    for i in (moved(low) - whole).argsort(descending=True, stable=True).tolist():  # the nearest to the next rank first
        if cost[i] <= left and whole[i] < top[i]:
            whole[i] += 1
            left -= float(cost[i])
    return [int(k) for k in whole]
