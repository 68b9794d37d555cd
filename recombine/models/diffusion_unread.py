"""The frozen parts of a text-to-image model whose folder is not read, without memory: what a plan counts.

What only a folder says is taken to be Stable Diffusion's: its autoencoder, and the text encoder of `model.text_config`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from recombine.models.diffusion_parts import LONGEST, Parts, random_encoder

FACTOR, TOKENS = 8, 77  # Stable Diffusion's: pixels a side of one latent, tokens of a prompt
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
MINILM = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
MINILM |= {"intermediate_size": 1536}


class Unread(Parts):
    """Frozen parts without a file. Build it under torch's meta device.

    Args:
        text, fold, width: as for `Parts`.
        config: of the text encoder of a folder.
        frozen_text: the text encoder is one of the parts.
    """

    def __init__(self, text: str, fold: int, width: int, config: Mapping[str, Any] | None, frozen_text: bool):
        super().__init__(None, text, fold, width)
        self.length = TOKENS if text == "folder" else LONGEST
        if frozen_text and text != "bytes":
            self.encoder = random_encoder(text, MINILM if text == "minilm" else config)
        if text == "folder":
            self.has_vae, self.factor, self.vae = True, FACTOR, AutoencoderKL(**VAE)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return torch.empty(*input_ids.shape, self.width, device="meta")

    def encode(self, pixels: Tensor, draw: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent_dist.mean if self.has_vae else super().encode(pixels, draw)


def without_files(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Gives a model without memory such parts, in place. config: the run's, of the model."""
    unet, text, fold = model.unet.config, config.get("text", "folder"), config.get("fold", 1)
    frozen_text = not config.get("train_text", False)
    model.parts.inner = Unread(text, fold, unet.cross_attention_dim, config.get("text_config"), frozen_text)
    size = config.get("image_size") or unet.sample_size * model.parts.inner.factor
    model.recombine_source["image_size"] = size
