"""The linear probe's share of a plan: features of the pictures or texts, and a regression on them."""

from typing import TYPE_CHECKING

import torch

from recombine.core import footprint
from recombine.evaluation import linear_probe
from recombine.models import roles
from recombine.runner.plan_devices import Cost

if TYPE_CHECKING:
    from recombine.runner.plan_player import Player

PROBE_STEPS = 500  # evaluations of the linear probe's loss, all decays together


def probe(player: "Player") -> None:
    """Adds the phase, where the run has it."""
    stage, head, classes = player.stage, roles.head(player.model), player.module.num_classes
    if head is None or not classes or stage.name == "evaluate":
        return
    fitted, test, _ = linear_probe.asked(player.settings, (player.spec.compressor, player.spec.method))
    if not fitted:
        return
    watch, per = player.forward(64)
    width, train = roles.output_layer(player.model).in_features, player.samples.get("train", 0)
    count = sum(size for split, size in player.samples.items() if test or split != "test")
    cost = per * count + Cost(moved=0) if count else None
    if cost:
        cost.products[torch.float64] += PROBE_STEPS * 4 * train * width * classes
    weights = footprint.size(footprint.tensors(player.model))
    player.add("probe", cost, weights=weights, activations=watch.peak, features=8 * width * (count + 2 * train))
