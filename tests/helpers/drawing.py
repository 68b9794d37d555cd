"""A tiny text-to-image model with random weights, pictures of a subject, and their data module."""

import numpy as np
import torch
from PIL import Image

from helpers import config
from recombine import data, models

SIZES = {
    "pretrained": False, "text": "bytes", "image_size": 16, "sample_size": 8, "block_out_channels": [16, 32],
    "cross_attention_dim": 16, "attention_head_dim": [1, 2], "norm_num_groups": 8,
}  # fmt: skip
LINEAR = r"unet\..*(?:to_\w|to_out\.0|net\.0\.proj|net\.2|proj_in|proj_out|time_emb_proj|linear_\d)"  # every one
COMMAND = ["model=tiny_diffusion", *(f"model.{key}={value}".replace(" ", "") for key, value in SIZES.items())]
SHORT = ["data.prior=3", "data.prior_steps=2", "data.repeats=1", "trainer.epochs=1", "trainer=cpu"]


def build(seed: int = 0, **more):
    """In eval mode; spectra uneven, as pretrained weights have them."""
    torch.manual_seed(seed)
    model = models.build(**config("tiny_diffusion") | SIZES | more)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(torch.logspace(0, -1, p.shape[-1]) * 2)
    return model.eval()


def subject(folder, count: int = 5, size=(24, 20)):
    """Pictures of a subject called cat, in the folder's folder cat."""
    (folder := folder / "cat").mkdir(exist_ok=True)
    numbers = np.random.default_rng(0)
    for i in range(count):
        pixels = numbers.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def module(model, root, **more):
    """The data module of those pictures, set up for the model."""
    found = data.build("dreambooth", root=str(root), **{"prior": 3, "prior_steps": 2, "repeats": 1} | more)
    found.attach_model(**models.for_data(model.recombine_source))
    found.prepare_data()
    found.setup()
    found.ask(model)
    return found
