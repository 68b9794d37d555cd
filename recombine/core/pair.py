"""A compressor and then an adapter: what of the run's budget limits which of them."""

from dataclasses import replace

from torch import nn

from recombine.core.account import held
from recombine.core.budget import Budget
from recombine.core.method import Method
from recombine.core.rewrite import find_sites


def budget_of(method: Method, model: nn.Module, budget: Budget, compressor: Method | None, adapter: Method) -> Budget:
    """What of a run's budget limits one of its methods.

    Trainable parameters limit the adapter, every other kind limits the compressor. One of bytes is of both together.

    Args:
        method: the compressor or the adapter.
        compressor: None where there is only one method.
    """
    if compressor is None:
        return budget
    if (method is adapter) != (budget.kind == "trainable"):
        return Budget()
    return replace(budget, reserve=added(adapter, model)) if budget.kind == "bytes" else budget


def added(method: Method, model: nn.Module) -> int:
    """Weights that a method would add to the model as it stands; 0 where it would take some away."""
    method, sites = method.copy(), find_sites(model, method)
    method.before_budget(model, sites, None)
    return max(0, method.sizes(sites)[0] - held(site.module for site in sites))


def settled(method: Method, compressor: Method | None, kind: str) -> tuple[Method, Method | None]:
    """Both with their open fields decided, for a budget of that kind."""
    if compressor is None:
        return method.settled(kind, calibrates=True), None
    first, last = ("none", kind) if kind == "trainable" else (kind, "none")
    return method.settled(last, calibrates=True), compressor.settled(first, calibrates=True)
