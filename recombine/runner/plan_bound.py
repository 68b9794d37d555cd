"""What a plan counts of a method that cannot be rehearsed."""

from typing import TYPE_CHECKING

from recombine.core import rewrite
from recombine.core.method import Method, Site
from recombine.models import roles

if TYPE_CHECKING:
    from recombine.runner.plan_player import Player


def bound(player: "Player", method: Method, sites: list[Site]) -> None:
    """Leaves the player's model dense, and trains all that the method could."""
    why = "what it stores and trains is learnt; the dense layers are counted in its place, which is the most"
    player.told.notes.append(f"{method.label}: {why}")
    model = player.model
    model.recombined = rewrite.started_record(model, sites, set())
    model.recombined.targets = {site.name: site.role for site in sites}
    model.requires_grad_(False)
    for site in sites:
        site.module.requires_grad_(not method.compresses)
    if (head := roles.head(model)) is not None:
        head.requires_grad_(True)
    model.recombined.trainable = {name for name, p in model.named_parameters() if p.requires_grad}
