"""EVA and CorDA against their papers, on second moments that are collected here with hooks."""

import copy
import itertools

import numpy as np
import pytest
import scipy.linalg
import torch

import recombine
from helpers import QKV, SPLIT, numbers, refusal
from recombine import Peft, Svd
from recombine.core.account import stored_in_targets
from recombine.methods.adapters.peft_starts import redistributed
from recombine.models import roles
from zoo import batch, build, losses, outputs, train


def start(init, targets=SPLIT, rank=4, **options):
    return Peft(targets=targets, rank=rank, options={"lora_alpha": 6, "init_lora_weights": init} | options)


def moments(model, names):
    """E[x x^T] of the inputs of these layers over the zoo's calibration batches, without its padding."""
    found = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, args, y, name=name: found[name].append(args[0]))
        for name in names
    ]
    sums = dict.fromkeys(names, 0.0)
    tokens = dict.fromkeys(names, 0)
    for i in range(4):
        x = batch(model, seed=10 + i)
        with torch.no_grad():
            outputs(model, x)
        for name in names:
            (seen,) = found[name]
            seen = seen[x["attention_mask"].bool()] if isinstance(x, dict) else seen.flatten(0, -2)
            sums[name] = sums[name] + seen.double().T @ seen.double()
            tokens[name] += len(seen)
            found[name].clear()
    for hook in hooks:
        hook.remove()
    return {name: (sums[name] / tokens[name]).numpy() for name in names}


@pytest.fixture(params=["tiny_vit", "tiny_llama"])
def pretrained(request):
    model = build(request.param)
    roles.split_fused(model, SPLIT)
    return model


def test_eva_starts_on_the_principal_directions(pretrained):
    model = copy.deepcopy(pretrained)
    recombine.apply(model, start("eva"), losses=losses(model))
    ranks, shares = {}, {}
    for name, c in moments(pretrained, model.recombined.targets).items():
        layer = model.get_submodule(name)
        a, b = numbers(layer.lora_A.default.weight, layer.lora_B.default.weight)
        values, vectors = np.linalg.eigh(c)
        principal = vectors[:, ::-1][:, : len(a)]
        assert np.abs(a.T @ a - principal @ principal.T).max() < 1e-3 and not b.any()
        assert layer.scaling["default"] == pytest.approx(6 / 4)
        ranks[name], shares[name] = len(a), values[::-1] / values.sum()
    assert sum(ranks.values()) == 4 * len(ranks) and len({*ranks.values()}) > 1
    assert min(ranks.values()) >= 1 and max(ranks.values()) <= 8
    taken = min(shares[name][ranks[name] - 1] for name in ranks if ranks[name] > 1)
    assert all(shares[name][ranks[name]] <= taken * 1.001 for name in ranks if ranks[name] < 8)


def test_ranks_go_where_they_explain_most():
    """The best of all ways to share them out, by trying each."""
    shares = {
        "a": torch.tensor([0.5, 0.3, 0.1, 0.1]),
        "b": torch.tensor([0.9, 0.1]),
        "c": torch.tensor([0.4, 0.35, 0.2]),
    }
    widths = {"a": 4, "b": 2, "c": 3}
    for rank, rho in ((1, 2.0), (2, 1.0), (2, 2.0), (2, 1.5), (3, 1.0)):
        found = redistributed(rank, rho, widths, shares)
        total = sum(min(rank, width) for width in widths.values())
        choices = itertools.product(*(range(1, 1 + min(round(rho * rank), width)) for width in widths.values()))
        gains = [
            sum(shares[n][:r].sum() for n, r in zip("abc", way, strict=True)) for way in choices if sum(way) == total
        ]
        assert sum(found.values()) == total
        assert float(sum(shares[n][:r].sum() for n, r in found.items())) == pytest.approx(float(max(gains)))


