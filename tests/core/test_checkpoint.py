"""Checkpoints: what is saved, what is refused, and a full disk."""

import resource

import pytest
import torch
from safetensors.torch import save_file

import recombine
from recombine import models, results


def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = models.build("tiny_vit", arch="vit_tiny_patch16_224", pretrained=False, image_size=32, num_classes=3)
    model = recombine.apply(model, recombine.Cersa())
    return recombine.save(model, tmp_path / "good.safetensors")


def fresh(seed=0, arch="vit_tiny_patch16_224", **more):
    torch.manual_seed(seed)
    return models.build("tiny_vit", **{"arch": arch, "pretrained": False, "image_size": 32, "num_classes": 3, **more})


def test_bad_checkpoints_are_one_line(tmp_path):
    path = checkpoint(tmp_path)
    assert recombine.load(path, fresh())
    whole = path.read_bytes()
    (tmp_path / "truncated").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "garbage").write_bytes(b"\x93NUMPY" * 100)
    (tmp_path / "empty").write_bytes(b"")
    save_file({"a": torch.zeros(2)}, tmp_path / "plain")
    for name, word, model in [
        ("truncated", "truncated or corrupted", fresh()),
        ("garbage", "truncated or corrupted", fresh()),
        ("empty", "truncated or corrupted", fresh()),
        ("missing", "no such file", fresh()),
        ("plain", "not a checkpoint of recombine", fresh()),
        ("good.safetensors", "differs from the backbone", fresh(seed=1)),
        ("good.safetensors", "in this model", fresh(arch="vit_small_patch16_224")),
        ("good.safetensors", "VisionTransformer", fresh(arch="swin_tiny_patch4_window7_224", image_size=224)),
    ]:
        with pytest.raises(recombine.UsageError) as error:
            recombine.load(tmp_path / name, model)
        assert word in str(error.value) and "\n" not in str(error.value), error.value


def test_save_keeps_what_the_user_unfroze(tmp_path):
    model = recombine.apply(fresh(), recombine.Cersa())
    model.norm.weight.requires_grad_(True)
    with torch.no_grad():
        model.norm.weight.mul_(1.001)
    loaded = recombine.load(recombine.save(model, tmp_path / "m"), fresh())
    assert torch.equal(loaded.norm.weight, model.norm.weight)


def test_a_method_of_the_users_own_is_saved_and_loaded(tmp_path):
    class Mine(recombine.Svd):
        pass

    model = recombine.apply(fresh(), Mine(ratio=0.3))
    assert recombine.load(recombine.save(model, tmp_path / "m"), fresh()).recombined.steps[0][0] == "Mine"


def test_a_checkpoint_adapts_the_head_of_the_model_it_is_loaded_into(tmp_path):
    model = fresh()
    model.reset_classifier(9)
    assert recombine.load(checkpoint(tmp_path), model).head.out_features == 3


def test_full_disk_leaves_nothing_half_written(tmp_path):
    """A limit on the file size stands in for the full disk: the write fails in the middle."""
    path = checkpoint(tmp_path)
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = recombine.load(path, fresh())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        with pytest.raises(recombine.UsageError, match="cannot be written") as error:
            recombine.save(model, path)
        with pytest.raises(recombine.UsageError, match="cannot be written"):
            results.write(tmp_path / "result.json", {"x": "y" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"good.safetensors"}
