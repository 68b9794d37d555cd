"""Rank and bits of every layer together: what it loses, what it takes, what is refused."""

import pytest
import torch
from torch import nn

import recombine
from helpers.command import execute
from recombine import Balf, KfacSvd, Svd, SvdLlm, UsageError, apply, count, load, quantize, save
from recombine.core.budget import Budget
from recombine.core.calibration import collect
from recombine.core.packing import Packing
from recombine.core.rewrite import find_sites
from recombine.layers.packed import packed_in
from recombine.methods.svd import mixing
from recombine.models import roles
from zoo import batch, build, losses, outputs

MIX = Packing("mix", 16)
METHODS = {
    "svd": Svd,
    "svd_llm": SvdLlm,
    "kfac": KfacSvd,
    "pivot": lambda **kw: SvdLlm(factor="pivot", **kw),
    "anchored": lambda **kw: SvdLlm(refit="anchored", **kw),
}


def taken(model: nn.Module) -> int:
    """Bytes without the head, as a budget counts them."""
    head = roles.head(model)
    return count(model).bytes_weights - (0 if head is None else 4 * sum(p.numel() for p in head.parameters()))


def moved(model: nn.Module, original: nn.Module) -> float:
    """|y - y0|^2 / |y0|^2 over what calibrates."""
    lost = total = 0.0
    with torch.no_grad():
        for i in range(4):
            x = batch(original, seed=10 + i)
            y, y0 = outputs(model.eval(), x), outputs(original, x)
            lost, total = lost + float((y - y0).square().sum()), total + float(y0.square().sum())
    return lost / total


def squeezed(model: nn.Module, method, share: float, bits: int | str | None) -> nn.Module:
    apply(model, method, Budget("bytes", share, packing=bits and Packing(bits, 16)), losses(model))
    return quantize(model, bits, 16) if bits else model


CASES = [("tiny_vit", "svd"), ("tiny_vit", "kfac"), *(("tiny_llama", name) for name in METHODS if name != "kfac")]


@pytest.mark.parametrize("arch, method", CASES)
def test_a_mix_beats_every_uniform_choice(arch, method, tmp_path):
    """It obeys the budget in memory and on the disk, and moves the outputs less than one number of bits for all."""
    original, share = build(arch), 0.2
    model = squeezed(build(arch), METHODS[method](allocation="mix"), share, "mix")
    assert 0.9 * share * taken(original) < taken(model) <= share * taken(original)
    path = save(model.eval(), tmp_path / "m")
    loaded = load(path).eval()
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert path.stat().st_size - header <= count(model).bytes_weights + 8 * len(packed_in(model))
    with torch.no_grad():
        assert torch.equal(outputs(loaded, x := batch(original)), outputs(model, x))
    assert loaded.recombined.bits == model.recombined.bits and count(loaded) == count(model)
    uniform = [moved(squeezed(build(arch), METHODS[method](), share, bits), original) for bits in (None, 8, 4)]
    assert moved(model, original) < 0.9 * min(uniform)


def test_layers_of_low_rank_are_cut_and_the_others_keep_their_bits():
    """Where half of the layers have rank 2, cutting them is free, and what it saves pays for 8 bits in the others."""
    original = build("tiny_llama")
    thin = [name for name, _ in original.named_modules() if name.endswith(("gate_proj", "up_proj", "down_proj"))]
    with torch.no_grad():
        for name in thin:
            weight = original.get_submodule(name).weight
            weight.copy_(weight[:, :2] @ weight[:2] * 2)
    models = {bits: build("tiny_llama") for bits in (None, 8, 4, "mix")}
    for model in models.values():
        model.load_state_dict(original.state_dict())
    found = {
        bits: moved(squeezed(model, Svd(allocation="mix" if bits == "mix" else "uniform"), 0.2, bits), original)
        for bits, model in models.items()
    }
    assert found["mix"] < 0.1 * min(found[bits] for bits in (None, 8, 4))
    layers = {name: models["mix"].get_submodule(name) for name in models["mix"].recombined.targets}
    assert all(layers[name].rank < 8 for name in thin)
    bits = models["mix"].recombined.bits
    assert sum(bits[name] == 8 for name in layers.keys() - set(thin)) >= 8


@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_llama"])
def test_what_a_candidate_loses_is_what_the_outputs_move(arch):
    """For 4 bits of one layer, to first order; summed over the batches."""
    original = build(arch)
    sites, data = find_sites(build(arch), Svd(targets=("o", "down"))), losses(original)
    sites = [site._replace(module=original.get_submodule(site.name)) for site in sites]
    method = Svd(targets=("o", "down"), allocation="mix")
    once = mixing.Pass(original, sites, data)
    stats = collect(original, sites, once.losses, mixing.KINDS)
    ratios = []
    for site in sites:
        options = mixing.candidates(method, site, mixing.Known.of(stats[site.name], once.means[site.name]), 16)
        one = next(one for one in options if (one.rank, one.bits) == (None, 4))
        weight = site.module.weight
        assert one.bytes == weight.numel() // 2 + weight.numel() // 16 * 2
        model = build(arch)
        with torch.no_grad():
            layer = mixing.stored(method, site, None, 4, 16)
            model.get_submodule(site.name).weight.copy_(layer.weight)
            lost = sum(
                float((outputs(model, x) - outputs(original, x)).square().sum())
                for x in (batch(original, seed=10 + i) for i in range(4))
            )
        ratios.append(one.loss / lost)
    assert 0.5 < torch.tensor(ratios).log().mean().exp() < 2, ratios
    assert all(0.2 < ratio < 5 for ratio in ratios), ratios


