"""One budget over many layers: the Lagrangian and the greedy allocation."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recombine
from recombine import Balf, BasisSharing, DobiSvd, SvdLlm, UsageError
from recombine.methods.allocation import greedy, lagrangian
from zoo import build, losses


@st.composite
def options(draw, convex: bool = False):
    """Up to four layers of up to five options: whole costs that rise, losses that fall."""
    costs, drops = [], []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 5))
        steps = [draw(st.integers(1, 9)) for _ in range(size)]
        falls = [draw(st.integers(0, 20)) for _ in range(size)]
        if convex:
            steps, falls = [steps[0]] + [3] * (size - 1), sorted(falls, reverse=True)
        costs.append(torch.tensor(steps).cumsum(0).double())
        drops.append(100 - torch.tensor([0, *falls[1:]]).cumsum(0).double())
    return costs, drops


def least_loss(costs, losses, budget):
    picks = product(*(range(len(c)) for c in costs))
    pays = [(sum(c[i].item() for c, i in zip(costs, p, strict=True)), p) for p in picks]
    return min(sum(x[i].item() for x, i in zip(losses, p, strict=True)) for paid, p in pays if paid <= budget)


def outcome(costs, losses, picks):
    return tuple(sum(x[i].item() for x, i in zip(table, picks, strict=True)) for table in (costs, losses))


@settings(max_examples=200, deadline=None)
@given(options(), st.integers(0, 100))
def test_lagrangian_meets_the_budget_and_is_near_the_least_loss(problem, budget):
    costs, losses_ = problem
    if budget < sum(c[0].item() for c in costs):
        for solve in (greedy, lagrangian):
            with pytest.raises(UsageError, match="fewer than"):
                solve(costs, losses_, budget)
        return
    best = least_loss(costs, losses_, budget)
    paid, loss = outcome(costs, losses_, lagrangian(costs, losses_, budget))
    assert paid <= budget and best <= loss <= best + max((x[0] - x[-1]).item() for x in losses_)
    assert outcome(costs, losses_, greedy(costs, losses_, budget))[0] <= budget
    for costs_, falls, i in zip(costs, losses_, lagrangian(costs, losses_, budget), strict=True):
        more = slice(i + 1, i + 2)  # nothing that would help is left to buy
        assert not ((paid + costs_[more] - costs_[i] <= budget) & (falls[more] < falls[i])).any()


@settings(max_examples=200, deadline=None)
@given(options(convex=True), st.integers(0, 100))
def test_both_are_optimal_for_falling_gains_at_one_price(problem, budget):
    costs, losses_ = problem
    if budget >= sum(c[0].item() for c in costs):
        best = least_loss(costs, losses_, budget)
        for solve in (greedy, lagrangian):
            paid, loss = outcome(costs, losses_, solve(costs, losses_, budget))
            assert paid <= budget and loss == best


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_lagrangian_minds_no_scale(scale):
    costs = [torch.arange(1.0, 40)] * 3
    losses_ = [scale * torch.linspace(10, 0, 39).square() * s for s in (1.0, 2.0, 7.0)]
    picks = lagrangian(costs, losses_, 60)
    assert outcome(costs, losses_, picks)[0] == 60 and picks == lagrangian(costs, [x / scale for x in losses_], 60)


@pytest.mark.parametrize("word", ["retained_20", "retained_50", "retained_80", "memory_0.4mb"])
@pytest.mark.parametrize("method", [SvdLlm(), BasisSharing(), Balf(), DobiSvd(steps=4)], ids=lambda m: type(m).__name__)
def test_calibrated_budgets_are_met_and_used(method, word):
    model = build("tiny_vit")
    recombine.apply(model, method, word, losses=losses(model))
    account, limit = recombine.count(model), recombine.Budget.parse(word).value
    value = account.memory_mib if word.startswith("memory") else account.retained
    assert (0.98 if isinstance(method, Balf | DobiSvd) else 0.85) * limit <= value <= limit
