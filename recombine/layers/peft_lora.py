"""The LoRA layer that peft puts on a recombined one when a user calls peft: see `peft_config`. Imports peft."""

from peft.tuners.lora import Linear


class RecombinedLora(Linear):
    """peft's LoRA of a linear layer, over a recombined one. Merging makes the layer an ordinary dense one first.

    peft's own would add the adapter to a weight that is built anew at every call, so that it were lost.
    """

    def merge(self, *args, **kwargs) -> None:
        """As peft's, into the dense layer with the same outputs."""
        if hasattr(self.base_layer, "merged"):
            self.base_layer = self.base_layer.merged()
        super().merge(*args, **kwargs)
