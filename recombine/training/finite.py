"""What is not finite is a failure: where it is found, and what is to blame.

A training looks at its loss at every step and at its weights once an epoch. A run looks at its weights after a
rewriting, and at its scores before it writes a result.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from recombine import results
from recombine.errors import UsageError

LIMIT = 1e6  # a weight that trained beyond it is as bad as an infinite one: float32 moves it by 0.06 at least
FLOAT16 = "float16 ends at 65504"
UNDEFINED = ("acc_m", "acc_mm")  # scores of a part that a set may lack


def tensors_not_finite(named: Iterable[tuple[str, Tensor]], limit: float = math.inf) -> list[str]:
    """The names of tensors that hold a nan, an infinity or a number from `limit` on; one wait for the GPU in all."""
    floats = {name: t.detach() for name, t in named if t.is_floating_point() and t.numel()}
    if not floats:
        return []
    extremes = torch.stack([torch.stack(torch.aminmax(t)).float() for t in floats.values()])  # nan goes through
    fine = (extremes.abs() < limit).all(1).tolist()
    return [name for name, within in zip(floats, fine, strict=True) if not within]


def refuse_weights(model: nn.Module, whose: str) -> None:
    """Refuses a model with weights that are not finite. whose: the part of the run that brought them, and the fix.

    Raises:
        UsageError: there is such a weight.
    """
    if bad := tensors_not_finite(model.named_parameters()):
        raise UsageError(f"{whose}: {described(bad)}")


def refuse_scores(parts: Mapping, fix: str) -> None:
    """Refuses numbers of a result that are not finite.

    Args:
        parts: of a result, nested dicts of numbers.
        fix: what the user can do.

    Raises:
        UsageError: there is such a number.
    """
    for key, value in results.flat(dict(parts)).items():
        if isinstance(value, float) and not math.isfinite(value) and key.split(".")[-1] not in UNDEFINED:
            raise UsageError(f"{key}={value}: no result is written of what is not finite; {fix}")


def described(names: list[str], what: str = "not finite") -> str:
    """A few words on tensors that are wrong."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"weights are {what} ({names[0]}{more})"


def blame(model: nn.Module, batch=None, *, started: bool = False, precision: str = "") -> str | None:
    """What else than a learning rate makes an output not finite, and the fix; None: nothing that is evident.

    Args:
        batch: what the model got: a tensor, or a sequence or a dict of some.
        started: whether weights have moved, so that they are no longer as they came.
        precision: Lightning's word for it.
    """
    parts = batch.values() if isinstance(batch, Mapping) else (batch,) if isinstance(batch, Tensor) else batch or ()
    if tensors_not_finite((str(i), part) for i, part in enumerate(parts) if isinstance(part, Tensor)):
        return "the batch itself is not finite, so correct the data, or data.mean and data.std"
    if not started and (bad := tensors_not_finite(model.named_parameters())):
        return f"{described(bad)} before any step: take other weights (model.checkpoint, stage.checkpoint)"
    if any(p.dtype == torch.float16 for p in model.parameters()):
        return f"{FLOAT16}: set model.dtype=float32 or bfloat16"
    if not started and precision.startswith("16"):
        return f"{FLOAT16}: set trainer.precision=32-true or bf16-mixed"
    return None if started else "no step was made, so no rate is to blame: look at the data and the loss"