def test_probes_and_candidates():
    x = torch.randn(300, 20, dtype=torch.float64)
    moment = x.T @ x / 300
    rows = mixing.probes(moment.clone())
    assert torch.allclose(rows.T @ rows, moment, atol=1e-4)
    wide = torch.eye(200, dtype=torch.float64)
    assert mixing.probes(wide).square().sum() == pytest.approx(200, rel=0.2)
    assert list(mixing.grid(0)) == [] and list(mixing.grid(5)) == [1, 2, 3, 4, 5]
    assert list(mixing.grid(100)) == list(range(16, 101, 16)) and len(mixing.grid(1000)) <= mixing.RANKS
    some = [mixing.Candidate(*one, None, None) for one in ((5, 1.0), (3, 2.0), (4, 2.0), (3, 9.0), (6, 1.0), (9, 0.0))]
    assert [one[:2] for one in mixing.efficient(some)] == [(3, 2.0), (5, 1.0), (9, 0.0)]


def test_the_smallest_possible_is_named_and_possible():
    with pytest.raises(UsageError, match="budget=bytes_3: cannot be met, the nearest .* mix .* is bytes_") as error:
        squeezed(build("tiny_llama"), Svd(allocation="mix"), 0.03, "mix")
    word = str(error.value).rpartition(" ")[2]
    near = Budget.parse(word).value
    original, model = build("tiny_llama"), squeezed(build("tiny_llama"), Svd(allocation="mix"), near, "mix")
    assert 0.99 * near * taken(original) < taken(model) <= near * taken(original)


@pytest.mark.parametrize(
    "method, budget, said",
    [
        (Balf(), Budget("bytes", 0.3, packing=MIX), "quantize.bits=mix: balf gives its layers no ranks one by one"),
        (Svd(), Budget("bytes", 0.3, packing=MIX), "method.allocation='uniform': chooses ranks without bits; say mix"),
        (Svd(allocation="mix"), Budget("retained", 0.3, packing=MIX), "budget=retained_30: ranks and bits are mixed"),
        (Svd(allocation="mix"), Budget("bytes", 0.3), "method.allocation='mix': chooses ranks together with bits"),
        (Svd(allocation="mix", train_core=True), Budget("bytes", 0.3, packing=MIX), "drop train_core"),
        (Svd(allocation="mix", rank=4), Budget("bytes", 0.3, packing=MIX), "drop one of them"),
    ],
)
def test_refusals(method, budget, said):
    model = build("tiny_vit")
    with pytest.raises(UsageError) as error:
        apply(model, method, budget, losses(model))
    assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UsageError, match="quantize.bits=mix: no bits were chosen"):
        recombine.quantize(model, "mix", 16)
    with pytest.raises(UsageError, match="calibrates: give apply"):
        apply(model, Svd(allocation="mix"), Budget("bytes", 0.3, packing=MIX))


@pytest.mark.parametrize(
    "keys",
    [
        ["method=svd", "stage=compress", "stage.distil.epochs=1"],
        ["method@compressor=svd_llm", "method=lora", "stage=joint", "stage.distil.epochs=1"],
    ],
    ids=["alone", "pair"],
)
def test_a_run_takes_the_best_choice_and_says_what_a_mix_is(keys, tmp_path):
    keys = [*keys, "budget=bytes_25", "quantize.group=16"]
    found = execute(tmp_path / "auto", *keys, "quantize.bits=auto")
    part = found["quantized"]
    assert set(part["choices"]) == {"none", "mix", "8", "4"} and part["choices"]["mix"] is not None
    assert str(part["bits"]) == min(part["choices"], key=part["choices"].get)
    slot = "compressor" if "method=lora" in keys else "method"
    found = execute(tmp_path / "mix", *keys, "quantize.bits=auto", f"{slot}.allocation=mix")
    part = found["quantized"]
    assert part["bits"] == "mix" and [word for word, value in part["choices"].items() if value is not None] == ["mix"]
    assert sum(part["mix"].values()) == len(found["layers"])
    ranked = [layer for layer in found["layers"] if layer.get("bits") == 4 and "rank" in layer]
    assert part["mix"].get("4 bits, low rank", 0) == len(ranked)
    file = tmp_path / "mix" / "best.safetensors"
    again = execute(tmp_path / "again", "method=svd", "stage=evaluate", f"stage.checkpoint={file}")
    assert again["test"]["acc"] == found["test"]["acc"] and again["quantized"]["mix"] == part["mix"]
    account = found["account"]
    head = account["stored"] - account["stored_without_head"]
    assert account["bytes_weights"] - 4 * head <= 0.25 * taken(build("tiny_vit"))
