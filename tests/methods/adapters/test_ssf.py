"""SSF: what it counts, its start and its exact merge."""

import copy

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

import recombine
from helpers import QKV
from recombine import Peft, Ssf, Svft, models
from recombine.layers import FactoredLinear, ScaleShift
from zoo import build, train


def test_ssf_counts_what_the_paper_counts():
    model = models.build("vit_s16", arch="vit_small_patch16_224", pretrained=False, num_classes=1000)
    recombine.apply(model, Ssf())
    assert recombine.count(model).trained_without_head == 102_912
    assert len(model.recombined.targets) == 12 * 6 + 2


def test_ssf_starts_as_the_paper_has_it():
    torch.manual_seed(0)
    model = recombine.apply(build("tiny_vit"), Ssf(start="normal"))
    layers = [m for m in model.modules() if isinstance(m, ScaleShift)]
    for name, mean in (("gamma", 1.0), ("beta", 0.0)):
        values = torch.cat([getattr(layer, name).detach() for layer in layers]).double().numpy()
        assert len(values) > 2000 and scipy.stats.kstest((values - mean) / 0.02, "norm").pvalue > 0.01
    assert all(p.requires_grad for layer in layers for p in (layer.gamma, layer.beta))


def test_ssf_merges_exactly():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    x, picture = torch.randn(4, 6, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    factored = FactoredLinear(torch.randn(5, 2), torch.randn(2, 6))
    bases = [nn.Linear(6, 5), nn.Linear(6, 5, bias=False), nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.RMSNorm(6),
             LlamaRMSNorm(6), nn.Conv2d(3, 5, 4, 4), nn.Conv2d(3, 5, 4, 4, bias=False), factored]  # fmt: skip
    for base in bases:
        base, given = base.double(), picture if isinstance(base, nn.Conv2d) else x
        for p in base.parameters():
            p.data = torch.randn_like(p)
        layer, before = ScaleShift(base), base(given)
        assert torch.equal(layer(given), before)
        layer.gamma.data, gamma = (torch.randn_like(layer.gamma),) * 2
        shift = torch.zeros(())
        if layer.beta is not None:
            layer.beta.data, shift = (torch.randn_like(layer.beta),) * 2
        assert (layer.beta is None) == isinstance(base, nn.RMSNorm | LlamaRMSNorm)
        y = before * gamma + shift if given is x else torch.einsum("bchw,c->bchw", before, gamma) + shift[:, None, None]
        assert torch.allclose(layer(given), y, atol=1e-12, rtol=0)
        plain = layer.merged()
        assert type(plain) is (nn.Linear if base is factored else type(base))
        assert torch.allclose(plain(given), y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_deberta"])
def test_ssf_leaves_the_modules_as_they_were_where_every_layer_has_a_bias(arch):
    pretrained = build(arch)
    model = recombine.merge(recombine.apply(copy.deepcopy(pretrained), Ssf()))
    assert model.state_dict().keys() == pretrained.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in pretrained.modules()]
    recombine.apply(model, Ssf())  # and again, on what was merged
    assert train(model.train())[-1] < F.cross_entropy(torch.zeros(6, 5), torch.arange(6) % 5)


@pytest.mark.parametrize("first", [Ssf(), Peft(targets=QKV)], ids=["ssf", "lora"])
def test_ssf_on_an_adapter_is_refused(first):
    model = recombine.apply(build("tiny_vit"), first)
    with pytest.raises(recombine.UsageError, match="already adapted") as error:
        recombine.apply(model, Ssf())
    assert "\n" not in str(error.value)
    with pytest.raises(recombine.UsageError, match="already rewritten"):
        recombine.apply(model, Svft(targets=("qkv",)))
