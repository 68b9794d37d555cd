"""LEMS and ATP: ranks by what cut layers do to predictions."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recombine
from helpers import ALL, SPLIT, refusal
from recombine import Asvd, KfacSvd, Svd, SvdLlm
from recombine.core.calibration import capture_attention_mask
from recombine.core.rewrite import find_sites, prepare
from recombine.layers import FactoredLinear
from recombine.methods.svd import lems, svd_llm_v2
from recombine.methods.svd.divergence import divergences
from recombine.methods.svd.replay import Replay, versions
from recombine.models import roles
from zoo import ARCHS, batch, build, loss, losses, outputs


def prepared(method, model, budget=None):
    """(the method, calibrated and with the budget, its sites); the model may be split, but is not rewritten."""
    method = replace(method)
    sites = prepare(model, method, recombine.Budget.of(budget), losses(model), recombine.core.memory.Memory())
    return method, sites


def kl(model, cut, batches):
    """The mean divergence of the cut model's predictions by the formula, padding left out."""
    total = count = 0
    for x in batches:
        with torch.no_grad(), capture_attention_mask(model) as mask:
            a, b = outputs(model, x), outputs(cut, x)
        a, b = (y if isinstance(y, torch.Tensor) else y.logits for y in (a, b))
        p, q = (F.softmax(y.double() / 0.6, -1) for y in (a, b))
        rows = (p * (p.log() - q.log())).sum(-1)
        rows = rows[mask[0]] if mask[0] is not None and mask[0].shape == rows.shape else rows
        total, count = total + rows.sum().item(), count + rows.numel()
    return total / count


