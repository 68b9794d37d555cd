"""The layers that a method rewrites, and groups of them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

SAME_INPUT = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "mlp", "up": "mlp"}  # roles that read one tensor in a block


class Site(NamedTuple):
    """A target layer: its module name (blocks.0.mlp.fc1), its role (up) and the module itself."""

    name: str
    role: str
    module: nn.Module


def parent(name: str) -> str:
    """The name of the module that holds this one."""
    return name.rpartition(".")[0]


def block_of(name: str, blocks: Sequence[str]) -> int | None:
    """The index of the block, of these module names, that holds the module of that name; None: none does."""
    return next((index for index, block in enumerate(blocks) if name.startswith(f"{block}.")), None)


def source(site: Site) -> tuple[str, str]:
    """What a layer's input is told by before the model runs; it is the same for q, k and v of a block."""
    return (parent(site.name), SAME_INPUT[site.role]) if site.role in SAME_INPUT else (site.name, "")


def consecutive(sites: list[Site], size: Callable[[str], int]) -> list[list[Site]]:
    """Groups of size(role) consecutive layers that have the same role and shape.

    The last group of a role may be smaller.
    """
    alike = defaultdict(list)
    for site in sites:
        alike[site.role, site.module.weight.shape].append(site)
    return [run[i : i + size(role)] for (role, _), run in alike.items() for i in range(0, len(run), size(role))]
