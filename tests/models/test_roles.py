"""The roles of the families' layers; every refusal is one line."""

import pytest
import torch
from torch import nn

from recombine.errors import UsageError
from recombine.models import roles
from recombine.models.fused_qkv import SplitLinear


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
    fused, key = tiny.get_submodule(f"{prefix}.attn.qkv"), roles.layer_at(tiny, f"{prefix}.attn.qkv.k")
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
        (tiny, ("gate",), "role 'gate' is not in"),
        (tiny, ("qvk",), "did you mean qkv. it has qkv q k v o up down"),
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
    assert not any(isinstance(module, SplitLinear) for module in tiny.modules())  # a refusal splits nothing


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
