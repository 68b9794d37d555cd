"""Packed weights: the arithmetic, what a layer computes with them, and what waits for the backward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recombine.layers import DeltaLinear, FactoredLinear, PackedLinear, SharedBasisLinear
from recombine.layers.packed import Packed, pack, unpack


def test_a_known_example():
    """The largest magnitude of the first group is 7.5, so its scale is 1; the second group is half as large."""
    weight = torch.tensor([[7.5, -7.5, 0.4, 0.6, -1.5, 2.5, -3.5, 0.0], [3.75, 0.2, 0.3, -0.8, 0, 0, 0, -3.75]])
    codes, scale = pack(weight, 4, 8)
    # round to even: 7.5 -> 8 and is cut to 7, -1.5 -> -2, 2.5 -> 2, -3.5 -> -4; then 8 is added
    wanted = torch.tensor([[15, 0, 8, 9, 6, 10, 4, 8], [15, 8, 9, 6, 8, 8, 8, 0]], dtype=torch.uint8)
    assert torch.equal(codes, wanted[:, ::2] | wanted[:, 1::2] << 4) and scale.tolist() == [1.0, 0.5]
    assert torch.equal(unpack(codes, scale, 4, torch.float32), (wanted.float() - 8) * scale.float()[:, None])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(5, 24), (3, 7), (33, 16)])  # whole groups, one group, a last one that is not full
def test_every_entry_is_within_half_a_step(bits, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(0, -4, shape[1])
    weight[0, :3] = 0
    packed = Packed.of(weight, bits, 16)
    steps = packed.scale.float().repeat_interleave(16)[: weight.numel()].view(shape)
    assert ((packed.value() - weight).abs() <= steps * (0.5 + 2**-8 * 2 ** (bits - 1)) + 1e-12).all()
    assert packed.codes.numel() == -(-weight.numel() // 16) * 16 * bits // 8 and packed.scale.dtype == torch.bfloat16
    assert not Packed.of(torch.zeros(4, 8), bits, 16).value().any()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_same_as_torchao(bits):
    torchao = pytest.importorskip("torchao.quantization", reason="needs pip install 'recombine[8bit]'")
    from torchao.quantization.granularity import PerGroup

    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(256, 128, bias=False))
    weight = linear[0].weight.detach().clone()
    kind = {"weight_dtype": getattr(torch, f"int{bits}"), "granularity": PerGroup(64), "scale_dtype": torch.bfloat16}
    torchao.quantize_(linear, torchao.IntxWeightOnlyConfig(**kind))
    codes, scale = pack(weight, bits, 64)
    assert torch.equal(scale.view(128, 4), linear[0].weight.scale)
    theirs, ours = linear[0].weight.dequantize(), unpack(codes, scale, bits, torch.float32).view(128, 256)
    apart = (ours - theirs).abs() / scale.float().view(128, 4).repeat_interleave(64, 1)
    assert apart.max() < 1.001 and (apart > 0.5).float().mean() < (0.01 if bits == 4 else 0.15)
    assert (ours - weight).norm() <= (theirs - weight).norm()


def test_what_follows_may_write_into_the_output():
    """As an in-place activation does, and so do the hooks that watch gradients."""
    torch.manual_seed(0)
    layer = PackedLinear(nn.Linear(24, 20), Packed.of(torch.randn(20, 24), 4, 8))
    x = torch.randn(2, 3, 24, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 3, 20)
    y.relu_().sum().backward()
    given = x.grad.clone()
    x.grad = None
    F.linear(x, layer.weight.detach(), layer.bias).relu().sum().backward()
    assert torch.allclose(x.grad, given, atol=1e-6)


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made = {
        "linear": nn.Linear(24, 20),
        "core": FactoredLinear(torch.randn(20, 6), torch.randn(6, 24), torch.randn(6, 6), bias=torch.randn(20)),
        "plain": FactoredLinear(torch.randn(20, 6), torch.randn(6, 24)),
        "basis": SharedBasisLinear(torch.randn(60, 5), torch.randn(5, 8), 24, bias=torch.randn(20)),
    }
    for layer in made.values():
        layer.requires_grad_(False)
    made["core"].core.requires_grad_(True)
    made["basis"].mixer.requires_grad_(True)
    return made


def packed(layer: nn.Module, bits: int) -> tuple[nn.Module, nn.Module]:
    """(the layer with its frozen matrices packed, one with the values of these)."""
    twin = copy.deepcopy(layer)
    for name, p in [*layer.named_parameters()]:
        if p.ndim > 1 and not p.requires_grad:
            new = Packed.of(p, bits, 8)
            twin.get_parameter(name).copy_(new.value())
            if isinstance(layer, nn.Linear):
                return PackedLinear(layer, new), twin
            layer.hold(name, new)
    return layer, twin


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", layers())
def test_outputs_and_gradients_are_those_of_the_dense_values(name, bits):
    layer, twin = packed(layers()[name], bits)
    results = []
    for each in (layer, twin):
        x = torch.randn(3, 50, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = each.train()(x)
        y.square().sum().backward()
        trained = [p.grad for p in each.parameters() if p.requires_grad]
        results.append([y, x.grad, *trained])
    assert len(results[0]) == (2 if name in ("linear", "plain") else 3)
    for here, there in zip(*results, strict=True):
        assert torch.allclose(here, there, rtol=1e-5, atol=1e-5 * there.abs().max().item())
    with torch.no_grad():
        assert torch.allclose(layer.eval()(x), twin.eval()(x), rtol=1e-5, atol=1e-4)
    assert getattr(layer, "_kept", None) is None  # nothing dense stays
    assert torch.equal(layer.merged().weight, (twin.merged() if hasattr(twin, "merged") else twin).weight)


def test_a_faded_base_does_not_wait_for_the_backward_either():
    made = DeltaLinear(torch.randn(20, 24), torch.randn(20, 3), torch.randn(3, 24), bias=torch.randn(20))
    made.keep_base.fill_(0.7)
    layer, twin = packed(made, 4)
    saved, x = [], torch.randn(2, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer.train()(x)
        y.sum().backward()
    assert torch.allclose(y, twin.train()(x), atol=1e-5)
    assert not [t.shape for t in saved if t.is_floating_point() and t.numel() >= 480]


@pytest.mark.parametrize("name", layers())
def test_no_dense_matrix_waits_for_the_backward(name):
    layer, _ = packed(layers()[name], 4)
    saved = []
    x = torch.randn(2, 4, 24, requires_grad=True)  # few tokens: a matrix is larger than what passes
    layer.flops = lambda tokens, train: (0.0, 1.0, 1.0)  # the structured way, as for many tokens
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer.train()(x).sum().backward()
    big = {"linear": 480, "core": 120, "plain": 120, "basis": 300}[name]
    assert not [t.shape for t in saved if t.is_floating_point() and t.numel() >= big]
    assert any(t.dtype == torch.uint8 for t in saved)


def test_one_row_without_a_batch():
    layer, twin = packed(layers()["linear"], 8)
    layer.bias.requires_grad_(), twin.bias.requires_grad_()
    layer.train()(torch.ones(24)).square().sum().backward(), twin(torch.ones(24)).square().sum().backward()
    assert torch.allclose(layer.bias.grad, twin.bias.grad, atol=1e-4)


def test_small_scales_survive_half_precision():
    new = Packed.of(torch.randn(16, 32) * 1e-5, 8, 8)
    holder = PackedLinear(nn.Linear(32, 16), new)
    before = holder.weight.clone()
    assert torch.equal(holder.half().float().weight, before)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-4, 1e-5])
def test_small_weights_in_half_precision_are_as_exact_as_large_ones(size):
    weight = (size * torch.randn(64, 64)).half()
    found = Packed.of(weight, 8, 64).value()
    assert found.dtype == torch.float16
    assert (found.float() - weight.float()).norm() < 0.01 * weight.float().norm()


def test_casts_and_autocast():
    layer, _ = packed(layers()["linear"], 4)
    x = torch.randn(4, 24)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16 and half.part("weight").scale.dtype == torch.bfloat16
    assert half.part("weight").codes.dtype == torch.uint8
    back = copy.deepcopy(half).float()
    assert back.part("weight").scale.dtype == torch.bfloat16 and torch.equal(back.weight, layer.weight)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(4, -1), rtol=0.02, atol=0.02)


def test_compiled_and_checkpointed():
    layer, twin = packed(layers()["core"], 4)
    x = torch.randn(40, 24, requires_grad=True)
    wanted = torch.autograd.grad(twin(x).square().sum(), x)[0]
    compiled = torch.compile(layer, backend="aot_eager")
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    for y in (compiled(x), again):
        assert torch.allclose(torch.autograd.grad(y.square().sum(), x)[0], wanted, rtol=1e-4, atol=1e-3)
        assert torch.allclose(y, F.linear(x, twin.dense_weight(), twin.bias), rtol=1e-4, atol=1e-3)
