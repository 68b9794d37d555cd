"""The contract, for every method on every architecture. A new method adds one row to ROWS."""

import copy
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from torch import nn
from zoo import ARCHS, batch, build, losses, outputs, train

import recombine
from recombine import Cersa, Crisp, Full, LinearProbe, Peft, Svd
from recombine.budget import Budget, layer_report, stored_in_targets
from recombine.linalg import energy_rank
from recombine.methods.base import calibrate, find_sites
from recombine.models import roles

ALL = ("qkv", "o", "up", "down", "gate?")
SPLIT = ("q", "k", "v", "o", "up", "down", "gate?")
QKV = ("q", "k", "v")


@dataclass
class Row:
    method: recombine.Method
    exact: bool  # equals the pretrained output at init
    sizes: object  # [(out, in, role, s)] -> (stored, trained) in the target layers, written out again
    where: tuple[str, ...] = ARCHS  # the families it is defined on; refused in one line elsewhere
    same_shape: bool = True  # merging gives back the modules of the pretrained model


def crisp_sizes(r, s, g):
    def sizes(layers):
        alike = {}
        for m, n, role, _ in layers:
            alike.setdefault((m, n, role), []).append(m * n)
        groups = [run[i : i + g] for run in alike.values() for i in range(0, len(run), g)]
        rank = [min(r, len(group) * s) for group in groups]
        mixers = sum(len(group) * k * s for group, k in zip(groups, rank, strict=True))
        return sum(group[0] * k // s for group, k in zip(groups, rank, strict=True)) + mixers, mixers

    return sizes


def dense(layers):
    return sum(m * n for m, n, *_ in layers)


def svd_sizes(rank, core=0):
    def sizes(layers):
        ranks = [rank(m, n, s) for m, n, _, s in layers]
        outer = sum(k * (m + n) for k, (m, n, *_) in zip(ranks, layers, strict=True))
        return outer + core * sum(ranks), core * sum(ranks)

    return sizes


def cersa_sizes(alpha, beta):
    def sizes(layers):
        ranks = [(energy_rank(s, alpha), energy_rank(s, beta)) for *_, s in layers]
        outer = sum(ka * (m + n) + ka - kb for (ka, kb), (m, n, *_) in zip(ranks, layers, strict=True))
        trained = sum(kb * kb for _, kb in ranks)
        return outer + trained, trained

    return sizes


def lora_sizes(r, magnitude):
    def sizes(layers):
        added = sum(r * (m + n) + magnitude * m for m, n, *_ in layers)
        return dense(layers) + added, added

    return sizes


LORA = {"lora_alpha": 8}
CLASSIFIERS = ARCHS[:3]
ROWS = {
    "crisp": Row(Crisp(chunk=8), True, crisp_sizes(16, 8, 2)),
    "crisp alone": Row(Crisp(chunk=8, group_size=1), True, crisp_sizes(8, 8, 1)),
    "crisp balanced": Row(Crisp(chunk=4, group_size=4, gauge="balanced"), True, crisp_sizes(16, 4, 4)),
    "crisp ungated": Row(Crisp(chunk=8, gate="none"), True, crisp_sizes(16, 8, 2)),
    "crisp small": Row(Crisp(chunk=8, basis_rank=5), False, crisp_sizes(5, 8, 2)),
    "crisp split": Row(Crisp(targets=SPLIT, chunk=8), True, crisp_sizes(16, 8, 2)),
    "cersa": Row(Cersa(targets=SPLIT, alpha=0.9, beta=0.7), False, cersa_sizes(0.9, 0.7)),
    "cersa whole": Row(Cersa(targets=QKV, alpha=1.0), True, cersa_sizes(1, 1)),
    "svd": Row(Svd(targets=ALL, ratio=0.5), False, svd_sizes(lambda m, n, s: max(1, int(0.5 * m * n / (m + n))))),
    "svd energy": Row(Svd(targets=ALL, energy=0.8), False, svd_sizes(lambda m, n, s: energy_rank(s, 0.8))),
    "svd core": Row(Svd(targets=SPLIT, rank=7, train_core=True), False, svd_sizes(lambda m, n, s: 7, core=1)),
    "lora": Row(Peft(targets=QKV, rank=4, options=LORA), True, lora_sizes(4, 0)),
    "lora all": Row(Peft(targets=SPLIT, rank=2, options=LORA), True, lora_sizes(2, 0)),
    "dora": Row(Peft(targets=QKV, rank=4, options=LORA | {"use_dora": True}), True, lora_sizes(4, 1)),
    "linear_probe": Row(LinearProbe(targets=ALL), True, lambda layers: (dense(layers), 0), CLASSIFIERS),
    "full": Row(Full(targets=ALL), True, lambda layers: (dense(layers), dense(layers))),
}


def layers_of(model, method):
    found = roles.find(model, method.targets, nn.Module)
    weights = {name: model.get_submodule(name).weight.detach() for name in found}
    return [(*w.shape[:2], found[name], torch.linalg.svdvals(w.double())) for name, w in weights.items()]


def sizes(model, method):
    """(stored, trained) as the method itself says, before anything is built."""
    method = replace(method)
    sites = find_sites(model, method)
    if wanted := method.wants():
        calibrate(model, method, sites, losses(model), wanted)
    method.prepare(model, sites, losses(model))
    return method.sizes(sites)


@pytest.fixture(params=ARCHS)
def pretrained(request):
    return build(request.param)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_contract(row, pretrained, request, tmp_path):
    model, x = copy.deepcopy(pretrained), batch(pretrained)
    if request.node.callspec.params["pretrained"] not in row.where:
        with pytest.raises(recombine.UsageError) as error:
            recombine.apply(model, row.method, losses=losses(model))
        assert "\n" not in str(error.value)
        return
    layers = layers_of(copy.deepcopy(pretrained), row.method)
    with torch.no_grad():
        before = outputs(pretrained, x)
        recombine.apply(model, row.method, losses=losses(model))
        after = outputs(model, x)
    assert not any(m.training for m in model.modules())
    if row.exact:
        assert torch.allclose(before, after, atol=2e-5)
    else:
        assert not torch.allclose(before, after, atol=1e-3)

    stored, trained = row.sizes(layers)
    account = recombine.count(model)
    assert stored_in_targets(model) == stored and account.retained == stored / dense(layers)
    assert sizes(copy.deepcopy(pretrained), row.method) == (stored, trained)
    everything = sum(p.numel() for p in model.parameters())
    assert account.trained == everything if isinstance(row.method, Full) else account.trained_without_head == trained
    assert account.stored == everything and account.bytes_weights == 4 * everything
    assert account.bytes_gradients == 4 * account.trained and account.bytes_optimizer == 8 * account.trained
    assert len(layer_report(model)) == len(model.recombined.targets)

    if not (account.trained or isinstance(row.method, Full)):  # a compressor on a model without a head
        recombine.methods.train_only(model, row.method.distils(model))
        model.recombined.trains = row.method.distils(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    history = train(model.train())
    assert history[-1] < history[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}

    model.eval()
    with torch.no_grad():
        final = outputs(model, x)
        assert torch.allclose(final, outputs(model, x))  # the kept weights are the right ones
        recombine.save(model, tmp_path / "model.safetensors")
        loaded = recombine.load(tmp_path / "model.safetensors", copy.deepcopy(pretrained))
        assert torch.equal(outputs(loaded, x), final)
        assert recombine.count(loaded) == recombine.count(model)
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == moved

    resumed, going = train(loaded.train(), 2), train(model.train(), 2)
    assert resumed == going

    with torch.no_grad():
        unmerged = outputs(model.eval(), x)
        recombine.merge(model)
        assert torch.allclose(outputs(model, x), unmerged, atol=2e-5)
    if row.same_shape:
        assert model.state_dict().keys() == pretrained.state_dict().keys()
        assert [type(m) for m in model.modules()] == [type(m) for m in pretrained.modules()]


@pytest.mark.parametrize("name", ["crisp", "crisp small", "cersa", "svd", "svd core"])
def test_both_forwards_agree(name, monkeypatch):
    """Materialised and structured give the same outputs and gradients."""
    results = []
    for cheap in (0, 1):
        model = recombine.apply(build("tiny_vit"), copy.copy(ROWS[name].method)).double().train()
        for layer in model.modules():
            if isinstance(layer, recombine.RecombinedLinear):
                monkeypatch.setattr(layer, "flops", lambda tokens, train, c=cheap: (c, 1 - c, 0))
        y = model(batch(model).double())
        grads = torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])
        results.append((y, grads))
        with torch.no_grad():
            assert torch.allclose(model.eval()(batch(model).double()), y)
    assert torch.allclose(results[0][0], results[1][0])
    assert all(torch.allclose(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_kept_weight_follows_its_factors():
    model = recombine.apply(build("tiny_vit"), Crisp(chunk=8))
    x = batch(model)
    with torch.no_grad():
        first = model(x)
        next(m for m in model.modules() if hasattr(m, "mixer")).mixer.add_(0.5)
        assert not torch.allclose(model(x), first, atol=1e-3)


def test_shared_basis_is_one_parameter_after_loading(tmp_path):
    model = recombine.apply(build("tiny_vit"), Crisp(chunk=8))
    recombine.save(model, tmp_path / "m")
    loaded = recombine.load(tmp_path / "m", build("tiny_vit"))
    a, b = (loaded.get_submodule(f"blocks.{i}.mlp.fc1").basis for i in (0, 1))
    assert a is b and loaded.get_submodule("blocks.2.mlp.fc1").basis is not a


BAD = {
    "alpha=1.2": (Cersa(alpha=1.2), "alpha=1.2"),
    "beta>alpha": (Cersa(alpha=0.8, beta=0.9), "at most"),
    "beta=0": (Cersa(beta=0.0), "beta=0.0"),
    "basis_rank=0": (Crisp(chunk=8, basis_rank=0), "basis_rank=0"),
    "basis_rank large": (Crisp(chunk=8, basis_rank=17), "16"),
    "chunk": (Crisp(chunk=7), "divide"),
    "chunk=0": (Crisp(chunk=0), "chunk=0"),
    "group_size=0": (Crisp(group_size=0), "group_size=0"),
    "gate": (Crisp(chunk=8, gate="tanh"), "silu"),
    "gauge": (Crisp(chunk=8, gauge="left"), "balanced"),
    "ratio": (Svd(ratio=0), "ratio=0"),
    "rank": (Svd(rank=999), "rank=999"),
    "lora rank": (Peft(rank=0), "rank=0"),
    "peft class": (Peft(config="LoraConfg"), "LoraConfig"),
    "peft option": (Peft(options={"lora_alpa": 3}), "lora_alpha"),
    "role": (Svd(targets=("gate",)), "gate"),
    "no role": (Svd(targets=()), "targets"),
}


@pytest.mark.parametrize("method, word", BAD.values(), ids=BAD)
def test_bad_knobs_are_refused_in_one_line_and_change_nothing(method, word):
    model = build("tiny_vit")
    x = batch(model)
    before = model(x)
    with pytest.raises(recombine.UsageError) as error:
        recombine.apply(model, method)
    assert word in str(error.value) and "\n" not in str(error.value)
    assert torch.allclose(model(x), before, atol=1e-6) and all(p.requires_grad for p in model.parameters())


def test_one_method_object_serves_two_models():
    method = Cersa(alpha=1.0)
    for seed in (0, 1):
        model = build("tiny_vit", seed)
        before = model(batch(model))
        assert torch.allclose(recombine.apply(model, method)(batch(model)), before, atol=2e-5)
    assert not method._factors  # and keeps none of their factors


def test_layer_report_adds_up():
    model = recombine.apply(build("tiny_vit"), Crisp(chunk=8))
    rows = layer_report(model)
    held = sum(row["held"] * row["shape"][0] * row["shape"][1] for row in rows)
    assert held == pytest.approx(stored_in_targets(model))


def test_flops_count_attention_too():
    model = build("tiny_vit")
    n, d, depth = 17, 48, 4  # tokens, width, blocks
    linear = depth * n * 12 * d * d + 48 * 3 * 64 * 16 + d * 5
    attention = depth * 2 * n * n * d
    assert recombine.count(model, batch(model, 1)).flops == 2 * (linear + attention)


def test_twice_and_not_at_all():
    model = recombine.apply(build("tiny_vit"), Svd())
    with pytest.raises(recombine.UsageError, match="already rewritten"):
        recombine.apply(model, Svd())
    with pytest.raises(recombine.UsageError, match="nothing to merge"):
        recombine.merge(build("tiny_vit"))


BUDGETS = [
    (Crisp(chunk=16), "retained_50", "retained"),
    (Crisp(chunk=16), "retained_20", "retained"),
    (Svd(), "retained_50", "retained"),
    (Cersa(), "retained_60", "retained"),
    (Crisp(chunk=16), "trainable_5k", "trained_without_head"),
    (Cersa(), "trainable_5k", "trained_without_head"),
    (Peft(), "trainable_5k", "trained_without_head"),
    (Crisp(chunk=16), "memory_0.4mb", "memory_mib"),
    (Svd(), "memory_0.4mb", "memory_mib"),
    (Cersa(), "memory_0.65mb", "memory_mib"),
    (Peft(), "memory_0.65mb", "memory_mib"),
]


@pytest.mark.parametrize("method, word, measure", BUDGETS, ids=[f"{type(m).__name__}-{w}" for m, w, _ in BUDGETS])
def test_budget_is_met_and_used(method, word, measure):
    model = recombine.apply(build("tiny_vit"), method, word)
    limit, knob = Budget.parse(word).value, method.knobs[word.split("_")[0]]
    assert getattr(recombine.count(model), measure) <= limit
    chosen = model.recombined.steps[0].fields
    choices = list(method.choices(knob, find_sites(build("tiny_vit"), method)))
    if chosen[knob] != choices[-1]:  # the next larger value is over the limit
        larger = choices[choices.index(chosen[knob]) + 1]
        over = recombine.apply(build("tiny_vit"), replace(method, **{knob: larger}))
        assert getattr(recombine.count(over), measure) > limit


def test_energy_budget_keeps_the_energy():
    for method in (Svd(targets=SPLIT), Cersa(targets=SPLIT), Crisp(targets=SPLIT, chunk=16)):
        original = build("tiny_vit")
        roles.find(original, SPLIT)
        model = recombine.apply(build("tiny_vit"), method, "energy_90")
        kept = [1 - (model.get_submodule(n).dense_weight() - original.get_submodule(n).weight).square().sum()
                / original.get_submodule(n).weight.square().sum() for n in model.recombined.targets]  # fmt: skip
        if isinstance(method, Crisp):
            kept = [sum(kept) / len(kept)]  # holds per group
        assert min(kept) >= 0.9 - 1e-3


@pytest.mark.parametrize(
    "method, word, says",
    [
        (Crisp(chunk=16), "retained_1", "nearest"),
        (Svd(), "retained_1", "nearest"),
        (Peft(), "trainable_10", "nearest"),
        (Peft(), "retained_50", "trainable, memory"),
        (Full(), "retained_50", "none"),
        (Svd(), "shrink_50", "retained_50"),
        (Svd(), "retained_150", "share"),
    ],
)
def test_budget_that_cannot_be_met_names_the_nearest(method, word, says):
    with pytest.raises(recombine.UsageError) as error:
        recombine.apply(build("tiny_vit"), method, word)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_fields_are_the_config():
    model = recombine.apply(build("tiny_vit"), Cersa(alpha=0.9))
    step = model.recombined.steps[0]
    assert (step.method, step.fields) == ("Cersa", asdict(Cersa(alpha=0.9)))
