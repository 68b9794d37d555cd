"""What the methods that cut a model say of it, and the text that an exported folder needs for it."""

import inspect

from torch import nn


def structures(model: nn.Module) -> list[dict]:
    """What each method that cut the model says of it, as `pruning.base` records that."""
    return [step.layers["structure"] for step in model.recombined.steps if "structure" in step.layers]


def rotary_text(model: nn.Module) -> str:
    """The text of `models.rotary` where a model needs it; otherwise nothing."""
    if not any(structure.get("rotary") for structure in structures(model)):
        return ""
    from recombine.models import rotary  # imports transformers' models, which is slow

    return f"{inspect.getsource(rotary)}\n\n"
