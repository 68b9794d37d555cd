"""Text-to-image diffusion models of diffusers: a UNet that is rewritten and trained, between parts that are frozen.

    model=sd21_base                                   Stable Diffusion 2.1-base (arXiv 2112.10752), from the hub
    model=sd21_base model.checkpoint=FOLDER           any folder in its layout, as diffusers saves a pipeline
    model=tiny_diffusion                              32 px, on packaged drawings (scripts/pretrain_tiny_diffusion.py)

The model is called with a batch of pictures: it adds the noise that the batch's seeds say, and predicts it. What is
frozen, the autoencoder and by default the text encoder, is built when it is first needed and is no part of the model's
parameters, so counts, files and optimizers see the UNet alone. ``train_text`` makes the text encoder a part of them, as
in CERSA (arXiv 2605.08174, A.1), which rewrites its attention beside all linear layers of the UNet.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from pydantic import Field
from torch import Tensor, nn

from recombine.errors import UsageError, first_line
from recombine.models.allowed import LARGEST, refuse
from recombine.models.diffusion_folder import folder, read_config, read_unet, written
from recombine.models.diffusion_parts import Frozen, Parts, Prompts, configured
from recombine.models.drawing import draw
from recombine.runtime.kinds import Name, Pixels, Place

SCHEDULE = {"beta_schedule", "prediction_type", "num_train_timesteps"}  # of a model without a folder


@dataclass
class Prediction:
    """What the UNet says of a noisy batch, (B, C, h, w), and what it should have said."""

    logits: Tensor
    target: Tensor


class TextToImage(nn.Module):
    """A UNet with its noise schedule, and the frozen parts around it.

    Args:
        schedule: arguments of diffusers' DDPMScheduler.
        parts: the text encoder and what turns pixels into latents.
        text_encoder: one that trains, in the place of the frozen one; None: there is none.
    """

    def __init__(
        self, unet: nn.Module, schedule: Mapping[str, Any], parts: Parts, text_encoder: nn.Module | None = None
    ):
        super().__init__()
        if text_encoder is not None:
            self.text_encoder = text_encoder
        self.unet, self.schedule, self.parts = unet, DDPMScheduler.from_config(dict(schedule)), Frozen(parts)

    def forward(
        self, pixels: Tensor, input_ids: Tensor, draw: Tensor, attention_mask: Tensor | None = None
    ) -> Prediction:
        """Pictures (B, 3, S, S) in [-1, 1], tokens (B, T) of their prompts, seeds of their noise (B,)."""
        with torch.no_grad(), in_full(pixels.device):  # the first steps' noise is small
            latents = self.parts.inner.encode(pixels, draw)
            steps, noise = self.drawn(draw, latents)
            noisy = self.schedule.add_noise(latents, noise, steps)
            velocity = self.schedule.config.prediction_type == "v_prediction"
            target = self.schedule.get_velocity(latents, noise, steps) if velocity else noise
        return Prediction(self.predict(noisy, steps, self.states(input_ids, attention_mask), attention_mask), target)

    def predict(self, noisy: Tensor, steps: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """The noise, or the velocity, in latents (B, C, h, w) at steps (B,), by the prompts' states (B, T, d)."""
        keep = None if mask is None else mask.bool()
        return self.unet(noisy, steps, encoder_hidden_states=states, encoder_attention_mask=keep).sample

    def states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """What the text encoder says of prompts: (B, T, d)."""
        if hasattr(self, "text_encoder"):
            mask = {} if attention_mask is None else {"attention_mask": attention_mask}
            return self.text_encoder(input_ids=input_ids, **mask)[0]
        with in_full(input_ids.device):  # they are kept, also for what draws in float32
            return self.parts.inner.states(input_ids, attention_mask).to(next(self.unet.parameters()).dtype)

    def drawn(self, draw: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The steps (B,) and the noise (B, C, h, w) that the seeds (B,) say, the same on every device."""
        if draw.is_meta:  # of a plan
            return torch.zeros_like(draw), torch.empty_like(like)
        steps, noise = [], []
        for seed in draw.tolist():
            generator = torch.Generator().manual_seed(seed)
            steps.append(torch.randint(0, self.schedule.config.num_train_timesteps, (), generator=generator))
            noise.append(torch.randn(like.shape[1:], generator=generator))
        return torch.stack(steps).to(like.device), torch.stack(noise).to(like)

    def draw(self, tokens: Mapping[str, Tensor], empty: Mapping[str, Tensor], seeds: Sequence[int], **how) -> Tensor:
        """Pictures uint8 (N, 3, S, S): see `recombine.models.drawing.draw`."""
        return draw(self, tokens, empty, seeds, **how)

    @property
    def needs_folder(self) -> bool:
        """Whether parts of it lie in its folder, so that a file of its weights does not hold all of it."""
        parts = self.parts.inner
        return parts.path is not None and (parts.has_vae or parts.text == "folder")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels and sides of what the UNet works on."""
        size = self.recombine_source["image_size"] // self.parts.inner.factor
        return self.unet.config.in_channels, size, size

    def set_grad_checkpointing(self, on: bool) -> None:
        """Has the backward pass compute each block of the UNet again, and of a text encoder that trains."""
        (self.unet.enable_gradient_checkpointing if on else self.unet.disable_gradient_checkpointing)()
        if (text := getattr(self, "text_encoder", None)) is not None:
            (text.gradient_checkpointing_enable if on else text.gradient_checkpointing_disable)()


def in_full(device: torch.device) -> AbstractContextManager:
    """Without autocast, which a plan's meta device does not know."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def build(
    name: Name,
    *,
    arch: Name = "unet",
    id: Name | None = None,
    revision: Name | None = None,
    pretrained: bool = True,
    checkpoint: Place | None = None,
    image_size: Pixels | None = None,
    text: Literal["folder", "minilm", "bytes"] = "folder",
    fold: Annotated[int, Field(ge=1, le=8)] = 1,
    train_text: bool = False,
    text_config: Mapping[str, Any] | None = None,
    schedule: Mapping[str, Any] | None = None,
    **sizes,
) -> nn.Module:
    """A text-to-image model; ``model.recombine_source`` says where it came from.

    Args:
        id, revision: of a repository in diffusers' layout.
        checkpoint: a folder in that layout.
        image_size: pixels of a side; None: the weights' own.
        text: the text encoder: the folder's, the packaged MiniLM, or a random one over bytes.
        fold: where no autoencoder is: that many pixels a side are one latent.
        train_text: the text encoder is a part of the model, which methods rewrite and train.
        text_config: of that text encoder, where there is no folder: then it is random.
        schedule: beta_schedule, prediction_type and num_train_timesteps, where there is no folder that says them.
        sizes: arguments of diffusers' UNet2DConditionModel; of a folder, those that it must have.

    Raises:
        UsageError: the model cannot be had, or a key is not its own.
    """
    path = folder(name, id=id, revision=revision, pretrained=pretrained, checkpoint=checkpoint)
    config = checked_sizes(sizes) if path is None else agreeing(name, path, read_config(path, "unet"), sizes)
    said = checked_schedule(schedule or {}) if path is None else read_config(path, "scheduler")
    try:
        unet = UNet2DConditionModel(**config) if path is None else read_unet(name, path, UNet2DConditionModel)
        parts = Parts(path, text, fold, unet.config.cross_attention_dim)
        encoder = parts.fresh_encoder(text_config if path is None else None) if train_text else None
        model = TextToImage(unet, said, parts, encoder)
    except (ValueError, TypeError, IndexError, ZeroDivisionError, RuntimeError, AttributeError) as error:
        raise UsageError(f"model {name}: the UNet cannot be built ({first_line(error)}); correct its sizes") from error
    source = {"name": name, "library": "diffusers", "arch": arch, "id": id, "revision": revision}
    source |= {"pretrained": pretrained, "checkpoint": checkpoint and str(checkpoint), "text": text, "fold": fold}
    source |= {"schedule": {key: said[key] for key in sorted(SCHEDULE & said.keys())}}
    source |= {"train_text": True, "text_config": configured(encoder)} if train_text else {}
    source |= {"image_size": fitting(name, image_size or (unet.config.sample_size or 0) * parts.factor, unet, parts)}
    model.recombine_source = source | written(unet, UNet2DConditionModel)
    model.recombine_weights = path
    return model.train()


def checked_schedule(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """A noise schedule of the configuration.

    Raises:
        UsageError: it has a key that is not of SCHEDULE.
    """
    if unknown := sorted(schedule.keys() - SCHEDULE):
        raise UsageError(f"model.schedule.{unknown[0]}: there is no such key; it has {', '.join(sorted(SCHEDULE))}")
    return dict(schedule)


def checked_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the UNet, each known and plain.

    Raises:
        UsageError: names the first that is not.
    """
    known = written(None, UNet2DConditionModel)
    for key, value in sizes.items():
        if key not in known:
            raise UsageError(f"model.{key}={value!r}: UNet2DConditionModel has no such key; drop it")
        refuse(f"model.{key}", value, LARGEST)
    return {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in sizes.items()}


def agreeing(name: str, path, theirs: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the folder's UNet.

    Raises:
        UsageError: the folder holds a UNet of other sizes than those that are given.
    """
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in checked_sizes(sizes).items()}
    if differ := [f"model.{key}={theirs.get(key)}" for key, value in plain.items() if theirs.get(key) != value]:
        raise UsageError(f"model {name}: {path} holds a UNet of other sizes; to take it, say {' '.join(differ)}")
    return dict(theirs)


def fitting(name: str, size: int, unet: nn.Module, parts: Parts) -> int:
    """The size of pictures, which the UNet has to halve as often as it has levels.

    Raises:
        UsageError: there is none, or it does not fit; names the sizes nearby that do.
    """
    if not size:
        raise UsageError(f"model {name}: image_size=null, and its UNet does not say: set model.image_size")
    step = parts.factor * 2 ** (len(unet.config.block_out_channels) - 1)
    if size % step:
        near = max(step, size // step * step)
        fix = f"take {near} or {near + step}"
        raise UsageError(f"model {name}: image_size={size} is no multiple of {step}, which the UNet needs: {fix}")
    return size


def tokenizer(source: Mapping) -> Prompts:
    """What makes tokens of prompts, by a model's ``recombine_source``."""
    where = {key: source[key] for key in ("id", "revision", "pretrained", "checkpoint")}
    return Prompts(folder(source["name"], **where), source["text"])
