"""How a run's calibration will keep to its memory: at once, block by block or in passes, as the run itself decides."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from recombine.core import digesting, rewrite
from recombine.core.memory import SHARE, Memory, sums
from recombine.core.method import Method, Site
from recombine.models import roles
from recombine.runner.config import RunSpec
from recombine.runner.plan_devices import Device
from recombine.runner.plan_parts import shortened
from recombine.runtime import memory

if TYPE_CHECKING:
    from recombine.runner.plan_player import Player

STREAMED = 4 / 3  # passes that a calibration block by block is worth


@dataclass(frozen=True)
class Foreseen(Memory):
    """The memory of the machine that a plan is for. free: its bytes beside the weights."""

    free: int = 0

    def bytes(self, device: torch.device) -> int:
        return int(SHARE * self.free) if self.limit is None else self.limit


def paged(spec: RunSpec, device: Device) -> bool:
    """Whether a model larger than the memory will do: its weights, and the new ones, can stay pages of files."""
    files = spec.model.get("library") == "transformers" and spec.model.get("pretrained", True)
    return bool(files) and not device.gpu and spec.settings.stage.name == "retrofit"


def foresee(player: "Player", method: Method) -> None:
    """Tells the rehearsal in how many passes a method that digests is calibrated, and what of its sums is held at once.

    It asks the run's own function, with all of the model's blocks. That these form a chain is taken for granted.

    Raises:
        UsageError: calibration.memory does not hold one layer.
    """
    spec, told, kinds = player.spec, player.told, method.statistics_needed()
    if type(method).digest is Method.digest or not kinds or hasattr(player.model, "recombined"):
        return
    model, _ = shortened(spec, player.module, None)
    if spec.compressor is not None:
        roles.split_fused(model, spec.method.targets)
    method = method.copy()
    names = [(site.name, site.role) for site in rewrite.find_sites(model, method)]
    roles.split_fused(model, method.targets)
    sites = [Site(name, role, model.get_submodule(name)) for name, role in names]
    held = 0 if paged(spec, player.device) else told.weights  # pages of files make room
    limit = memory.parse(player.settings.calibration.memory, "calibration.memory")
    method.memory = Foreseen(limit, key="calibration.memory", free=player.device.memory - held)
    groups = method.groups(sites)
    found = digesting.way(model, method, groups, kinds)
    parts = [[site for group in part for site in group] for part in found.passes]
    told.passes = len(parts)
    if found.blocks is not None:
        parts, told.passes = digesting.waiting(groups, found.blocks), STREAMED
    told.sums = max(sums(part, kinds) for part in parts)
    if found.blocks is not None:
        told.notes.append(f"{method.label}: calibration goes block by block, for its sums do not fit together")
    elif len(parts) > 1:
        told.notes.append(f"{method.label}: calibration takes {len(parts)} passes, for its sums do not fit together")
