"""Gradient checkpointing of timm's and transformers' models: the backward pass computes each block again."""

from torch import nn

from recombine.errors import UsageError


def recompute(model: nn.Module, on: bool) -> None:
    """Has the backward pass compute each block again, from its input, or keep what the forward computed.

    Raises:
        UsageError: it is neither timm's nor transformers' model, or it cannot do that.
    """
    try:
        if hasattr(model, "set_grad_checkpointing"):  # timm
            model.set_grad_checkpointing(on)
        elif not on:
            model.activation_checkpointing_disable()
        else:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()  # only the other kind needs a gradient at a block's input
    except (AssertionError, AttributeError, ValueError) as error:
        why = f"{type(model).__name__} cannot compute its blocks again ({' '.join(str(error).split())[:120]})"
        raise UsageError(f"gradient_checkpointing=true: {why}; set it to false") from error
