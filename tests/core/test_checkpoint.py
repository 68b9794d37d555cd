"""Checkpoints: what is saved, what is refused, and a full disk."""

import copy
import resource

import pytest
import torch
from safetensors.torch import save_file

import recombine
import zoo
from recombine import models, results


def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = models.build("tiny_vit", arch="vit_tiny_patch16_224", pretrained=False, image_size=32, num_classes=3)
    model = recombine.apply(model, recombine.Cersa())
    return recombine.save(model, tmp_path / "good.safetensors", whole=False)


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


@pytest.mark.parametrize("method", [recombine.Peft(targets=("q", "v"), rank=2), recombine.Svd(targets=("q", "k", "v"))])
def test_a_fused_layer_in_two_places_is_loaded_into_both(tmp_path, method):
    vit = zoo.build("tiny_vit")
    vit.blocks[1].attn.qkv = vit.blocks[0].attn.qkv
    torch.manual_seed(0)
    x, model = zoo.batch(vit), copy.deepcopy(vit)
    recombine.apply(model, method, "retained_50" if isinstance(method, recombine.Svd) else None)
    zoo.train(model, 2)
    file = recombine.save(model.eval(), tmp_path / "m", whole=False)
    assert torch.equal(zoo.outputs(recombine.load(file, vit).eval(), x), zoo.outputs(model, x))
    assert vit.blocks[1].attn.qkv is vit.blocks[0].attn.qkv


def test_hooks_of_a_fused_layer_live_through_load_and_adapters(tmp_path):
    vit = zoo.build("tiny_vit")
    model, x, calls = (
        recombine.apply(copy.deepcopy(vit), recombine.Peft(targets=("q", "v"), rank=2)),
        zoo.batch(vit),
        [],
    )
    file, other = recombine.save(model, tmp_path / "m", whole=False), copy.deepcopy(vit)
    part = recombine.save_adapter(model, tmp_path / "a")
    handle = vit.blocks[0].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    zoo.outputs(recombine.load(file, vit), x)
    assert calls == [1]
    handle.remove()
    zoo.outputs(vit, x)
    assert calls == [1]
    other.blocks[0].attn.qkv.register_forward_hook(lambda *_: calls.append(2))
    recombine.load_adapter(other, part, "a")
    for switch in (recombine.disable_adapters, lambda m: recombine.set_adapter(m, "a")) * 2:
        zoo.outputs(switch(other), x)
    assert calls == [1, 2, 2, 2, 2]


def test_a_file_for_a_folder_is_refused_in_one_line(tmp_path):
    vit = zoo.build("tiny_vit")
    recombine.apply(vit, recombine.Svd(), "retained_50")
    (tmp_path / "file").touch()
    for write in (recombine.save, recombine.save_adapter, recombine.export):
        with pytest.raises(recombine.UsageError, match="cannot be written"):
            write(vit, tmp_path / "file" / "x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_entries_too_small_for_half_precision_are_still_those_of_the_backbone(dtype, tmp_path):
    """float16 has one digit at 1e-7; timm's class tokens start at 1e-6."""
    model = zoo.build("tiny_vit")
    with torch.no_grad():
        model.cls_token.copy_(torch.randn_like(model.cls_token) * 1e-7)
    recombine.save(recombine.apply(copy.deepcopy(model), recombine.Crisp(chunk=8)), tmp_path / "a", whole=False)
    recombine.load(tmp_path / "a", copy.deepcopy(model).to(dtype))
    with torch.no_grad():
        model.cls_token += 1e-2
    with pytest.raises(recombine.UsageError, match="cls_token differs from the backbone"):
        recombine.load(tmp_path / "a", model.to(dtype))
