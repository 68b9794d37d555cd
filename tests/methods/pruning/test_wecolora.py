"""WeCoLoRA: which blocks are copied, and the distillation that is folded in."""

import pytest
import torch

import recombine
from helpers.pruned import distil, reload
from recombine import WeCoLora
from recombine.core.rewrite import finish, train_only
from recombine.layers import DeltaLinear
from recombine.models import roles
from zoo import ARCHS, batch, build, outputs


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("every, left", [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])])
def test_wecolora_copies_every_other_block(every, left, arch):
    model, teacher = build(arch), build(arch)
    recombine.apply(model, WeCoLora(keep_every=every, rank=2))
    if arch == "tiny_swin" and every == 3:
        left = [0, 2]  # the first of each stage
    assert model.recombined.blocks == left and len(roles.blocks(model)) == len(left)
    finish(model, WeCoLora(keep_every=every), alone=False)
    assert not any(isinstance(m, DeltaLinear) for m in model.modules())
    recombine.merge(model)
    blocks = roles.blocks(teacher)
    for i, block in zip(left, roles.blocks(model), strict=True):
        ours, theirs = block.state_dict(), blocks[i].state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("alone", [True, False])
def test_wecolora_is_distilled_and_folded(alone, arch, tmp_path):
    method = WeCoLora(rank=4)
    model, teacher = recombine.apply(build(arch), method), build(arch)
    x = batch(model)
    train_only(model, method.distillation_parameters(model))
    history = distil(model, teacher, method, 12)
    assert history[-1] < history[0]
    with torch.no_grad():
        distilled = outputs(model.eval(), x)
        finish(model, method, alone)
        assert torch.allclose(outputs(model, x), distilled, atol=2e-5)
        deltas = [name for name in model.recombined.targets if isinstance(model.get_submodule(name), DeltaLinear)]
        assert len(deltas) == (len(model.recombined.targets) if alone else 0)
        assert any(name.endswith("left") for name in model.recombined.trainable) == alone
        assert torch.allclose(outputs(reload(model, arch, tmp_path), x), outputs(model, x), atol=1e-6)
    assert (recombine.count(model).retained > 0.5) == alone and recombine.count(model).retained >= 0.5


def test_a_shallower_llama_generates_and_leaves_others_alone(tmp_path):
    from transformers import LlamaForCausalLM

    model = build("tiny_llama")
    other = LlamaForCausalLM(model.config).eval()
    x = batch(other)
    before = outputs(other, x)
    method = WeCoLora(rank=2)
    recombine.merge(recombine.apply(model, method))
    assert torch.equal(outputs(other, x), before) and other.config.num_hidden_layers == 4
    prompt = torch.arange(1, 6)[None]
    told = [model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*told)
    model.save_pretrained(tmp_path)
    assert torch.allclose(outputs(LlamaForCausalLM.from_pretrained(tmp_path).eval(), x), outputs(model, x), atol=1e-6)
