"""Budget words like `retained_50`: from word to (kind, value) and back. No torch here: results need it too."""

import difflib
import re
from collections.abc import Iterable
from decimal import Decimal

from recombine.errors import UsageError

KINDS = ("none", "retained", "bytes", "trainable", "energy", "memory")
STORED = ("retained", "bytes", "energy", "memory")  # limit what is stored
SHARES = ("retained", "bytes", "energy")  # count per cent
EXAMPLES = {
    "retained": "retained_50",
    "bytes": "bytes_50",
    "trainable": "trainable_150k",
    "energy": "energy_95",
    "memory": "memory_1200mb",
}
NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
WORD = re.compile(rf"({'|'.join(SHARES)})_({NUMBER})|(trainable)_({NUMBER})([km]?)|(memory)_({NUMBER})mb")
THOUSANDS = {"": 1, "k": 1000, "m": 1_000_000}


def parse(word: object) -> tuple[str, float | None]:
    """The kind and the value of a budget word.

    Returns:
        ("retained", 0.5) for retained_50, ("trainable", 150000.0) for trainable_150k, ("energy", 0.95) for energy_95,
        ("memory", 1200) for memory_1200mb (MiB), ("none", None) for none.

    Raises:
        UsageError: there is no such word, or its number is out of range.
    """
    if word == "none":
        return "none", None
    match = WORD.fullmatch(str(word))
    if match is None:
        raise UsageError(f"budget={word}: no such budget; {suggestion(str(word))}")
    share, percent, trainable, weights, unit, memory, mib = match.groups()
    if share:
        value = float(Decimal(percent) / 100)
        if not 0 < value <= 1:
            raise UsageError(f"budget={word}: {share} counts per cent, more than 0 and at most 100")
        return share, value
    value = Decimal(weights) * THOUSANDS[unit] if trainable else Decimal(mib)
    if value <= 0:
        raise UsageError(f"budget={word}: {trainable or memory} needs a number above 0")
    if trainable:
        return trainable, float(value)
    return memory, int(mib) if mib.isdigit() else float(value)  # a whole number stays one: it is part of a hash


def word(kind: str, value: float | None) -> str:
    """The budget word of a kind and a value, with five digits: ("retained", 0.5) -> retained_50."""
    if kind == "none":
        return "none"
    if kind == "trainable":
        return f"trainable_{value / 1e3:.5g}k" if value >= 1e3 else f"trainable_{value:g}"
    return f"memory_{value:.5g}mb" if kind == "memory" else f"{kind}_{100 * value:.5g}"


def suggestion(wrong: str) -> str:
    """The budget words to say instead of a wrong one, for an error."""
    kind, _, size = wrong.partition("_")
    if kind in EXAMPLES and not size:
        return f"its size is missing: say budget={EXAMPLES[kind]}"
    near = difflib.get_close_matches(kind, KINDS, n=1)
    if near and near[0] != kind and WORD.fullmatch(f"{near[0]}_{size}"):
        return f"did you mean budget={near[0]}_{size}?"
    if near and near[0] in EXAMPLES:
        return f"say for example budget={EXAMPLES[near[0]]}"
    return f"say none, {', '.join(EXAMPLES.values())}, each with a number of your own"


def refuse_two_keys(arguments: Iterable[str]) -> None:
    """Refuses `budget=retained budget.value=0.37`, which was once the way to say retained_37.

    Args:
        arguments: the command line's, without the program.

    Raises:
        UsageError: one of them sets budget.kind or budget.value.
    """
    given = dict(argument.lstrip("+").partition("=")[::2] for argument in arguments)
    old = next((f"{key}={given[key]}" for key in ("budget.value", "budget.kind") if key in given), None)
    if old is None:
        return
    try:
        new = word(given.get("budget.kind") or given.get("budget", ""), float(given.get("budget.value", "")))
        parse(new)
    except (ValueError, UsageError):
        new = "retained_37"
    raise UsageError(f"{old}: a budget is one word, kind and size together; say budget={new}")
