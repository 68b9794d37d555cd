"""The model classes of an exported folder. Their text is part of it, after that of `hf_layers`."""

import timm
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from recombine.export.hf_layers import put_layers
from recombine.models.rotary import select


class OfTransformers:
    """Goes before a model class of transformers: the class's own model, then the layers of the configuration.

    While the plain model is built, the configuration is a plain one: some classes build their inner model by it.
    """

    def __init__(self, config, *args, **options):
        own, code = type(config), vars(config).pop("auto_map", None)
        config.__class__ = own.__mro__[1]
        try:
            super().__init__(config, *args, **options)
        finally:
            config.__class__ = own
            if code is not None:
                config.auto_map = code
        put_layers(self, config.recombined)
        for name, turns in config.recombined.get("turns", {}).items():
            select(self, name, turns)


class OfTimm(PreTrainedModel):
    """A timm model with the layers of the configuration. Images (B, 3, H, W) -> logits (B, classes)."""

    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        arguments = {k: tuple(x) if isinstance(x, list) else x for k, x in config.timm["arguments"].items()}
        with torch.device("cpu"):  # transformers gives meta tensors here; timm's tables need values
            self.model = timm.create_model(config.timm["model"], pretrained=False, **arguments)
        kept = self.model.state_dict().keys()
        tables = [name for name, _ in self.model.named_buffers() if name not in kept]
        self.tables = [(name, self.model.get_buffer(name).clone()) for name in tables]
        put_layers(self.model, config.recombined)
        self.post_init()

    def _init_weights(self, module):
        """As in transformers; the tables of positions, which no file holds, get their values again."""
        super()._init_weights(module)
        for name, values in self.tables:
            owner, _, leaf = name.rpartition(".")
            if module is self.model.get_submodule(owner):
                module._buffers[leaf].copy_(values)

    def forward(self, pixel_values, labels=None, **options):
        """Logits, and the cross-entropy where labels (B,) are given."""
        logits = self.model(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
