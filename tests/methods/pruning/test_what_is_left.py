"""What all methods that cut share: loading, counting, adapting and distilling."""

import pytest
import torch

import recombine
from helpers.pruned import CUTTERS, LORA, ids, reload
from recombine import Isomorphic, Modegpt, Peft, Ssf, Svft, WeCoLora
from recombine.core.account import layer_report
from recombine.core.rewrite import finish
from zoo import ARCHS, batch, build, losses, outputs, train


def pruned(arch, method):
    return recombine.apply(model := build(arch), method, losses=losses(model))


# PruneNet


@pytest.mark.parametrize("method", CUTTERS[:2], ids=ids(CUTTERS[:2]))
def test_zero_and_duplicate_weights_make_no_nan(method):
    model = build("tiny_vit")
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.zero_()
        model.blocks[1].mlp.fc1.weight.fill_(0.1)
    recombine.apply(model, method)
    assert outputs(model, batch(model)).isfinite().all()
    assert {block.mlp.fc1.out_features for block in model.blocks} == {76}


# what all that cut share


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("second", [LORA, Ssf(), Svft()], ids=ids([LORA, Ssf(), Svft()]))
@pytest.mark.parametrize("method", CUTTERS, ids=ids(CUTTERS))
def test_any_method_adapts_what_is_left(method, second, arch, tmp_path):
    if isinstance(method, Isomorphic) and arch != "tiny_vit":
        pytest.skip("a ViT only")
    if isinstance(method, Modegpt) and arch == "tiny_deberta":
        pytest.skip("its attention also reads keys of positions")
    model = pruned(arch, method)
    dense = model.recombined.dense
    finish(model, method, alone=False)
    with torch.no_grad():
        before = outputs(model, batch(model))
        recombine.apply(model, second, losses=losses(model))
        assert torch.allclose(outputs(model, batch(model)), before, atol=2e-5)
    assert model.recombined.dense >= dense and recombine.count(model).retained < 1
    train(model.train(), 2)
    with torch.no_grad():
        final = outputs(model.eval(), batch(model))
        loaded = reload(model, arch, tmp_path)
        assert torch.equal(outputs(loaded, batch(model)), final)
        assert recombine.count(loaded) == recombine.count(model) and layer_report(loaded) == layer_report(model)
        assert loaded.recombined.blocks == model.recombined.blocks
        assert torch.allclose(outputs(recombine.merge(model), batch(model)), final, atol=2e-5)


@pytest.mark.parametrize("qkv", [("qkv",), ("q", "k", "v")], ids=["fused", "split"])
def test_weights_are_counted_once_when_qkv_splits_later(qkv):
    model = pruned("tiny_vit", Isomorphic(targets=(*qkv, "o", "up", "down")))
    alone = recombine.count(model).retained
    recombine.apply(model, Peft(rank=2, options={"lora_alpha": 2}))
    added = recombine.count(model).trained_without_head
    assert model.recombined.dense == 4 * 12 * 48 * 48
    assert recombine.count(model).retained == pytest.approx(alone + added / model.recombined.dense)


@pytest.mark.parametrize("method", CUTTERS, ids=ids(CUTTERS))
def test_loading_prunes_nothing_again(method, tmp_path, monkeypatch):
    model = pruned("tiny_vit", method)
    monkeypatch.setattr(type(method), "prune", None)
    monkeypatch.setattr(type(method), "rewrite", None)
    loaded = reload(model, "tiny_vit", tmp_path)
    for name, module in model.named_modules():
        other = loaded.get_submodule(name)
        assert type(module) is type(other) and str(module) == str(other)
        for key in ("in_features", "num_heads", "head_dim", "attn_dim", "scale", "normalized_shape", "embed_dim"):
            assert getattr(module, key, None) == getattr(other, key, None)


@pytest.mark.parametrize("method", CUTTERS, ids=ids(CUTTERS))
def test_distillation_trains(method):
    model = pruned("tiny_vit", method)
    head = {"head.weight", "head.bias"}
    if isinstance(method, WeCoLora):
        assert {name.rpartition(".")[2] for name in method.distillation_parameters(model)} == {"left", "right"}
    else:
        assert method.distillation_parameters(model) == {name for name, _ in model.named_parameters()} - head


@pytest.mark.parametrize("method", CUTTERS[2:], ids=ids(CUTTERS[2:]))
def test_whole_blocks_are_cut_first(method):
    model = recombine.apply(build("tiny_vit"), Svft())
    with pytest.raises(recombine.UsageError, match="first|rewritten"):
        recombine.apply(model, method, losses=losses(model))
