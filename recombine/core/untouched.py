"""Which frozen tensors still hold the pretrained values: what a checkpoint may leave out.

A tensor that was trained and frozen again, or edited, is found by its values. Where it lies and how often it was
written to would not tell: a model that moves to a GPU, or is cast there and back, changes one without the other.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from recombine.runtime.mapped import release

if TYPE_CHECKING:
    from recombine.core.rewrite import Record

PIECE = 2**20  # words of 8 bytes that are added up at once
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no bit is lost


class Mark(NamedTuple):
    """A tensor as it was: its type, and two fingerprints of its values."""

    dtype: torch.dtype
    total: int
    entries: list[float]


def remember(model: nn.Module, record: "Record") -> None:
    """Marks every parameter that the record calls untouched, as it is now."""
    record.marks = {}
    for name, p in model.named_parameters():
        if name in record.untouched and not p.is_meta:
            record.marks[name] = Mark(p.dtype, total(p), probe(p))
            release([p])


def forget_changed(model: nn.Module, record: "Record") -> None:
    """Takes from the record's untouched parameters what trains or has other values than when it was marked."""
    for name, p in model.named_parameters():
        mark = record.marks.get(name)
        if p.requires_grad or mark is not None and not same(p, mark):
            record.untouched.discard(name)


def same(p: Tensor, mark: Mark) -> bool:
    """Whether a tensor has the values of the mark: bit for bit, or nearly where it is of another type by now."""
    return total(p) == mark.total if p.dtype == mark.dtype else near(p, mark.entries, 1e-2)


def near(p: Tensor, entries: list[float], rtol: float) -> bool:
    """Whether a tensor has nearly these entries at the places of `probe`; float16 has few digits below 6e-5."""
    step = 2**-24 if p.dtype == torch.float16 else 1e-8
    return torch.allclose(torch.tensor(probe(p)), torch.tensor(entries), rtol=rtol, atol=step)


def total(tensor: Tensor) -> int:
    """A weighted sum over a tensor's bytes, exact and the same on every device; it depends on their order."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if len(data) % 8 or data.storage_offset() % 8:  # no whole words
        data = torch.nn.functional.pad(data, (0, -len(data) % 8)).clone()
    words = data.view(torch.int64)
    weights = torch.arange(min(len(words), PIECE), device=words.device) * 2 + 1
    sums = [int((piece * weights[: len(piece)]).sum()) for piece in words.split(PIECE)]
    return sum(value * pow(MULTIPLIER, i, 2**64) for i, value in enumerate(sums)) % 2**64


def probe(tensor: Tensor) -> list[float]:
    """Four evenly spaced entries of a tensor, by which an untouched one is recognised in another process."""
    flat = tensor.detach().flatten()
    if not len(flat):  # DINOv3 without register tokens
        return [0.0] * 4
    return flat[torch.linspace(0, len(flat) - 1, 4, dtype=torch.float64).long()].float().tolist()
