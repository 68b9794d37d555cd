"""How far cut layers move a model's predictions, measured on calibration data without labels."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recombine.core.calibration import Losses, eval_frozen
from recombine.errors import UsageError
from recombine.methods.svd.replay import Replay

TEMPERATURE = 0.6  # of both distributions, as in LEMS's code
ENTRIES = 2**20  # of logits that are compared at once: they stay in a processor's cache
Cut = Mapping[str, tuple[Tensor, Tensor]]  # left (m, k) and right (k, n) in place of weights, by module name


def divergences(model: nn.Module, cuts: Sequence[Cut], losses: Losses, room: int = 0) -> tuple[list[float], str]:
    """The mean KL(model || cut model) of each cut over all predictions, and what a prediction is of: token or sample.

    One pass over the calibration batches serves all cuts: whenever the model is called, its forward runs again with
    every cut in place. Padding does not count. Of one number a sample it is the mean square of its change, and the word
    is value. Where the model returns no logits it is how far the loss moves, with a pass for every cut, and the word is
    loss.

    Args:
        room: bytes that may hold what the model's blocks gave; a cut model then runs from the first block on that the
            cut changes, where all of it fits.

    Raises:
        UsageError: a pass had no batch, or a divergence is not finite.
    """
    found = Predictions(model, cuts, room)
    with eval_frozen(model), torch.no_grad(), found.replay.notes():
        hook = model.register_forward_hook(found.compare, with_kwargs=True)
        try:
            before = mean(losses)
        finally:
            hook.remove()
        if not found.count:
            found.kind = "loss"
            found.sums, found.count = [abs(cut_loss(model, cut, losses) - before) for cut in cuts], 1
    values = [total / found.count for total in found.sums]
    if not all(map(math.isfinite, values)):
        raise UsageError("calibration: a cut model's predictions are not finite; use float32 or other batches")
    return values, found.kind


class Predictions:
    """The running sums of the divergences.

    sums: of each cut. count: predictions so far. kind: as `divergences` says it.
    """

    def __init__(self, model: nn.Module, cuts: Sequence[Cut], room: int):
        self.model, self.cuts = model, cuts
        self.sums, self.count, self.kind = [0.0] * len(cuts), 0, "sample"
        self.replay = Replay(model, room)

    def compare(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook of the model, with_kwargs, that adds a call's predictions."""
        self.replay.noting = False
        if (logits := logits_of(output)) is None:
            return self.replay.given.clear()
        mask, self.kind = kwargs.get("attention_mask"), kind_of(logits)
        keep = mask.bool() if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1] else None
        self.count += logits[..., 0].numel() if keep is None else int(keep.sum())
        for i, cut in enumerate(self.cuts):
            with standing_in(model, cut), self.replay.skipping([*cut]):
                other = logits_of(model.forward(*args, **kwargs))  # not model(...): the hook would run again
            self.sums[i] += divergence(logits, other, keep)
        self.replay.forget()


def logits_of(output: Any) -> Tensor | None:
    """The logits (..., classes) of what a model returns; None: it has none."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.ndim > 1 else None


def kind_of(logits: Tensor) -> str:
    """What `divergences` calls them."""
    if logits.shape[-1] == 1:
        return "value"
    return "token" if logits.ndim == 3 else "sample"


def divergence(logits: Tensor, other: Tensor, keep: Tensor | None) -> float:
    """The sum of KL(logits || other) in float64, both (..., classes), where keep says so; of one class, of squares."""
    if logits.shape[-1] == 1:
        return float((rows(logits, keep).double() - rows(other, keep).double()).square().sum())
    total, count = 0.0, max(1, ENTRIES // logits.shape[-1])
    for pair in zip(*(rows(x, keep).split(count) for x in (logits, other)), strict=True):
        p, q = (F.log_softmax(x.double() / TEMPERATURE, -1) for x in pair)
        total += float((p.exp() * (p - q)).sum())
    return total


def rows(logits: Tensor, keep: Tensor | None) -> Tensor:
    """Logits (..., classes) as (predictions, classes)."""
    return logits.flatten(0, -2) if keep is None else logits[keep]


@contextmanager
def standing_in(model: nn.Module, cut: Cut) -> Iterator[None]:
    """Gives the outputs of the cut layers in place of those of the model's while the block runs."""

    def hook(left: Tensor, right: Tensor):
        return lambda layer, args, y: F.linear(F.linear(args[0], right), left, layer.bias)

    hooks = [model.get_submodule(name).register_forward_hook(hook(*pair)) for name, pair in cut.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def cut_loss(model: nn.Module, cut: Cut, losses: Losses) -> float:
    """The mean loss with a cut in place."""
    with standing_in(model, cut):
        return mean(losses)


def mean(losses: Losses) -> float:
    """The mean of one pass over the batches.

    Raises:
        UsageError: it had none.
    """
    values = [float(loss) for loss in losses()]
    if not values:
        raise UsageError("calibration: a pass had no batch: losses() must begin anew and yield at least one")
    return sum(values) / len(values)
