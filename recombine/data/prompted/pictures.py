"""Pictures of a subject as rows, what tells them and their models apart, and the subject's word in a prompt."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


class Repeated:
    """Pictures (N, 3, S, S) again and again: row i is picture i modulo N."""

    def __init__(self, pictures: Tensor):
        self.pictures = pictures

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """uint8 (B, 3, S, S)."""
        return self.pictures[[row % len(self.pictures) for row in rows]]


def alone(word: str) -> str:
    """A regular expression that finds a word between others."""
    return rf"(?<!\w){re.escape(word)}(?!\w)"


def said(word: str, prompt: str) -> bool:
    """Whether a word is in a prompt, by itself."""
    return re.search(alone(word), prompt) is not None


def digest(pictures: Tensor) -> str:
    """sha256 of pictures uint8."""
    return hashlib.sha256(pictures.numpy().tobytes()).hexdigest()


def square(pixels: np.ndarray, size: int) -> Tensor:
    """A picture uint8 (H, W, 3) as uint8 (3, size, size): the square around its middle, resized."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def fingerprint(model: nn.Module) -> str:
    """Tells models of other weights apart, by a few entries of each tensor."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        some = p.detach().flatten()[:: max(1, p.numel() // 16)][:16].float().cpu().numpy()
        digest.update(f"{name} {tuple(p.shape)}".encode() + some.tobytes())
    return digest.hexdigest()
