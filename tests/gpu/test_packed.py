"""Packed layers on every device: their outputs, an adapter's training on them, and the bytes that they hold."""

import copy

import pytest
import torch
from torch import nn

import recombine
from recombine.layers import PackedLinear
from recombine.layers.packed import Packed, packed_in
from zoo import batch, build, loss, outputs

BASES = {
    "dense": lambda model: model,
    "low rank": lambda model: recombine.apply(model, recombine.Svd(ratio=0.5)),
    "pivot": lambda model: recombine.apply(model, recombine.Svd(ratio=0.5, factor="pivot")),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def moved(x, device: str):
    return x.to(device) if isinstance(x, torch.Tensor) else {key: value.to(device) for key, value in x.items()}


def packed(base: str, bits: int, arch: str = "tiny_llama") -> nn.Module:
    model = BASES[base](build(arch)).requires_grad_(False)
    return recombine.quantize(model, bits, 16).eval()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_a_forward_is_that_of_a_cpu(base, bits, device):
    """Of a model packed on a CPU and moved, and of one packed on the device: the same integers."""
    model = packed(base, bits)
    x = batch(model)
    there = copy.deepcopy(model).to(device)
    made = recombine.quantize(BASES[base](build("tiny_llama")).to(device).requires_grad_(False), bits, 16).eval()
    y = outputs(model, x)
    torch.testing.assert_close(outputs(there, moved(x, device)).cpu(), y, rtol=1e-4, atol=1e-5)
    if base == "dense":  # a factorisation on a device may turn signs
        for name, part in packed_in(made).items():
            assert part.codes.device.type == device and part.scale.dtype == torch.bfloat16
            assert torch.equal(part.codes.cpu(), packed_in(model)[name].codes), name
    torch.testing.assert_close(outputs(made, moved(x, device)).cpu(), y, rtol=0.05, atol=0.05 * float(y.abs().max()))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("base", BASES)
def test_an_adapter_trains_on_a_packed_base_as_on_a_cpu(base, bits, device):
    found = {}
    for where in ("cpu", device):
        torch.manual_seed(0)
        model = recombine.apply(packed(base, bits), recombine.Peft(rank=2, targets=("q", "v", "up"))).to(where).train()
        codes = {name: part.codes.clone() for name, part in packed_in(model).items()}
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, x, history = torch.optim.SGD(trained, 0.1), moved(batch(model), where), []
        for _ in range(5):
            value = loss(model, x)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            history.append(value.item())
        assert history[-1] < history[0] and all(p.device.type == where for p in trained)
        assert all(torch.equal(part.codes, codes[name]) for name, part in packed_in(model).items())
        found[where] = torch.tensor(history)
    torch.testing.assert_close(found[device], found["cpu"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_layer_takes_its_integers_alone(bits, device):
    """A layer holds what is counted, and a forward with its backward keeps no dense weight beside the integers."""
    width, tokens, group = 1024, 8, 64
    layer = nn.Linear(width, width, bias=False).requires_grad_(False)
    part = Packed.of(layer.weight, bits, group)
    holder = nn.ModuleList([PackedLinear(layer, part)])
    bytes_of = sum(p.numel() * p.element_size() for p in holder.parameters())
    assert bytes_of == width * width * bits // 8 + 2 * width * width // group
    torch.ones(tokens, width, device=device) @ torch.ones(width, width, device=device)  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    holder.to(device)
    if device == "cuda":
        assert bytes_of <= torch.cuda.memory_allocated() - before <= bytes_of + 1024
    x = torch.randn(tokens, width, device=device, requires_grad=True)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        y = holder[0](x)
    assert max(t.numel() * t.element_size() for t in held) <= width * width * bits // 8
    if device == "cuda":  # the dense weight of the forward is gone
        assert torch.cuda.memory_allocated() - before <= bytes_of + 8 * tokens * width * 4
    y.square().sum().backward()
    weight = holder[0].weight
    torch.testing.assert_close(x.grad, 2 * (x @ weight.T) @ weight, rtol=1e-3, atol=1e-3)
