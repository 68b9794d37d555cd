"""Files that hold all of a model: small, exact, and loaded without the pretrained one."""

import copy
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import recombine
from recombine.runtime import tensor_file
from scripts.tiny_models import MODELS
from zoo import batch, build, outputs


def plain(**more):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, **more).eval()


def maps_of(path) -> list[tuple[int, int]]:
    """Where in memory the file is mapped, as Linux says."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines if line[-1] == str(path)]


def test_a_plain_timm_model_compressed(tmp_path):
    """The default for a model that holds less: within 2 % of what `count` says, and mapped, not copied."""
    model = recombine.apply(plain(), recombine.Crisp(chunk=16), "retained_50")
    path, x = recombine.save(model, tmp_path / "m"), torch.randn(2, 3, 32, 32)
    assert path.stat().st_size <= 1.02 * recombine.count(model).bytes_weights
    loaded = recombine.load(path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x)) and not hasattr(loaded, "recombine_source")
    assert all(any(start <= p.data_ptr() < end for start, end in maps_of(path)) for p in loaded.parameters())
    before = path.read_bytes()
    with torch.no_grad():
        loaded.head.weight.add_(1)  # trains in memory
    assert path.read_bytes() == before and recombine.load(path).head.weight[0, 0] == model.head.weight[0, 0]
    again = recombine.load(recombine.save(loaded, tmp_path / "again")).eval()
    assert torch.equal(again(x), loaded(x))
    other = recombine.load(path, plain(drop_path_rate=0.1))  # onto a model of any weights too
    assert torch.equal(other.eval()(x), model(x))


def test_a_difference_is_still_a_difference(tmp_path):
    model = recombine.apply(plain(), recombine.Peft())
    assert recombine.save(model, tmp_path / "m").stat().st_size < 0.2 * recombine.count(model).bytes_weights
    with pytest.raises(recombine.UsageError, match="made from a model of your own"):
        recombine.load(tmp_path / "m")


ARGUMENTS = [
    {"depth": 3}, {"drop_path_rate": 0.2}, {"mlp_ratio": 2.0}, {"qkv_bias": False}, {"init_values": 1e-4},
    {"reg_tokens": 2}, {"patch_size": 8}, {"dynamic_img_size": True},
]  # fmt: skip


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda given: next(iter(given)))
def test_what_timm_notes_is_built_again(arguments, tmp_path):
    model = recombine.apply(plain(**arguments), recombine.Svd(), "retained_50").eval()
    loaded = recombine.load(recombine.save(model, tmp_path / "m", whole=True)).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


def test_what_cannot_be_built_again_is_refused_or_said(tmp_path, caplog):
    model = plain(in_chans=1)  # no argument that a file may say
    recombine.apply(model, recombine.Svd(), "retained_50")
    with pytest.raises(recombine.UsageError, match=r"cannot be built again .*whole=False"):
        recombine.save(model, tmp_path / "m", whole=True)
    recombine.save(model, tmp_path / "m")
    assert "holds the difference to the pretrained model only" in caplog.text
    assert recombine.load(tmp_path / "m", plain(in_chans=1)).recombined.steps[0].method == "Svd"
    heads = plain()
    heads.blocks[0].attn.num_heads = 1  # shapes do not show it
    with pytest.raises(recombine.UsageError, match="blocks.0.attn.num_heads is"):
        recombine.save(recombine.apply(heads, recombine.Svd(), "retained_50"), tmp_path / "m", whole=True)


@pytest.mark.parametrize(
    "method",
    [recombine.Peft(targets=("*",)), recombine.Svd(targets=("blocks.0.*",)), recombine.Ssf(targets=("*.0.*",))],
)
def test_a_pattern_may_name_more_than_linear_layers(method, tmp_path):
    """Norms among them, which the method leaves as they are, and so does the file."""
    model = recombine.apply(build("tiny_vit"), method).eval()
    loaded = recombine.load(recombine.save(model, tmp_path / "m", whole=False), build("tiny_vit")).eval()
    x = batch(model)
    assert torch.equal(outputs(loaded, x), outputs(model, x)) and model.recombined.targets == loaded.recombined.targets
    assert recombine.merge(loaded) is loaded


def test_a_fresh_head_and_a_cast_are_kept(tmp_path):
    model = recombine.apply(build("tiny_deberta"), recombine.Svd(), "retained_50").bfloat16()
    loaded = recombine.load(recombine.save(model, tmp_path / "m")).eval()
    x = batch(model)
    assert next(loaded.parameters()).dtype == torch.bfloat16
    assert torch.equal(outputs(loaded, x), outputs(model, x))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_model_is_saved_as_itself(wrap, tmp_path):
    model = recombine.apply(build("tiny_vit"), recombine.Cersa())
    recombine.save(wrap(model), tmp_path / "m")
    recombine.save(model, tmp_path / "bare")
    assert (tmp_path / "m").read_bytes() == (tmp_path / "bare").read_bytes()


def test_what_was_trained_and_frozen_again_is_saved(tmp_path):
    model = recombine.apply(build("tiny_vit"), recombine.Peft())
    with torch.no_grad():
        model.pos_embed[0, 1, 2] += 1  # in place
        model.norm.weight.data = model.norm.weight.data * 2  # another tensor
        model.blocks[0].norm1.load_state_dict({"weight": torch.ones(48) * 3, "bias": torch.zeros(48)})
    model.requires_grad_(False)
    loaded = recombine.load(recombine.save(model, tmp_path / "m", whole=False), build("tiny_vit"))
    for mine, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    meta, _ = tensor_file.read(tmp_path / "m")
    assert not {"pos_embed", "norm.weight", "blocks.0.norm1.weight"} & meta["own"].keys() and "norm.bias" in meta["own"]


def test_a_move_and_a_cast_leave_the_backbone_out(tmp_path):
    model = recombine.apply(build("tiny_vit"), recombine.Peft())
    own = set(model.recombined.untouched)
    for changed in (copy.deepcopy(model), copy.deepcopy(model).bfloat16()):
        recombine.save(changed, tmp_path / "m", whole=False)
        assert changed.recombined.untouched == own


def test_a_failed_load_changes_nothing(tmp_path):
    deep = recombine.apply(plain(), recombine.Svd(ratio=0.5))
    path = recombine.save(deep, tmp_path / "m", whole=False)
    for model, word in ((plain(depth=3), "does not fit"), (plain(), "differs from the backbone")):
        with torch.no_grad():
            model.pos_embed.add_(1)
        before, flags = copy.deepcopy(model), [p.requires_grad for p in model.parameters()]
        layers = list(model.modules())
        with pytest.raises(recombine.UsageError, match=word):
            recombine.load(path, model)
        assert all(a is b for a, b in zip(model.modules(), layers, strict=True))
        assert [p.requires_grad for p in model.parameters()] == flags and not hasattr(model, "recombined")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_path_that_is_none_is_one_short_line(tmp_path):
    """A model in a path's place too: its own text has a thousand lines."""
    model = recombine.apply(plain(depth=1), recombine.Svd(), "retained_50")
    for call in (recombine.load, partial(recombine.save, model), partial(recombine.load_adapter, model)):
        for given, word in ((None, "None"), (3, "3"), (model, "a VisionTransformer")):
            with pytest.raises(recombine.UsageError, match="must be the path of") as found:
                call(given)
            assert str(found.value).startswith(f"{word}: ") and "\n" not in str(found.value)


def test_what_is_loaded_in_inference_mode_runs_there(tmp_path):
    """Its tensors count no changes, so what is built of them is not kept."""
    model = build("tiny_llama").eval()
    recombine.apply(model, recombine.Svd(), "retained_50")
    recombine.save(model, tmp_path / "whole.safetensors")
    with torch.no_grad():
        expected = outputs(model, batch(model))
    with torch.inference_mode():
        torch.testing.assert_close(
            outputs(recombine.load(tmp_path / "whole.safetensors").eval(), batch(model)), expected
        )


@pytest.mark.parametrize("name", ["timm ViT, relative positions", "timm EVA-02", "timm Swin v2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_whole_file_does_not_depend_on_the_default_dtype(name, dtype, tmp_path):
    tiny = MODELS[name]
    model, x = tiny.fresh(), tiny.inputs()
    recombine.apply(model, recombine.Svd(), "retained_50").eval()
    file = recombine.save(model, tmp_path / "m", whole=True)
    torch.set_default_dtype(dtype)
    try:
        loaded = recombine.load(file).eval()
        recombine.save(model, tmp_path / "again", whole=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
