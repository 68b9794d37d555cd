"""The contract, for every method on every architecture: the rows are in helpers/rows.py."""

import copy
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import recombine
from helpers.rows import ROWS, dense
from recombine import Cersa, Crisp, Full
from recombine.core.account import layer_report, stored_in_targets
from recombine.core.rewrite import calibrate, find_sites
from recombine.models import roles
from recombine.models.roles import layer_at
from recombine.result_schema import Layer
from recombine.runtime.shapes import first_wrong
from zoo import ARCHS, batch, build, losses, outputs, train


def layers_of(model, method):
    found = roles.find(model, method.targets, nn.Module)
    weights = {name: layer_at(model, name).weight.detach() for name in found}
    weights = {name: w.reshape(len(w), -1) for name, w in weights.items()}  # of a norm and a convolution too
    return [(*w.shape[:2], found[name], torch.linalg.svdvals(w.double())) for name, w in weights.items()]


def sizes(model, method):
    """(stored, trained) as the method itself says, before anything is built."""
    method = replace(method)
    roles.split_fused(model, method.targets)
    sites = find_sites(model, method)
    method.before_statistics(model, sites, losses(model))
    if wanted := method.statistics_needed():
        calibrate(model, method, sites, losses(model), wanted)
    method.before_budget(model, sites, losses(model))
    method.after_budget(model, sites, losses(model))
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

    stored, trained = row.sizes(layers) if row.sizes else sizes(copy.deepcopy(pretrained), row.method)
    account = recombine.count(model)
    assert stored_in_targets(model) == stored and account.retained == stored / dense(layers)
    assert sizes(copy.deepcopy(pretrained), row.method) == (stored, trained)
    everything = sum(p.numel() for p in model.parameters())
    assert account.trained == everything if isinstance(row.method, Full) else account.trained_without_head == trained
    places = sum(b.nbytes for name, b in model.named_buffers() if name.endswith(".order"))
    assert account.stored == everything and account.bytes_weights == 4 * everything + places
    assert account.bytes_gradients == 4 * account.trained and account.bytes_optimizer == 8 * account.trained
    assert len(rows := layer_report(model)) == len(model.recombined.targets)
    assert not [wrong for one in rows if (wrong := first_wrong(one, Layer)) or isinstance(one.get("core"), bool)]

    if not (account.trained or isinstance(row.method, Full)):  # a compressor on a model without a head
        recombine.train_only(model, row.method.distillation_parameters(model))
        model.recombined.trainable = row.method.distillation_parameters(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    history = train(model.train())
    assert history[-1] < history[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}

    model.eval()
    with torch.no_grad():
        final = outputs(model, x)
        assert torch.allclose(final, outputs(model, x))  # the kept weights are the right ones
        recombine.save(model, tmp_path / "model.safetensors", whole=False)
        loaded = recombine.load(tmp_path / "model.safetensors", copy.deepcopy(pretrained))
        assert torch.allclose(outputs(loaded, x), final, rtol=1e-5, atol=1e-6)
        assert recombine.count(loaded) == recombine.count(model)
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == moved
        if request.node.callspec.params["pretrained"] == row.where[-1]:  # once a method
            recombine.save(model, tmp_path / "whole.safetensors", whole=True)
            alone = recombine.load(tmp_path / "whole.safetensors").eval()  # needs no pretrained model
            assert torch.allclose(outputs(alone, x), final, rtol=1e-5, atol=1e-6) and recombine.count(
                alone
            ) == recombine.count(model)
            assert list(alone.state_dict()) == list(model.state_dict())

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


def test_fields_are_the_config():
    model = recombine.apply(build("tiny_vit"), Cersa(alpha=0.9))
    step = model.recombined.steps[0]
    assert (step.method, step.fields) == ("Cersa", asdict(Cersa(alpha=0.9)))


def test_every_method_has_a_row():
    assert {type(row.method).__name__ for row in ROWS.values()} == set(recombine.methods.__all__)
