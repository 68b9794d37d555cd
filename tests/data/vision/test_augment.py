"""Augmentation is for training alone and follows the seed."""

import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.hub_pictures import dataset, encoded, make, store
from recombine.data.vision import augment
from recombine.data.vision.suites import Vision8

pytestmark = pytest.mark.usefixtures("empty_caches")


def test_pictures_reach_the_batch_as_pillow_resizes_them(tmp_path):
    row = Vision8.rows["cifar10"]
    store(tmp_path / "cifar10", row, each=10)
    module = make(Vision8, "cifar10", root=tmp_path, image_size=7)
    images, labels = next(iter(module.test_dataloader()))
    assert images.shape == (32, 3, 7, 7) and images.is_contiguous() and images.dtype == torch.uint8
    for i in (0, 31):
        original = Image.open(io.BytesIO(dataset(row, 1, 10)[i]["img"] and encoded(10_000 + i, "PNG")))
        expected = np.asarray(original.resize((7, 7), Image.Resampling.BICUBIC))
        assert (images[i].permute(1, 2, 0).numpy() == expected).all() and labels[i] == i % 10
    parcel = pickle.dumps(module.test)  # what a loader's worker gets is the file's name
    assert len(parcel) < 3000 and (pickle.loads(parcel).images == module.test.images).all()


def test_flip_mirrors_half(tmp_path):
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5).repeat(200, 1, 1, 1)
    out = augment.flip(images, torch.Generator().manual_seed(0))
    same = (out == images).flatten(1).all(1)
    assert torch.equal(out[~same], images[~same].flip(-1)) and 160 < same.sum() < 240


def test_crop_is_affine_and_inside():
    """A ramp stays a ramp: its slope is the crop's side over the square's, and its values lie within the square's."""
    size = 64
    ramp = torch.arange(size, dtype=torch.float32)
    images = torch.stack([ramp.expand(size, size), ramp.view(-1, 1).expand(size, size)]).repeat(300, 1, 1, 1)
    out = augment.crop(images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape and out.min() >= 0 and out.max() <= size - 1
    inner = slice(8, -8)  # half a pixel at the border is clamped
    across, down = out[:, 0, 0, inner].diff(dim=-1), out[:, 1, inner, 0].diff(dim=-1)
    assert (across - across.mean(1, keepdim=True)).abs().max() < 1e-3
    width, height = across.mean(1), down.mean(1)  # width is negative where it is mirrored
    assert (down > 0).all() and 0.4 < (width < 0).float().mean() < 0.6
    area, aspect = width.abs() * height, width.abs() / height
    whole = (width.abs() < 0.99) & (height < 0.99)  # nothing was cut off
    assert area.min() > 0.079 and area.max() <= 1.001 and area.mean() == pytest.approx(0.54, abs=0.06)
    assert aspect[whole].min() > 0.74 and aspect[whole].max() < 1.34


def test_augmentation_is_for_training_and_follows_the_seed(tmp_path):
    row = Vision8.rows["cifar10"]
    store(tmp_path / "cifar10", row, each=10)

    def batch(augmented="crop", seed=0, step=0, training=True):
        module = make(Vision8, "cifar10", root=tmp_path, normalize=0.5, augment=augmented, seed=seed)
        module.trainer = SimpleNamespace(training=training, global_step=step, global_rank=0, world_size=1)
        raw = module.train.__getitems__(list(range(16)))
        return module.on_after_batch_transfer(raw, 0)[0], module.normalise(raw[0])

    for kind in ("flip", "crop"):
        out, plain = batch(kind)
        assert out.shape == plain.shape and out.dtype == torch.float32 and not torch.equal(out, plain)
        assert torch.equal(out, batch(kind)[0]) and not torch.equal(out, batch(kind, seed=1)[0])
        assert not torch.equal(out, batch(kind, step=1)[0]) and torch.equal(*batch(kind, training=False))
    assert torch.equal(*batch("none"))
    module = make(Vision8, "cifar10", root=tmp_path, normalize=0.5, augment="crop")  # no trainer: calibration, probe
    raw = module.train.__getitems__([0, 1])
    assert torch.equal(module.on_after_batch_transfer(raw, 0)[0], module.normalise(raw[0]))
