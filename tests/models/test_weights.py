"""A model's checkpoint file: what fills the model, and what is refused."""

import hashlib
import logging
import os

import pytest
import torch
from safetensors.torch import save_file

from helpers import ROOT, config
from helpers.vision_models import refused
from recombine.models import build, weights


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_checkpoint_fills_the_model_and_drops_only_a_head(tmp_path, suffix, caplog):
    file = tmp_path / f"vit.{suffix}"
    original = build(**config("tiny_vit", num_classes=5))
    state = original.state_dict()
    save_file(state, file) if suffix == "safetensors" else torch.save({"state_dict": state}, file)
    x = torch.randn(2, 3, 32, 32)
    same = build(**config("tiny_vit", num_classes=5, checkpoint=file))
    assert torch.equal(same.eval()(x), original.eval()(x))
    assert same.recombine_source["checkpoint"] == str(file)
    with caplog.at_level(logging.INFO):
        other = build(**config("tiny_vit", num_classes=7, checkpoint=file)).eval()
    assert "head.weight 5x48 is dropped" in caplog.text and other.head.weight.shape == (7, 48)
    assert torch.equal(other.forward_features(x), original.forward_features(x))


def test_checkpoints_that_do_not_fit_name_the_first_tensor(tmp_path):
    file = tmp_path / "vit.safetensors"
    save_file(build(**config("tiny_vit")).state_dict(), file)

    def line(**kwargs):
        text = refused(**config("tiny_vit", checkpoint=file, **kwargs))
        assert str(file) in text
        return text

    assert "lacks blocks.4.norm1.weight 48" in line(depth=5)
    assert "its blocks.3." in line(depth=3)
    assert "its patch_embed.proj.weight is 48x3x8x8, the model needs 96x3x8x8" in line(embed_dim=96)
    assert "the model needs 48x3x16x16" in line(patch_size=16)  # timm would resample the patches and say nothing
    assert "vit.safetensors" in refused(**config("tiny_swin", checkpoint=file))


def test_damaged_checkpoints_are_refused(tmp_path):
    state = build(**config("tiny_vit")).state_dict()
    good = tmp_path / "good.safetensors"
    save_file(state, good)
    content = good.read_bytes()
    torch.save(state, tmp_path / "good.pt")

    bad = {
        "truncated.safetensors": content[:-100],
        "header.safetensors": b"\xff" * 16 + content[16:],
        "empty.safetensors": b"",
        "truncated.pt": (tmp_path / "good.pt").read_bytes()[:-5000],
        "empty.pt": b"",
        "page.pt": b"<html>not found</html>",
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    torch.save({"code": ROOT}, tmp_path / "code.pt")  # an object: weights_only refuses it
    torch.save([1, 2], tmp_path / "list.pt")
    save_file(state | {"norm.bias": torch.full((48,), torch.nan)}, tmp_path / "nan.safetensors")
    for name in [*bad, "code.pt", "list.pt", "nan.safetensors", "missing.safetensors"]:
        assert name in refused(**config("tiny_vit", checkpoint=tmp_path / name))


def test_settings_that_do_not_exist_are_refused():
    assert "vit_tiny_patch16_224" in refused(**config("tiny_vit", arch="vit_tiny_patch16_22"))
    assert "augreg_in21k" in refused(**config("vit_s16", tag="augreg"))
    assert "model=dinov2_s14" in refused(**config("vit_s16", tag="packaged"))
    assert "no multiple of the patch size 14: take 98 or 112" in refused(
        **config("dinov2_s14", image_size=100, pretrained=False)
    )
    assert "wings=2" in refused(**config("tiny_vit"), wings=2)
    assert "num_heads=5" in refused(**config("tiny_vit", num_heads=5))


def test_the_sha256_of_weights_is_that_of_what_was_read(tmp_path):
    """The hub's cache calls a file by the sha256 that it should have."""
    blob = tmp_path / "blobs" / hashlib.sha256(b"whole").hexdigest()
    folder = tmp_path / "snapshots" / "0"
    for part in (blob.parent, folder):
        part.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(blob)
    for content in (b"whole", b"other"):
        blob.write_bytes(content)
        os.utime(blob, ns=(0, content[0]))
        assert weights.origin(folder)["sha256"] == {"model.safetensors": hashlib.sha256(content).hexdigest()}