@pytest.mark.parametrize("arch", ARCHS)
def test_a_layer_alone_is_cut_and_its_divergence_measured(arch):
    """Against the same layer really replaced in a copy of the model; the model itself is left as it was."""
    model = build(arch).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method, sites = prepared(SvdLlm(targets=ALL, allocation="lems", multiple_of=1), model, "retained_60")
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    assert model.training and not any(m._forward_hooks for m in model.modules())
    batches = [batch(model, seed=10 + i) for i in range(4)]
    for site, effect in list(zip(sites, method._effects, strict=True))[:: 3 if len(sites) > 9 else 1]:
        m, n = site.module.weight.shape
        assert effect.rank == max(1, int(0.1 * m * n / (m + n)))
        cut = copy.deepcopy(model).eval()
        left, right = method.pair(site, effect.rank)
        cut.get_submodule(site.name).weight.data = left @ right
        assert effect.divergence == pytest.approx(kl(copy.deepcopy(model).eval(), cut, batches), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("method", [Svd(), Asvd(), SvdLlm(), KfacSvd(), SvdLlm(factor="pivot")])
@pytest.mark.parametrize("allocation", ["lems", "atp", "svd_llm_v2"])
def test_budgets_are_met_in_multiples(arch, method, allocation):
    model = build(arch)
    method = replace(method, targets=SPLIT, allocation=allocation, multiple_of=4)
    recombine.apply(model, method, "retained_60", losses(model))
    account = recombine.count(model)
    assert 0.45 < account.retained <= 0.6
    layers = [model.get_submodule(name) for name in model.recombined.targets]
    ranks = [layer.rank for layer in layers if isinstance(layer, FactoredLinear)]
    assert ranks and len({*ranks}) > 1
    if allocation == "lems":
        assert all(k % 4 == 0 for k in ranks)


def test_a_layer_that_does_not_matter_is_cut_most():
    """The MLP of one block puts nothing out: its layers take the least, whatever their spectra say."""
    model = build("tiny_vit")
    nn.init.zeros_(model.blocks[2].mlp.fc2.weight)
    by = {}
    for allocation in ("share", "lems"):
        method, sites = prepared(SvdLlm(targets=ALL, allocation=allocation, multiple_of=4), model, "retained_50")
        by[allocation] = dict(zip((site.name for site in sites), method.ranks(sites), strict=True))
    name = "blocks.2.mlp.fc1"
    effects = dict(zip(by["lems"], method._effects, strict=True))
    assert effects[name].divergence < 1e-9 < 1e-6 < effects["blocks.1.mlp.fc1"].divergence
    assert by["lems"][name] == 4 < by["share"][name]


def test_weights_move_ranks_towards_what_matters():
    """With one layer's measured divergence a hundred times larger, its rank does not fall and others pay for it."""
    method, sites = prepared(SvdLlm(targets=ALL, allocation="lems", multiple_of=2), build("tiny_vit"), "retained_40")
    options, allowed = [method.options(site) for site in sites], [method.allowed(site) for site in sites]
    budget = 0.4 * sum(site.module.weight.numel() for site in sites)
    even = [lems.Effect(1.0, effect.rank, effect.block) for effect in method._effects]
    flat = lems.allocate(options, even, allowed, [1.0] * len(sites), budget)
    for i in (0, 5, len(sites) - 1):
        heavy = [effect._replace(divergence=100.0) if j == i else effect for j, effect in enumerate(even)]
        found = lems.allocate(options, heavy, allowed, [1.0] * len(sites), budget)
        scaled = lems.allocate(options, even, allowed, [100.0 if j == i else 1.0 for j in range(len(sites))], budget)
        assert found == scaled
        full = [10**6 if k is None else k for k in (flat[i], found[i])]
        assert full[1] > full[0] and any((b or 10**6) < (a or 10**6) for a, b in zip(flat, found, strict=True))


@pytest.mark.parametrize("arch, count", [("tiny_vit", 1), ("tiny_llama", 10)])
def test_language_models_choose_the_depth_term(arch, count, monkeypatch):
    """The choice is the one whose whole model diverges least, and every choice is within the budget."""
    model, seen = build(arch), []
    allocate = lems.allocate
    monkeypatch.setattr(lems, "allocate", lambda *a: seen.append(a[3]) or allocate(*a))
    method, sites = prepared(SvdLlm(targets=ALL, allocation="lems", multiple_of=1), model, "retained_40")
    assert len(seen) == count and all(scale == 1 for scale in seen[0])
    choices = method.choices(model, sites)
    dense = sum(site.module.weight.numel() for site in sites)
    assert all(method.stored(sites, ranks) <= 0.4 * dense for ranks in choices)
    scores = [method.divergence(model, sites, ranks, losses(model)) for ranks in choices]
    assert method.ranks(sites) == choices[scores.index(min(scores))]
    if count > 1:
        blocks, number = lems.blocks_of(model, sites)
        first, last = (next(i for i, b in enumerate(blocks) if b == which) for which in (0, number - 1))
        assert max(scale[first] for scale in seen) == 8 and all(scale[last] == 1 for scale in seen)


def test_depth_falls_from_one_to_zero():
    for alpha in (0.0, 1.0, 3.0):
        d = lems.depths(6, alpha)
        sums = [sum((j + 1) ** -alpha for j in range(b, 6)) for b in range(6)]
        wanted = torch.tensor([(s - sums[-1]) / (sums[0] - sums[-1]) for s in sums], dtype=torch.float64)
        assert torch.allclose(d, wanted) and d[0] == 1 and d[-1] == 0
    assert lems.depths(1, 1.0).tolist() == [0.0]


def test_atp_tapers_the_shares_and_chooses_the_best():
    model = build("tiny_vit")
    method, sites = prepared(SvdLlm(targets=ALL, allocation="atp"), model, "retained_50")
    choices = method.choices(model, sites)
    dense = sum(site.module.weight.numel() for site in sites)
    assert len(choices) > 5
    full = [
        [min(site.module.weight.shape) if k is None else k for site, k in zip(sites, r, strict=True)] for r in choices
    ]
    per = len(sites) // 4
    sums = [[sum(ranks[per * b : per * b + per]) for b in range(4)] for ranks in full]
    assert len({*sums[0]}) == 1 and all(a >= b for row in sums for a, b in zip(row, row[1:], strict=False))
    assert sums[-1][0] > 2 * sums[-1][-1]
    assert method.ranks_at(sites, [1.0] * len(sites)) == [None] * len(sites)
    assert all(0.45 * dense < method.stored(sites, ranks) <= 0.5 * dense for ranks in choices)
    scores = [method.divergence(model, sites, ranks, losses(model)) for ranks in choices]
    assert method.ranks(sites) == choices[scores.index(min(scores))]


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_llama", "tiny_swin"])
def test_blocks_before_a_cut_are_not_run_again(name, monkeypatch):
    """Bit for bit the same, and as many calls of the first block as there are cuts in it."""
    model = build(name).eval()
    sites = find_sites(model, recombine.SvdLlm(targets=("up",)))
    pairs = [torch.linalg.svd(site.module.weight.detach(), full_matrices=False) for site in sites]
    cuts = [{site.name: (u[:, :4] * s[:4], vh[:4])} for site, (u, s, vh) in zip(sites, pairs, strict=True)]
    first, calls = model.get_submodule(sites[0].name), []
    hook = first.register_forward_hook(lambda *_: calls.append(1))
    found = divergences(model, [*cuts, cuts[0] | cuts[-1]], losses(model), 2**30)[0]
    batches = sum(1 for _ in losses(model)())
    assert len(calls) == 3 * batches + batches and all(value > 0 for value in found)  # and those of `batches` itself
    calls.clear()
    monkeypatch.setattr(Replay, "before", lambda *_: [])
    assert found == divergences(model, [*cuts, cuts[0] | cuts[-1]], losses(model), 2**30)[0]
    assert len(calls) == (len(cuts) + 2) * batches
    hook.remove()


def test_a_block_whose_output_is_written_into_is_run_again():
    model = build("tiny_vit").eval()
    replay = Replay(model, 2**30)
    with replay.notes(), torch.no_grad():
        model(batch(model))
    assert replay.before(["blocks.1.mlp.fc1"]) == [0] and replay.before(["blocks.0.mlp.fc1"]) == []
    assert replay.before(["head"]) == []  # in no block
    replay.given[0][0].add_(1)
    assert replay.before(["blocks.1.mlp.fc1"]) == []
    assert versions((torch.ones(1), {"a": None})) and versions(object()) is None
    with replay.notes(), torch.no_grad():
        model(batch(model))
    assert replay.twice and replay.before(["blocks.1.mlp.fc1"]) == []
    small = Replay(model, 1000)
    with small.notes(), torch.no_grad():
        model(batch(model))
    assert not small.given and small.before(["blocks.1.mlp.fc1"]) == []


class Scores(nn.Module):
    """A model that returns no logits."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return {"scores": self.inner(x)}


def test_without_logits_it_is_how_far_the_loss_moves():
    """At least 0, and a pass for every cut; the mean over batches of the loss itself."""
    inner = build("tiny_vit").eval()
    model, passes = Scores(inner), []
    batches = [batch(inner, seed=i) for i in range(3)]

    def run():
        passes.append(1)
        for x in batches:
            yield F.cross_entropy(model(x)["scores"], torch.arange(len(x)) % 5)

    layer = inner.blocks[0].mlp.fc1
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    cuts = [{"inner.blocks.0.mlp.fc1": (u[:, :k] * s[:k], vh[:k])} for k in (1, 4, 48)]
    found, kind = divergences(model, cuts, run)
    assert kind == "loss" and len(passes) == 4 and all(value >= 0 for value in found) and found[2] < 1e-5
    cut = copy.deepcopy(model)
    cut.inner.blocks[0].mlp.fc1.weight.data = (u[:, :4] * s[:4]) @ vh[:4]
    with torch.no_grad():
        means = [
            sum(F.cross_entropy(m(x)["scores"], torch.arange(len(x)) % 5).item() for x in batches) / 3
            for m in (model, cut)
        ]
    assert found[1] == pytest.approx(abs(means[1] - means[0]), abs=1e-5)


def test_of_one_number_a_sample_it_is_the_squared_change():
    model = build("tiny_vit").eval()
    model.head = nn.Linear(model.head.in_features, 1)
    x, layer = batch(model), model.blocks[0].mlp.fc1
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    found, kind = divergences(
        model, [{"blocks.0.mlp.fc1": (u[:, :4] * s[:4], vh[:4])}], lambda: iter([model(x).square().mean()])
    )
    before = model(x)
    layer.weight.data = (u[:, :4] * s[:4]) @ vh[:4]
    assert kind == "value" and found[0] == pytest.approx((model(x) - before).square().mean().item(), rel=1e-4)


def test_of_a_compiled_model_the_model_inside_is_measured():
    """Hooks that are put on later are not seen in compiled code, so every cut looked free."""
    ranks = []
    for way in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        model = way(build("tiny_vit"))
        recombine.apply(model, Svd(allocation="lems", multiple_of=1), "retained_50", losses(model))
        inner = getattr(model, "_orig_mod", model)
        ranks.append([getattr(inner.get_submodule(name), "rank", None) for name in inner.recombined.targets])
    assert ranks[0] == ranks[1] and len(set(ranks[0])) > 2


def test_a_model_without_logits_says_how_it_is_judged():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("tiny_vit")

        def forward(self, x):
            return {"scores": self.inner(x)}

    model = Scores()
    batches = [batch(model.inner, seed=i) for i in range(2)]
    by = [F.cross_entropy, torch.arange(len(batches[0])) % 5]
    recombine.apply(
        model,
        SvdLlm(targets=["fc1"], allocation="atp"),
        "retained_60",
        lambda: (by[0](model(x)["scores"], by[1]) for x in batches),
    )
    assert any("allocation=atp: this model returns no logits" in note for note in model.recombined.notes)


def test_svd_llm_v2_shares_the_cut_out_by_the_logarithm_of_the_loss():
    roles, errors = ["q", "o", "q", "q"], [20.0, 7.0, 400.0, 3.0]
    kept, inverse = svd_llm_v2.shares(roles, errors, 0.6), [1 / math.log(e) for e in errors]
    scale = 3 * 0.4 / (inverse[0] + inverse[2] + inverse[3])
    assert kept == pytest.approx([1 - scale * inverse[0], 0.6, 1 - scale * inverse[2], 1 - scale * inverse[3]])
    whole = svd_llm_v2.shares(["q"] * 3, [1.01, 90.0, 40.0], 0.5)  # the first would lose more than all of it
    assert whole[0] == 0 and sum(whole) == pytest.approx(1.5) and whole[1] > whole[2] > 0
    assert svd_llm_v2.shares(["q"] * 2, [0.0, 0.0], 0.5) == pytest.approx([0.5, 0.5])


def test_refusals():
    model = build("tiny_vit")
    assert "calibrates" in refusal(recombine.apply, model, Svd(allocation="lems"))
    assert "method.multiple_of=0" in refusal(recombine.apply, model, Svd(multiple_of=0))
    small = Svd(targets=ALL, allocation="lems", multiple_of=8, ratio=0.1)
    assert "method.ratio=0.1" in refusal(recombine.apply, model, small, losses=losses(model))
    assert "pass had no batch" in refusal(recombine.apply, model, Svd(allocation="lems"), losses=lambda: iter(()))
    assert loss(model, batch(model)).isfinite() and roles.head(model) is not None


@pytest.mark.parametrize("allocation", ["lems", "atp"])
def test_predictions_are_measured_on_as_many_batches_as_asked(allocation):
    """One of several batches: what is measured is what those losses alone would give."""
    model = build("tiny_llama")
    every = losses(model)

    def first():
        return [next(iter(every()))]

    assert len(list(every())) > 1
    method = SvdLlm(targets=ALL, ratio=0.5, allocation=allocation, multiple_of=4)
    judged = prepared(replace(method, judged=1), model)[0]
    calibrated = replace(method)
    sites = prepare(model, calibrated, recombine.Budget.of(None), every, recombine.core.memory.Memory())
    assert judged.choices(model, sites) != [] and judged.divergence(
        model, sites, judged._ranks, every
    ) == pytest.approx(calibrated.divergence(model, sites, judged._ranks, first))
    if allocation == "lems":
        alone = divergences(model, [{sites[0].name: judged.pair(sites[0], judged._effects[0].rank)}], first)[0][0]
        assert judged._effects[0].divergence == pytest.approx(alone)
        assert judged._effects[0].divergence != calibrated._effects[0].divergence
    assert "judged=0" in refusal(recombine.apply, model, replace(method, judged=0), losses=every)
