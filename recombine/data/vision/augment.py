"""Augmentation of whole batches on their device; only the draws, a few numbers a picture, come from the CPU.

    flip   a picture is mirrored with probability 1/2
    crop   random resized crop (Szegedy et al., arXiv 1409.4842: area 8 % .. 100 %, aspect 3/4 .. 4/3), then flip
Paper: crops come out of the original picture, and one that does not fit is drawn again. Here: out of the cached square,
which every crop enlarges (bilinear), and its sides are cut to the square's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, C, H, W) of any type -> the same; ``generator`` is a CPU's."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored.to(images.device).view(-1, 1, 1, 1), images.flip(-1), images)


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, C, H, W) floats -> the same size: crops of the same square, half of them mirrored."""
    area, aspect, x, y, mirror = torch.rand(5, len(images), generator=generator)  # (B,) each
    area = AREA[0] + (AREA[1] - AREA[0]) * area
    aspect = torch.exp(math.log(ASPECT[0]) + math.log(ASPECT[1] / ASPECT[0]) * aspect)
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)  # of the square's side
    theta = torch.zeros(len(images), 2, 3)  # where an output pixel looks, in [-1, 1]
    theta[:, 0, 0], theta[:, 0, 2] = width * torch.where(mirror < 0.5, -1.0, 1.0), (2 * x - 1) * (1 - width)
    theta[:, 1, 1], theta[:, 1, 2] = height, (2 * y - 1) * (1 - height)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
