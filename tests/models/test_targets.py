"""Targets as people say them: ends of names, globs, regular expressions, all-linear; heads of several layers."""

import copy
import re

import pytest
import torch
from torch import nn

import recombine
import zoo
from helpers import refusal
from recombine.models import roles
from scripts.tiny_models import MODELS


@pytest.fixture
def vit():
    return zoo.build("tiny_vit")


def inner(found: dict[str, str]) -> list[str]:
    """The names inside the first block."""
    return [name.removeprefix("blocks.0.") for name in found if name.startswith("blocks.0.")]


def test_names_globs_and_expressions(vit):
    layers = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert inner(roles.find(vit, ("all-linear",))) == layers
    assert "head" not in roles.find(vit, ("all-linear",)) and len(roles.find(vit, ("all-linear",))) == 16
    assert roles.find(vit, ("all-linear",)) == roles.find(vit, ("qkv", "o", "up", "down"))  # with their roles
    assert inner(roles.find(vit, ("attn.qkv", "fc2"))) == ["attn.qkv", "mlp.fc2"]
    assert list(roles.find(vit, (r"blocks\.[13]\.mlp\.fc\d",))) == [
        f"blocks.{i}.mlp.fc{j}" for i in (1, 3) for j in (1, 2)
    ]
    assert list(roles.find(vit, ("*.0.attn.*",))) == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    assert inner(roles.find(vit, ("fc1", "o", "gate_proj?"))) == ["attn.proj", "mlp.fc1"]
    assert roles.find(vit, (r".*qkv\.v",)) == roles.find(vit, ("v",))  # the part of a fused layer
    roles.split_fused(vit, ("k",))
    assert list(roles.find(vit, ("attn.qkv",)).values()) == ["q", "k", "v"] * 4


def test_what_is_not_there_is_one_line(vit):
    assert "it has qkv q k v o up down" in refusal(roles.find, vit, ("gate",))
    assert "layers with a like name: fc1" in refusal(roles.find, vit, ("fc11",)).replace("mlp.fc1", "fc1")
    assert "'head'" in refusal(roles.find, vit, ("head",))  # left out, as peft does
    assert "norm1, a LayerNorm, which the method cannot" in refusal(roles.find, vit, ("norm1",))
    assert recombine.Svd(targets="all-linear").targets == ("all-linear",)
    assert recombine.Svd(targets=r".*attn\.proj").targets == (r".*attn\.proj",)


@pytest.mark.parametrize(
    "targets",
    [("all-linear",), (r"blocks\.0\.attn\.qkv\.q", "fc1"), ("attn.qkv",), ("gate_proj?", "*.2.mlp.fc2")],
    ids=["all", "part", "end", "glob"],
)
@pytest.mark.parametrize("method", [recombine.Svd(ratio=0.5), recombine.Peft(rank=2)], ids=["svd", "lora"])
def test_a_file_remembers_what_was_named(vit, tmp_path, method, targets):
    method.targets = targets
    plain = copy.deepcopy(vit)
    named = recombine.apply(vit, method).recombined.targets
    x = zoo.batch(vit)
    with torch.no_grad():
        expected = vit(x)
        loaded = recombine.load(recombine.save(vit, tmp_path / "file.safetensors"), copy.deepcopy(plain)).eval()
        assert torch.equal(loaded(x), expected) and loaded.recombined.targets == named
        assert recombine.count(loaded) == recombine.count(vit)
        recombine.merge(loaded)
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    assert loaded.state_dict().keys() == plain.state_dict().keys()


def test_a_language_model_keeps_its_output_layer():
    model = zoo.build("tiny_llama")
    found = roles.find(model, ("all-linear",))
    assert len(found) == 4 * 7 and roles.find(model, ("q_proj", "gate_proj")) == roles.find(model, ("q", "gate"))
    assert "lm_head" in refusal(roles.find, model, ("lm_head",))


@pytest.mark.parametrize("adapter", [recombine.Peft(rank=2), recombine.LinearProbe(), recombine.Full()], ids=repr)
def test_the_default_compressor_and_then_a_default_adapter(vit, adapter):
    """The adapter's q, k and v together are the fused layer that the compressor has rewritten."""
    recombine.apply(vit, recombine.Crisp(chunk=16), "retained_50")
    before = vit(zoo.batch(vit))
    recombine.apply(vit, adapter)
    assert list(vit.recombined.targets.values()) == ["qkv", "o", "up", "down"] * 4
    torch.testing.assert_close(vit(zoo.batch(vit)), before)
    some = refusal(recombine.apply, vit, recombine.Peft(targets=("q",)))
    assert "qkv is one layer here: name qkv" in some
    assert "already rewritten" in refusal(recombine.apply, vit, recombine.Cersa())


@pytest.mark.parametrize(
    "name", ["timm DeiT distilled", "timm SAM ViT", "RoBERTa", "ELECTRA", "DistilBERT", "wav2vec 2.0"]
)
def test_heads_of_several_layers(name):
    model = MODELS[name].fresh()
    assert roles.classes(model) == 5 and isinstance(roles.output_layer(model), nn.Linear)
    recombine.apply(model, recombine.Peft(rank=2))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    heads = r"head\..*|head_dist\..*|classifier\..*|pre_classifier\..*|projector\..*"
    assert trained and all(re.fullmatch(heads, n) for n in trained)
    account = recombine.count(model)
    assert account.stored - account.stored_without_head == sum(p.numel() for p in roles.head(model).parameters())


def test_a_fresh_head_of_other_classes_comes_back(tmp_path):
    """A file from a model of other classes resets the head of the plain one."""
    from recombine import models

    for name in ("timm DeiT distilled", "RoBERTa"):
        model = MODELS[name].fresh()
        models.reset_head(model, 3)
        assert roles.classes(model) == 3
        recombine.apply(model, recombine.Peft(rank=2))
        loaded = recombine.load(recombine.save(model, tmp_path / "three.safetensors"), MODELS[name].fresh())
        assert roles.classes(loaded) == 3


def test_a_glob_may_end_in_a_question_mark(vit):
    recombine.apply(vit, recombine.Peft(targets=("q", "blocks.*.mlp.fc?"), rank=2))
    assert {name.rpartition(".")[2] for name in vit.recombined.targets} == {"q", "fc1", "fc2"}
