"""What a plan knows of a model that draws: its frozen parts, its batches and its drawing, without a file of them."""

from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recombine.core import footprint
from recombine.core.footprint import Kernels
from recombine.data.prompted.base import PromptedData, at_once
from recombine.data.prompted.captions import SHOWN
from recombine.runner.plan_devices import Cost

if TYPE_CHECKING:
    from recombine.runner.plan_player import Player


def frozen(model: nn.Module) -> int:
    """Bytes of what lies beside the model's parameters and never trains."""
    own = (model.parts.inner.encoder, model.parts.inner.vae) if hasattr(model, "parts") else ()
    return footprint.size(p for part in filter(None, own) for p in part.parameters())


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
        size = min(count, at_once(player.model.recombine_source["image_size"]))
        walk(player, "prior", ceil(count / size), size, **module.prior_how)


def test(player: "Player") -> None:
    """The pictures of a test."""
    how = player.settings.sample
    if not (hasattr(player.model, "draw") and how.seeds):
        return
    prompts = len(player.module.asked(how.prompts)) or SHOWN
    size = min(len(how.seeds), at_once(player.model.recombine_source["image_size"]))
    walk(player, "draw", prompts * ceil(len(how.seeds) / size), size, steps=how.steps, guidance=how.guidance)


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

    whole = Kernels(None, player.device.gpu)  # in float32, whatever trains
    one = footprint.forward(step, known, whole)
    last = footprint.forward(lambda: parts.decode(noisy[:size]), known, whole)
    weights = footprint.size(known)
    cost = Cost.of(one) * (steps * rounds) + Cost.of(last) * rounds
    player.add(name, cost, weights=weights, activations=max(one.peak, last.peak))