@pytest.mark.parametrize("part", ["ipm", "kpm"])
def test_corda_is_the_paper_s_part_of_the_weight(part, pretrained):
    model = copy.deepcopy(pretrained)
    recombine.apply(model, start("corda", corda_config={"corda_method": part}), losses=losses(model))
    for name, c in moments(pretrained, model.recombined.targets).items():
        layer, (w,) = model.get_submodule(name), numbers(pretrained.get_submodule(name).weight)
        a, b = numbers(layer.lora_A.default.weight, layer.lora_B.default.weight)
        metric = c / c.diagonal().mean() + 0.01 * np.eye(len(c))
        u, s, vh = scipy.linalg.svd(w @ metric, full_matrices=False)
        chosen = slice(None, 4) if part == "ipm" else slice(-4, None)
        right = vh[chosen] @ np.linalg.inv(metric)
        expected, scale = (u[:, chosen] * s[chosen]) @ right, layer.scaling["default"]
        assert np.abs(scale * b @ a - expected).max() < 1e-4 * np.abs(w).max()
        for i, (row, column) in enumerate(zip(a, b.T, strict=True)):  # U S^1/2 and S^1/2 V^T C^-1, up to the sign
            sigma = (s[chosen][i] / scale) ** 0.5
            assert np.linalg.norm(column) == pytest.approx(sigma, rel=1e-3)
            assert np.linalg.norm(row) == pytest.approx(sigma * np.linalg.norm(right[i]), rel=1e-2)
        (rest,) = numbers(layer.base_layer.weight)
        assert np.abs(rest + scale * b @ a - w).max() < 1e-5 * np.abs(w).max()
        assert f"{name}.base_layer.weight" not in model.recombined.untouched  # it is saved


def test_nothing_is_factored_again(tmp_path, monkeypatch):
    for init in ("eva", "corda"):
        model = build("tiny_vit")
        recombine.apply(model, start(init), losses=losses(model))
        train(model, 2)
        recombine.save(model.eval(), tmp_path / init)

    def forbidden(*_, **__):
        raise AssertionError("factored again")

    for name in ("svd", "eigh"):
        monkeypatch.setattr(torch.linalg, name, forbidden)
    for init in ("eva", "corda"):
        loaded = recombine.load(tmp_path / init, build("tiny_vit"))
    with torch.no_grad():
        assert torch.equal(outputs(loaded, batch(loaded)), outputs(model, batch(model)))


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_less_memory_gives_the_same(init):
    found = []
    for memory in (None, "200kb"):
        model = build("tiny_vit")
        recombine.apply(model, start(init, QKV), losses=losses(model), memory=memory)
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_a_budget_is_met_with_the_ranks_that_data_choose():
    model = build("tiny_llama")
    recombine.apply(model, start("eva", rank=9), "trainable_12k", losses=losses(model))
    rank, trained = model.recombined.steps[-1].fields["rank"], recombine.count(model).trained_without_head
    assert trained <= 12_000 < trained * (rank + 1) / rank
    assert sum(m.r["default"] for m in model.modules() if hasattr(m, "lora_A")) == rank * len(model.recombined.targets)


def test_eva_adapts_a_compressed_model_and_corda_does_not():
    model = recombine.apply(build("tiny_vit"), Svd(targets=SPLIT, ratio=0.6))
    x, before = batch(model), stored_in_targets(model)
    with torch.no_grad():
        expected = model(x)
        recombine.apply(model, start("eva"), losses=losses(model))
        assert torch.allclose(model(x), expected, atol=1e-6) and stored_in_targets(model) > before
    other = recombine.apply(build("tiny_vit"), Svd(targets=SPLIT, ratio=0.6))
    assert "corda" in refusal(recombine.apply, other, start("corda"), losses=losses(other))


@pytest.mark.parametrize(
    "method, why",
    [
        (start("eva", eva_config={"rho": 0.5}), "rho=0.5: must be from 1"),
        (start("eva", eva_config={"tau": 0.9}), "tau: the start is computed"),
        (start("eva", rank_pattern={"q": 2}), "EVA sets the ranks"),
        (start("corda", corda_config={"corda_method": "best"}), "must be ipm or kpm"),
        (start("corda", eva_config={"rho": 2.0}), "is for init_lora_weights=eva"),
        (start("eva", eva_config=3), "must be a group"),
        (start("eva"), "losses"),
    ],
)
def test_bad_settings_are_one_line(method, why):
    assert why in refusal(recombine.apply, build("tiny_vit"), method)
