"""`quantize` on models: what is packed, what a file holds, what is counted, what is refused."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import recombine
from helpers.command import execute, line
from recombine import Cersa, Crisp, Peft, Svd, UsageError, apply, count, load, merge, quantize, save
from recombine.core.budget import Budget
from recombine.core.packing import Packing
from recombine.layers import PackedLinear
from recombine.layers.packed import packed_in
from zoo import ARCHS, batch, build, outputs, train

METHODS = {
    "plain": None,
    "svd": Svd(ratio=0.5),
    "core": Svd(ratio=0.5, train_core=True),
    "crisp": Crisp(chunk=16),
    "cersa": Cersa(alpha=0.9),
    "lora": Peft(rank=4),
    "pissa": Peft(rank=4, options={"init_lora_weights": "pissa"}),
}


def made(method: str, bits: int = 4, arch: str = "tiny_vit") -> nn.Module:
    model = build(arch)
    if METHODS[method] is not None:
        apply(model, METHODS[method])
    return quantize(model, bits, 16).eval()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", METHODS)
def test_saved_small_and_loaded_the_same(method, bits, tmp_path):
    before = build("tiny_vit") if METHODS[method] is None else apply(build("tiny_vit"), METHODS[method])
    model, x = made(method, bits), batch(build("tiny_vit"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= {
        n for n, p in before.named_parameters() if p.requires_grad
    }
    frozen = [p.numel() for n, p in before.named_parameters() if p.ndim == 2 and "blocks" in n and not p.requires_grad]
    saved = count(before).bytes_weights - count(model).bytes_weights
    if METHODS[method] is not None:  # of each packed weight: 4 bytes less its bits and its part of a scale
        assert saved == pytest.approx(sum(frozen) * (4 - bits / 8 - 2 / 16), rel=2e-3)
    assert count(model).stored == count(before).stored and count(model).retained == count(before).retained
    alone = load(save(model, tmp_path / "whole")).eval()
    onto = load(save(model, tmp_path / "difference", whole=False), build("tiny_vit")).eval()
    with torch.no_grad():
        y = outputs(model, x)
        assert torch.equal(outputs(alone, x), y) and torch.equal(outputs(onto, x), y)
    assert count(alone) == count(onto) == count(model)
    maps = [text.split() for text in Path("/proc/self/maps").read_text().splitlines()]
    spans = [tuple(int(end, 16) for end in m[0].split("-")) for m in maps if m[-1] == str(tmp_path / "whole")]
    codes = [packed.codes.data_ptr() for packed in packed_in(alone).values()]
    assert codes and all(any(a <= pointer < b for a, b in spans) for pointer in codes)  # pages of the file
    before = copy.deepcopy(model)
    dense = merge(model)
    assert not packed_in(dense) and not [m for m in dense.modules() if isinstance(m, PackedLinear)]
    with torch.no_grad():
        assert torch.allclose(outputs(dense, x), y, atol=1e-5)
    assert all(p.requires_grad for p in dense.parameters())
    assert packed_in(before)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_family(arch, tmp_path):
    model, x = made("lora", 4, arch), batch(build(arch))
    loaded = load(save(model, tmp_path / "m", whole=False), build(arch)).eval()
    with torch.no_grad():
        assert torch.equal(outputs(loaded, x), outputs(model, x))
    history = train(model.train())
    assert history[-1] < history[0]
    assert all(p.grad is None for packed in packed_in(model).values() for p in packed.parameters())


def test_a_file_is_as_large_as_counted(tmp_path):
    """DINOv2-S at its size, without its weights: with 4 bits it takes an eighth and its scales."""
    import timm

    with torch.random.fork_rng():
        model = timm.create_model("vit_small_patch14_dinov2", img_size=42, num_classes=0)
    dense = sum(p.numel() * 4 for p in model.parameters())
    path = save(quantize(model, 4), tmp_path / "m")
    account = count(model)
    assert path.stat().st_size == pytest.approx(account.bytes_weights, rel=0.02)
    assert account.bytes_weights < 0.15 * dense
    assert torch.equal(*(m.eval()(torch.ones(1, 3, 42, 42)) for m in (load(path), model)))


def test_a_shared_basis_is_packed_once(tmp_path):
    model = made("crisp")
    bases = [m for n, m in packed_in(model).items() if n.endswith("basis")]
    assert len({id(m) for m in bases}) < len(bases)
    again = load(save(model, tmp_path / "m"))
    bases = [m for n, m in packed_in(again).items() if n.endswith("basis")]
    assert len({id(m) for m in bases}) < len(bases) and count(again) == count(model)


def test_adapters_on_a_packed_base(tmp_path):
    """A packed base keeps its tensors while adapters change, and an adapter's file holds none of them."""
    x, base = batch(build("tiny_vit")), save(made("svd"), tmp_path / "base")
    model = apply(load(base, build("tiny_vit")), Peft(rank=2))
    train(model.train())
    path = recombine.save_adapter(model.eval(), tmp_path / "adapter")
    assert not [name for name in load_file(path) if "packed" in name]
    live = load(base, build("tiny_vit")).eval()
    kept = {id(p.codes) for p in packed_in(live).values()}
    recombine.load_adapter(live, path, "one")
    recombine.set_adapter(live, "one")
    assert {id(p.codes) for p in packed_in(live).values()} == kept
    with torch.no_grad():
        assert torch.equal(outputs(live.eval(), x), outputs(model, x))


