"""Splitting and fusing qkv is exact."""

import copy

import pytest
import torch
from torch import nn

from recombine.models import roles
from recombine.models.fused_qkv import SplitLinear, close, fuse, split
from scripts.tiny_models import MODELS


def test_split_and_fuse_are_exact(tiny):
    tiny = tiny.double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before, state = tiny(x), copy.deepcopy(tiny.state_dict())
    names = list(roles.find(tiny, ("qkv",)))
    tiny.get_submodule(names[0]).requires_grad_(False)
    split(tiny, names)
    layer = tiny.get_submodule(names[0])
    assert isinstance(layer, SplitLinear) and layer.out_features == 3 * layer.q.out_features
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


def wanted(name: str, owner: nn.Module, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v of a fused layer's outputs (B, T, out), by the model's own code where it is a function."""
    batch, tokens = fused.shape[:2]
    if name.startswith("Falcon"):
        parts = owner._split_heads(fused)
        if owner.new_decoder_architecture:  # which repeats keys and values for their queries
            parts = [parts[0], *(p[:, :, :: owner.num_heads // owner.num_kv_heads] for p in parts[1:])]
        return tuple(p.reshape(batch, tokens, -1) for p in parts)
    if name == "BLOOM":
        return tuple(p.transpose(1, 2).reshape(batch, tokens, -1) for p in owner._reshape(fused))
    if name == "GPT-NeoX":  # as GPTNeoXAttention.forward
        return tuple(p.flatten(2) for p in fused.unflatten(-1, (-1, 3 * owner.head_size)).chunk(3, dim=-1))
    if name == "Phi-3":  # as Phi3Attention.forward
        query = owner.config.num_attention_heads * owner.head_dim
        key = owner.num_key_value_heads * owner.head_dim
        return fused[..., :query], fused[..., query : query + key], fused[..., query + key :]
    if name == "timm MaxViT":  # as AttentionCl.forward, whose tokens are (B, H, W)
        return tuple(p.flatten(-2) for p in fused.unflatten(-1, (owner.num_heads, -1)).chunk(3, dim=-1))
    return fused.chunk(3, dim=-1)


@pytest.mark.parametrize("name", [
    "Falcon, one key and value", "Falcon, grouped", "BLOOM", "GPT-NeoX", "Phi-3", "ModernBERT", "GPT-2", "timm MaxViT",
    "timm XCiT", "timm BEiT",
])  # fmt: skip
def test_q_k_and_v_are_found_in_every_order(name):
    """The split layers give what the model's attention takes for q, k and v; put together they are the old layer."""
    model = MODELS[name].fresh().double()
    plain, fused = copy.deepcopy(model), next(iter(roles.find(model, ("qkv",))))
    layer = plain.get_submodule(fused)
    x = torch.randn(2, 3, roles.layer_at(plain, fused).in_features, dtype=torch.float64)
    expected = wanted(name, plain.get_submodule(fused.rpartition(".")[0]), layer(x))
    parts = roles.find(model, ("q", "k", "v"))
    views = [roles.layer_at(model, f"{fused}.{part}") for part in "qkv"]
    roles.split_fused(model, ("q", "k", "v"))
    for part, view, y in zip("qkv", views, expected, strict=True):
        torch.testing.assert_close(model.get_submodule(fused).get_submodule(part)(x), y)
        torch.testing.assert_close(view(x), y)
    torch.testing.assert_close(model.get_submodule(fused)(x), layer(x))
    assert all(isinstance(model.get_submodule(part), nn.Linear) for part in parts)
    close(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_gate_and_up_of_one_layer():
    """Phi-3's gate_up_proj is [gate; up], and so is ModernBERT's Wi, whose first half goes through the activation."""
    for name, layer in (("Phi-3", "model.layers.0.mlp.gate_up_proj"), ("ModernBERT", "model.layers.0.mlp.Wi")):
        model = MODELS[name].fresh()
        fused, x = copy.deepcopy(model.get_submodule(layer)), torch.randn(2, 16)
        assert list(roles.find(model, ("gate_up",)).values()) == ["gate_up"] * 2
        roles.split_fused(model, ("up",))
        split = model.get_submodule(layer)
        torch.testing.assert_close(torch.cat([split.gate(x), split.up(x)], -1), fused(x))
        assert list(roles.find(model, ("gate", "up", "down")).values()) == ["gate", "up", "down"] * 2


def test_a_layer_that_is_read_is_called():
    """timm's Beit and Eva add their bias to x W^T in one call that reads W; opened, they call the layer."""
    for name in ("timm BEiT", "timm EVA-02, fused qkv", "timm Swin v2"):
        model, x = MODELS[name].fresh(), MODELS[name].inputs()
        layer, calls = next(iter(roles.find(model, ("qkv",)))), []
        before = model(x)
        roles.split_fused(model, ("qkv",))
        model.get_submodule(layer).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.testing.assert_close(model(x), before)
        assert calls
        close(model)
        assert torch.equal(model(x), before) and len(calls) == 1
