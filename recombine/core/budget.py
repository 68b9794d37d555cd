"""Budgets: what a word such as retained_50 means, and the solver that sets a method's size by it.

A word means the same for every method:
    retained_50      the target layers hold at most 50% of their dense weights
    bytes_50         the model without its head takes at most 50% of its dense bytes, adapter included
    trainable_150k   at most 150,000 weights train beside the head (k = 1e3, m = 1e6)
    energy_95        every factorisation keeps 95% of the sum of squared singular values
    memory_1200mb    weights, gradients and AdamW's state take at most 1200 MiB (2^20 bytes)

Where a compressor comes before the adapter, a trainable budget limits the adapter and every other kind limits the
compressor. What the adapter adds comes on top, except for a budget of bytes, and every account says how much that is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from recombine.core.account import head_size, held, orders, predict
from recombine.core.method import Method, Site
from recombine.core.packing import MIX, Packing, saving, sizes_beside
from recombine.errors import UsageError
from recombine.runtime import budget_words
from recombine.runtime.budget_words import KINDS


@dataclass(frozen=True)
class Budget:
    """A limit on the size of a method: its kind and its value.

    Args:
        kind: none, retained, bytes, trainable, energy or memory.
        value: a share in (0, 1] for retained, bytes and energy, weights for trainable, MiB for memory; None for none.
        reserve: weights that another method will add to the model; a budget of bytes includes them.
        packing: how weights will be packed, which a budget of bytes counts; None: not at all.

    Raises:
        UsageError: an unknown kind, or a value that is out of range for it.
    """

    kind: str = "none"
    value: float | None = None
    reserve: int = 0
    packing: Packing | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UsageError(f"budget.kind={self.kind!r}: must be one of {', '.join(KINDS)}")
        if self.kind == "none":
            return
        share = self.kind in budget_words.SHARES
        if not isinstance(self.value, int | float) or not 0 < self.value <= (1 if share else float("inf")):
            unit = {"trainable": "weights", "memory": "MiB"}.get(self.kind, "a share in (0, 1]")
            raise UsageError(f"budget.value={self.value!r}: budget.kind={self.kind} counts {unit}, more than 0")

    @classmethod
    def parse(cls, word: str) -> "Budget":
        """The budget of a word: retained_50 -> Budget("retained", 0.5).

        Raises:
            UsageError: not such a word.
        """
        return cls(*budget_words.parse(word))

    @classmethod
    def of(cls, budget: "Budget | str | None") -> "Budget":
        """The budget that a caller gave: itself, that of a word, or none.

        Raises:
            UsageError: no such word, or something else, such as a number.
        """
        if budget is None or isinstance(budget, Budget):
            return budget or cls()
        if isinstance(budget, str):
            return cls.parse(budget)
        number = isinstance(budget, int | float) and 0 < budget <= 100
        word = f"retained_{100 * budget if budget <= 1 else budget:g}" if number else "retained_50"
        raise UsageError(f"budget={budget!r}: give a word that says what it limits, such as {word}")

    def __str__(self) -> str:
        return budget_words.word(self.kind, self.value)

    def field(self, method: Method) -> str | None:
        """The field of a method that such a budget sets; None: the method has none. Bytes set that of retained."""
        return method.budget_fields.get("retained" if self.kind == "bytes" else self.kind)


@dataclass(frozen=True)
class Room:
    """What a budget of bytes leaves to the target layers, whose ranks and bits are chosen together.

    Args:
        budget: of kind bytes, with a mixed packing.
        bytes: of all targets together. whole: of the dense model without its head.
    """

    budget: Budget
    bytes: float
    whole: float

    @classmethod
    def of(cls, budget: Budget, model: nn.Module, sites: list[Site]) -> "Room":
        """What is left beside the layers that are no targets, which are packed too, and what an adapter will add."""
        size, beside, packing = sites[0].module.weight.element_size(), sizes_beside(model, sites), budget.packing
        whole = sum(p.numel() for p in model.parameters()) - head_size(model)
        rest = whole - held(site.module for site in sites) - sum(beside) + budget.reserve
        taken = size * rest + packing.bytes(sum(beside)) + len(beside) * packing.bytes(packing.group)
        return cls(budget, budget.value * size * whole - taken, size * whole)

    def require(self, least: float) -> None:
        """Checks that the smallest choice fits, in bytes.

        Raises:
            UsageError: it does not; the message names the nearest budget.
        """
        if least > self.bytes:
            near = Budget("bytes", min(1.0, 1.0001 * (self.budget.value + (least - self.bytes) / self.whole)))
            why = f"cannot be met, the nearest that a mix of ranks and bits can is {near}"
            raise UsageError(f"budget={self.budget}: {why}")


def mixes(budget: Budget) -> bool:
    """Whether every layer gets a rank and bits of its own.

    Raises:
        UsageError: it should, and the budget counts no bytes.
    """
    mixed = budget.packing is not None and budget.packing.bits == MIX
    if mixed and budget.kind != "bytes":
        raise UsageError(f"budget={budget}: ranks and bits are mixed under a budget of bytes; say budget=bytes_25")
    return mixed


def solve(method: Method, model: nn.Module, sites: list[Site], budget: Budget) -> Method:
    """Sets the method's size field to the largest value that meets the budget; returns the method.

    Raises:
        UsageError: the method has no field for that kind of budget, or its smallest value is already too large.
    """
    name, field = method.label, budget.field(method)
    if field is None:
        can = ", ".join(kind for kind in KINDS if kind != "none" and Budget(kind, 1).field(method)) or "none"
        raise UsageError(f"budget={budget}: {name} cannot be held to a {budget.kind} budget; it knows: {can}")
    for other in method.conflicting_fields:
        if other != field and (value := getattr(method, other)) is not None:
            raise UsageError(f"budget={budget} and {method.key}.{other}={value} both set the size: drop one of them")
    if budget.kind == "energy":
        put(method, field, budget.value)
    else:
        put(method, field, largest(method, field, model, sites, budget))
    method.check(sites)
    return method


def largest(method: Method, field: str, model: nn.Module, sites: list[Site], budget: Budget):
    """The largest of the field's values that meets the budget, by bisection.

    The field itself is left at whichever value was tried last.

    Raises:
        UsageError: the smallest value is already too large; the message names the nearest budget that can be met.
    """
    values = method.budget_values(field, sites)
    measure = measures(method, model, sites, budget)

    def at(value) -> float:
        put(method, field, value)
        return measure()

    if (least := at(values[0])) > budget.value:
        least *= 1.0001  # rounded up: it can be typed
        beyond = budget.kind in budget_words.SHARES and least > 1
        near = f"{100 * least:.4g} %" if beyond else Budget(budget.kind, least)
        near = f"the nearest that {method.label} can is {near}"
        raise UsageError(f"budget={budget}: cannot be met, {near} ({field}={values[0]})")
    low, high = 0, len(values)  # values[low] fits; from high on nothing does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(values[middle]) <= budget.value else (low, middle)
    return values[low]


def put(method: Method, field: str, value: Any) -> None:
    """Sets a field, or an entry of one that is a group: options.n_frequency."""
    name, _, key = field.partition(".")
    setattr(method, name, {**getattr(method, name), key: value} if key else value)


def measures(method: Method, model: nn.Module, sites: list[Site], budget: Budget) -> Callable[[], float]:
    """What the budget limits, as a function that measures the method as it stands: a share, weights or MiB."""
    size, dense = sites[0].module.weight.element_size(), sum(site.module.weight.numel() for site in sites)
    total = sum(p.numel() for p in model.parameters())
    rest, head = total - held(site.module for site in sites), head_size(model)
    beside = orders(method, sites) / size  # as so many weights
    saved = (lambda: 0.0) if budget.packing is None else saving(method, model, sites, budget.packing)
    return {
        "retained": lambda: method.retained_weights(sites) / dense,
        "bytes": lambda: (
            (rest - head + method.retained_weights(sites) + budget.reserve + beside - saved()) / (total - head)
        ),
        "trainable": lambda: method.sizes(sites)[1],
        "memory": lambda: predict(method, model, sites).memory_mib,
    }[budget.kind]
