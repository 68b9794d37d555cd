"""Packed weights in the plan of an exported model."""

import logging
from collections.abc import Iterable

from torch import Tensor, nn

from recombine.layers.packed import Packed, packed_in

log = logging.getLogger(__name__)


def say_unpacked(model: nn.Module, names: Iterable[str]) -> None:
    """Says how many packed tensors an export holds in float: those into which something else is folded.

    Args:
        names: of the exported tensors.
    """
    there = len({id(packed) for packed in packed_in(model).values()})
    if lost := there - sum(name.endswith(".codes") for name in names):
        log.warning("%d of %d packed tensors are exported in float: an adapter is folded into them", lost, there)


def bits_of(matrix: Tensor | Packed) -> list[int]:
    """Bits and group of a packed matrix; nothing of another one."""
    return [matrix.bits, matrix.group] if isinstance(matrix, Packed) else []


def stored(name: str, matrix: Tensor | Packed) -> dict[str, Tensor]:
    """The tensors of a matrix by their names in an exported layer."""
    if isinstance(matrix, Packed):
        return {f"{name}.codes": matrix.codes, f"{name}.scale": matrix.scale}
    return {f"{name}.weight": matrix}


def identity(part: Tensor | Packed) -> int:
    """The identity of the parameter that holds a tensor."""
    return id(part.codes if isinstance(part, Packed) else part)
