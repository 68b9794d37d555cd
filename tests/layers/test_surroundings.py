"""A recombined layer behaves as nn.Linear does under autocast, torch.compile and torch.export."""

import shutil

import pytest
import torch
from torch import nn

import recombine
from helpers import ALL
from recombine import Cersa, Crisp, Peft, Rosa, Ssf, Svd, Svft
from recombine.layers import DeltaLinear, FactoredLinear, ScaleShift, SharedBasisLinear
from zoo import batch, build, loss, losses, outputs

METHODS = {
    "crisp": Crisp(chunk=8),
    "crisp small": Crisp(chunk=8, basis_rank=4),
    "cersa": Cersa(beta=0.7),
    "svd": Svd(targets=ALL),
    "svd core": Svd(train_core=True),
    "svft": Svft(),
    "rosa": Rosa(density=0.01),
    "ssf": Ssf(),
    "lora": Peft(),
}


def one_of_each() -> nn.Sequential:
    """16 -> 16 layers of all kinds, by the structured way and by a built weight."""
    torch.manual_seed(0)
    r = torch.randn
    layers = (
        SharedBasisLinear(r(64, 2), r(2, 4), 16, bias=r(16)),
        SharedBasisLinear(r(64, 8), r(8, 4), 16, placement="temp"),
        SharedBasisLinear(r(64, 4), r(4, 4), 16, placement="post"),
        FactoredLinear(r(16, 5), r(5, 16), core=r(3, 3), tail=r(2), bias=r(16)),
        FactoredLinear(r(16, 12), r(12, 16), core=r(12)),
        FactoredLinear(r(16, 5), r(5, 16), tail=r(5), entries=r(2), index=torch.tensor([[0, 1], [1, 2]]), gate=r(())),
        DeltaLinear(r(16, 16), r(16, 2), r(2, 16), entries=r(3), index=torch.arange(3), core=r(2, 2), bias=r(16)),
        ScaleShift(nn.Linear(16, 16)),
    )
    for layer in layers:
        next(layer.parameters()).requires_grad_(True)
        with torch.no_grad():
            next(layer.parameters()).mul_(0.3)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_deberta"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_autocast_gives_its_dtype_and_the_model_runs(arch, method):
    model = build(arch)
    recombine.apply(model, method, losses=losses(model))
    layers = [model.get_submodule(name) for name in model.recombined.targets]
    linear = nn.Linear, recombine.RecombinedLinear  # not the norms that SSF scales
    layers = [layer for layer in layers if isinstance(getattr(layer, "base_layer", layer), linear)]
    with torch.autocast("cpu", torch.bfloat16):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for tokens in (2, 999):
                    assert {layer(torch.randn(tokens, layer.in_features)).dtype for layer in layers} == {torch.bfloat16}
                assert outputs(model, batch(model)).isfinite().all()
        loss(model.train(), batch(model)).backward()


@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(training):
    model, x = one_of_each().train(training), torch.randn(5, 16).double()
    with torch.set_grad_enabled(training):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for rows in (5, 3, 2):  # the second shape makes the number of rows a symbol
            assert torch.allclose(compiled(x[:rows]), model(x[:rows]))
        if training:
            compiled(x).square().sum().backward()
            found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
            model.zero_grad()
            model(x).square().sum().backward()
            ours = [p.grad for p in model.parameters() if p.requires_grad]
            assert all(torch.allclose(a, b) for a, b in zip(found, ours, strict=True))
        else:  # what eager keeps follows the weights, and does not change what was compiled
            next(model.parameters()).mul_(2.0)
            assert torch.allclose(compiled(x), model(x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_trains_the_same():
    model, x = one_of_each(), torch.randn(5, 16).double()
    gradients = []
    for run in (torch.compile(model, fullgraph=True), model):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("strict", [True, False])
def test_exports_for_any_batch(strict):
    model = one_of_each().eval()
    with torch.no_grad():
        model(torch.randn(4, 16).double())  # builds what eval keeps
        sizes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
        program = torch.export.export(
            model, (torch.randn(4, 16).double(),), dynamic_shapes=sizes, strict=strict
        ).module()
        for rows in (1, 7, 1000):
            x = torch.randn(rows, 16).double()
            assert torch.allclose(program(x), model(x))
