"""What a plan knows of a model that draws: its frozen parts, its batches and its drawing, without a file of them.

Frozen parts whose sizes only a folder says are taken to be Stable Diffusion's: its autoencoder, and the text encoder
of `model.text_config`.
"""

from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recombine.core import footprint
from recombine.data.prompted import dreambooth
from recombine.data.prompted.base import PromptedData
from recombine.data.prompted.captions import SHOWN
from recombine.models.diffusion_parts import LONGEST, Parts, random_encoder
from recombine.runner.plan_devices import Cost
from recombine.stages.sample import AT_ONCE

if TYPE_CHECKING:
    from recombine.runner.plan_player import Player

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
    """The frozen parts of a model whose folder is not read, without memory. config: of the text encoder of a folder."""

    def __init__(self, text: str, fold: int, width: int, config: dict | None, frozen_text: bool):
        super().__init__(None, text, fold, width)
        self.length = TOKENS if text == "folder" else LONGEST
        if frozen_text and text != "bytes":
            self.encoder = random_encoder(text, MINILM if text == "minilm" else config)
        if text == "folder":
            from diffusers import AutoencoderKL

            self.has_vae, self.factor, self.vae = True, FACTOR, AutoencoderKL(**VAE)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return torch.empty(*input_ids.shape, self.width, device="meta")

    def encode(self, pixels: Tensor, draw: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent_dist.mean if self.has_vae else super().encode(pixels, draw)


def without_files(model: nn.Module, config: dict) -> None:
    """Gives a model without memory frozen parts without memory, in place. config: the run's, of the model."""
    unet, text, fold = model.unet.config, config.get("text", "folder"), config.get("fold", 1)
    frozen_text = not config.get("train_text", False)
    model.parts.inner = Unread(text, fold, unet.cross_attention_dim, config.get("text_config"), frozen_text)
    size = config.get("image_size") or unet.sample_size * model.parts.inner.factor
    model.recombine_source["image_size"] = size


def frozen(model: nn.Module) -> int:
    """Bytes of what lies beside the model's parameters and never trains."""
    parts = model.parts.inner if hasattr(model, "parts") else None
    return (
        0
        if parts is None
        else footprint.size(p for part in (parts.encoder, parts.vae) if part for p in part.parameters())
    )


def batch(module: PromptedData, model: nn.Module, size: int, learnt: bool) -> dict[str, Tensor]:
    """A batch of that many samples without values. learnt: in training, where what was drawn before stands beside."""
    rows = size * (2 if learnt and getattr(module, "prior_count", 0) else 1)
    side = model.recombine_source["image_size"]
    ids = torch.zeros(rows, model.parts.inner.length, dtype=torch.long, device="meta")
    numbers = torch.zeros(rows, dtype=torch.long, device="meta")
    found = {"pixels": torch.zeros(rows, 3, side, side, device="meta"), "input_ids": ids}
    found |= {} if model.parts.inner.text == "folder" else {"attention_mask": torch.ones_like(ids)}
    return found | {"draw": numbers, "labels": numbers}


def prior(player: "Player") -> None:
    """The pictures that the model draws of the class before it is rewritten."""
    if (module := player.module) and (count := getattr(module, "prior_count", 0)):
        player.told.notes.append("prior: the pictures of the class are drawn once and kept")
        walk(player, "prior", ceil(count / dreambooth.AT_ONCE), min(count, dreambooth.AT_ONCE), **module.prior_how)


def test(player: "Player") -> None:
    """The pictures of a test."""
    how = player.settings.sample
    if not (hasattr(player.model, "draw") and how.seeds):
        return
    prompts = len(player.module.asked(how.prompts)) or SHOWN
    rounds = prompts * ceil(len(how.seeds) / AT_ONCE)
    walk(player, "draw", rounds, min(AT_ONCE, len(how.seeds)), steps=how.steps, guidance=how.guidance)


def walk(player: "Player", name: str, rounds: int, size: int, *, steps: int, guidance: float) -> None:
    """A phase in which so many pictures are drawn at a time, so many times."""
    model, rows = player.model.eval(), size * (1 if guidance == 1 else 2)
    ids = torch.zeros(rows, model.parts.inner.length, dtype=torch.long, device="meta")
    noisy = torch.zeros(rows, *model.latent_shape, device="meta")
    known, parts = footprint.tensors(model), model.parts.inner
    times = torch.zeros(rows, dtype=torch.long, device="meta")
    states = parts.states(ids, None)

    def step() -> Tensor:
        return model.predict(noisy, times, states, None)

    one = footprint.forward(step, known, player.kernels())
    last = footprint.forward(lambda: parts.decode(noisy[:size]), known, player.kernels())
    weights = footprint.size(known)
    cost = Cost.of(one) * (steps * rounds) + Cost.of(last) * rounds
    player.add(name, cost, weights=weights, activations=max(one.peak, last.peak))