def test_what_fails_leaves_the_model_as_it_was(monkeypatch):
    from recombine.core import quantizing

    model, x = apply(build("tiny_vit"), Svd()), batch(build("tiny_vit"))
    names, y = {n for n, _ in model.named_parameters()}, outputs(model, x)
    calls = []
    put = quantizing.put_packed
    monkeypatch.setattr(
        quantizing, "put_packed", lambda *given: put(*given) if calls.append(0) or len(calls) < 5 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        quantize(model, 4, 16)
    assert {n for n, _ in model.named_parameters()} == names and torch.equal(outputs(model, x), y)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"bits": 3}, "quantize.bits=3: weights are packed to 8 or 4 bits"),
        ({"bits": 8.0}, "quantize.bits=8.0: weights are packed to 8 or 4 bits"),
        ({"group": 20}, "quantize.group=20: must be a multiple of 8"),
        ({"group": 64.0}, "quantize.group=64.0: must be a multiple of 8"),
        ({"group": 4096}, "less than one group; say quantize.group="),
    ],
)
def test_refusals(given, said):
    model = apply(build("tiny_vit"), Svd(rank=1))
    with pytest.raises(UsageError) as error:
        quantize(model, **given)
    assert said in str(error.value) and "\n" not in str(error.value)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.left[0, 0] = float("inf")
    with pytest.raises(UsageError, match="blocks.1.mlp.fc1.left has values that are not finite"):
        quantize(model, group=8)
    with pytest.raises(UsageError, match="no linear layer of this model has a frozen weight"):
        quantize(apply(build("tiny_vit"), recombine.Full(targets=("qkv", "o", "up", "down"))))


BASES = {"plain": None, "pivot": recombine.SvdLlm(factor="pivot"), "cersa": Cersa(alpha=0.9), "crisp": Crisp(chunk=16)}


@pytest.mark.parametrize("base", BASES)
def test_lora_on_a_base_that_was_packed_before(base, tmp_path):
    """No layer of this model has a bias, so what is packed leaves no other tensor to take a type from."""
    from zoo import losses

    model = build("tiny_llama")
    if BASES[base] is not None:
        apply(model, BASES[base], losses=losses(model))
        model.requires_grad_(False)
    before = outputs(quantize(model, 4, 16).eval(), x := batch(model))
    apply(model, Peft(rank=2, targets=tuple(model.recombined.targets) or ("q", "v"))).eval()
    assert torch.allclose(outputs(model, x), before, atol=1e-5)
    train(model, steps=2)
    y = outputs(model.eval(), x)
    assert not torch.allclose(y, before, atol=1e-5)
    assert torch.equal(outputs(load(save(model, tmp_path / "m")).eval(), x), y)


@pytest.mark.parametrize(
    "method", [Svd(targets=("qkv",)), Svd(), Peft(), recombine.Dgmr(targets=("up", "down")), recombine.Full()]
)
def test_what_needs_weights_is_refused_on_a_packed_model(method):
    from zoo import losses

    model = made("plain")
    with pytest.raises(UsageError, match="packed integers") as error:
        apply(model, method, losses=losses(model))
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="init_lora_weights=pissa: .* holds no weight"):
        apply(model, Peft(targets=("o",), options={"init_lora_weights": "pissa"}))
    with pytest.raises(UsageError, match="every linear layer of this model is packed already"):
        quantize(model, 4, 16)


def test_tensors_of_a_few_entries_stay_in_float():
    model = apply(build("tiny_vit"), Cersa(rank=2, targets=("o",)))
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="has .* entries, less than one group; say quantize.group="):
        quantize(model, 4, 4096)
    quantize(model, 4, 16)
    assert model.blocks[0].attn.proj.core.shape == (2, 2) and model.blocks[0].attn.proj.is_packed


