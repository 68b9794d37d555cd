"""peft's own `get_peft_model` on a model that recombine has compressed."""

from typing import Any

from recombine.errors import UsageError
from recombine.layers import PackedLinear, RecombinedLinear


def peft_config(config: Any) -> Any:
    """Lets peft find recombined layers: get_peft_model(model, recombine.peft_config(LoraConfig(...))).

    peft knows no layer of ours and would say that no target module is supported. Its adapters train beside frozen
    factors, and `merge_and_unload` leaves ordinary dense layers. A packed layer (`recombine.quantize`) is an nn.Linear,
    so peft alone would take it as one and lose the adapter when it merges.

    Args:
        config: a peft.LoraConfig.

    Returns:
        The same configuration, with the recombined layers added to those that it can adapt.

    Raises:
        UsageError: another configuration; peft lets no other class be taught a layer.
    """
    if isinstance(config, type) or not hasattr(config, "_register_custom_module"):
        what = f"the class {config.__name__}" if isinstance(config, type) else f"a {type(config).__name__}"
        raise UsageError(f"peft_config: {what} cannot be taught new layers; give a peft.LoraConfig(...)")
    from recombine.layers.peft_lora import RecombinedLora

    config._register_custom_module({RecombinedLinear: RecombinedLora, PackedLinear: RecombinedLora})
    return config