def test_the_largest_share_of_packed_weights_is_all_of_them():
    """At 8 bits the whole model fits into half of its bytes, and so no method cuts it."""
    whole = quantize(build("tiny_vit"), 8, 16).eval()
    model = apply(build("tiny_vit"), Svd(), Budget("bytes", 0.5, packing=Packing(8, 16)))
    assert torch.equal(outputs(quantize(model, 8, 16).eval(), x := batch(model)), outputs(whole, x))


@pytest.mark.parametrize(
    "keys, said",
    [
        (["quantize.bits=3"], "quantize.bits=3: must be one of 8, 4, auto, or null"),
        (["quantize.bits=4", "quantize.group=12"], "quantize.group=12: must be a multiple of 8"),
        (["quantize.bits=auto"], "say budget=bytes_25 too"),
        (["quantize.bits=4", "stage=retrofit", "stage.bits=8"], "drop one of them"),
    ],
)
def test_one_line(keys, said, capsys, monkeypatch, tmp_path):
    assert said in line(capsys, monkeypatch, tmp_path, *keys)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(
    "method",
    [
        Svd(),
        Crisp(chunk=16),
        Cersa(targets=("q", "k", "v", "o", "up", "down")),
        recombine.Balf(),
        recombine.SvdLlm(factor="pivot"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_budget_of_bytes_counts_the_bits(method, bits):
    """Never above the budget, and near it where a weight costs little; more bits leave less rank."""
    from zoo import losses

    model, share = build("tiny_vit"), 0.5 if bits is None else 0.27
    dense = count(model).bytes_weights - 4 * sum(p.numel() for p in model.head.parameters())
    apply(model, method, Budget("bytes", share, packing=bits and Packing(bits, 16)), losses(model))
    if bits:
        quantize(model, bits, 16)
    taken = count(model).bytes_weights - 4 * sum(p.numel() for p in model.head.parameters())
    assert taken <= share * dense
    assert taken > 0.6 * share * dense


def test_a_run_chooses_the_bits_under_a_budget_of_bytes(tmp_path):
    keys = ["method=balf", "stage=compress", "stage.distil.epochs=1", "budget=bytes_40", "quantize.group=16"]
    chosen = execute(tmp_path / "auto", *keys, "quantize.bits=auto")
    part = chosen["quantized"]
    best = min((value, word) for word, value in part["choices"].items() if value is not None)[1]
    assert str(part["bits"]) == best and set(part["choices"]) == {"none", "8", "4"} and part["bits"] in (8, 4)
    same = execute(tmp_path / "same", *keys, f"quantize.bits={best}")
    assert same["test"] == chosen["test"] and same["account"] == chosen["account"]
    path = tmp_path / "auto" / "best.safetensors"
    again = execute(tmp_path / "again", "method=balf", "stage=evaluate", f"stage.checkpoint={path}")
    assert again["test"]["acc"] == chosen["test"]["acc"] and again["quantized"]["bits"] == part["bits"]
    assert "mix" in chosen["seconds"] and "quantize" in chosen["seconds"]


@pytest.mark.parametrize(
    "keys",
    [
        ["stage=adapt", "method=lora"],
        ["stage=joint", "method=svd", "method.train_core=true", "budget=retained_50", "stage.distil.epochs=1"],
        ["stage=joint", "method@compressor=svd", "compressor.rank=8", "method=lora", "stage.distil.epochs=1"],
    ],
    ids=["lora", "core", "pair"],
)
def test_what_trains_stays_in_float(keys, tmp_path):
    result = execute(tmp_path, *keys, "quantize.bits=4", "quantize.group=16")
    assert result["quantized"]["bits"] == 4 and result["account"]["trained_without_head"] > 0
    file = tmp_path / "best.safetensors"
    assert file.stat().st_size < 0.7 * 4 * result["account"]["stored"]
    again = execute(tmp_path / "e", *keys[1:2], "stage=evaluate", f"stage.checkpoint={file}")
    assert again["test"]["acc"] == result["test"]["acc"]


def test_what_was_trained_is_packed_when_it_is_evaluated(tmp_path):
    trained = execute(tmp_path / "t", "stage=adapt", "method=cersa")
    keys = ["method=cersa", "stage=evaluate", f"stage.checkpoint={trained['checkpoint']}", "quantize.group=16"]
    packed = execute(tmp_path / "e", *keys, "quantize.bits=8")
    assert packed["quantized"]["tensors"] >= 3 * len(trained["layers"])  # its cores too
    assert packed["test"]["acc"] == pytest.approx(trained["test"]["acc"], abs=0.2)


def test_shards_are_refused():
    from recombine.training.sharding import shard

    with pytest.raises(UsageError, match="packed weights are not divided among ranks; set trainer=ddp"):
        shard(made("svd"), None)
