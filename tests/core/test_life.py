"""What a model keeps through apply and merge, and what apply refuses in one line or undoes."""

import copy
import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recombine
from helpers import ALL, refusal
from recombine import BasisSharing, Cersa, Crisp, Full, Jactus, Peft, Rosa, Ssf, Svd, SvdLlm
from recombine.core.account import stored_in_targets
from recombine.core.calibration import collect
from recombine.core.rewrite import find_sites
from zoo import ARCHS, batch, build, loss, losses, outputs


def interrupted(model, after: int):
    """losses= that is interrupted at the pass of that number."""
    passes = iter(range(after))

    def call():
        if next(passes, None) is None:
            raise KeyboardInterrupt
        return losses(model)()

    return call


@pytest.mark.parametrize(
    "method, after",
    [(Jactus(), 0), (BasisSharing(whiten=False, refit=True), 3), (Crisp(chunk=8, refine={"steps": 9}), 1)],
    ids=["calibration", "half rewritten", "all rewritten"],
)
def test_an_interruption_leaves_the_model_as_it_was(method, after):
    model = build("tiny_vit")
    model.cls_token.requires_grad_(False)
    x, before = batch(model), list(model.named_modules())
    parameters, expected = dict(model.named_parameters()), model(x)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    with pytest.raises(KeyboardInterrupt):
        recombine.apply(model, method, losses=interrupted(model, after))
    assert list(model.named_modules()) == before and not hasattr(model, "recombined")
    assert all(p is parameters[name] and p.requires_grad == flags[name] for name, p in model.named_parameters())
    assert torch.equal(model(x), expected)
    recombine.apply(model, Svd(targets=ALL))


@pytest.mark.parametrize("method", [Crisp(chunk=8), Svd(), Peft(), Ssf(), Full(targets=ALL)])
def test_hooks_move_to_the_new_layer_and_back(method):
    model, seen = build("tiny_vit"), []
    names = ("blocks.0.attn.qkv", "blocks.1.mlp.fc1")
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: seen.append((name, y.detach())))
        for name in names
    ]
    model.get_submodule(names[1]).register_forward_pre_hook(lambda m, a: seen.append(("before", a[0])))
    x = batch(model)
    with torch.no_grad():
        recombine.apply(model, method)
        for _ in range(2):  # recombined, then merged
            seen.clear()
            model(x)
            assert [name for name, _ in seen] == [names[0], "before", names[1]]
            expected = model.get_submodule(names[1])
            hooks, expected._forward_hooks = expected._forward_hooks, {}
            assert torch.allclose(expected(seen[1][1]), seen[2][1], atol=1e-5)
            expected._forward_hooks = hooks
            if hasattr(model, "recombined"):
                recombine.merge(model)
        for handle in handles:
            handle.remove()
        seen.clear()
        model(x)
    assert [name for name, _ in seen] == ["before"]


class Own(nn.Linear):
    """A linear layer with a forward of its own, as transformers' FalconLinear."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Stateful(nn.Linear):
    """One that holds more than nn.Linear does."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls = 0


class Scaled(nn.Linear):
    """One that is no W x + b."""

    def forward(self, x):
        return 2 * super().forward(x)


def swapped(cls) -> nn.Module:
    """A ViT whose first fc1 is of that class."""
    model = build("tiny_vit")
    old, new = model.blocks[0].mlp.fc1, cls(48, 192)
    new.load_state_dict(old.state_dict())
    model.blocks[0].mlp.fc1 = new
    return model.eval()


def test_merging_gives_back_the_class_or_says_so(caplog, tmp_path):
    for cls in (Own, Stateful):
        model = swapped(cls)
        x, file = batch(model), tmp_path / "svd.safetensors"
        with caplog.at_level(logging.WARNING):
            recombine.apply(model, Svd(), "retained_50")
        assert ("blocks.0.mlp.fc1 is a Stateful" in caplog.text) == (cls is Stateful)
        recombine.save(model, file)
        loaded = recombine.load(file, swapped(cls))
        after = model(x)
        for merged in map(recombine.merge, (model, loaded)):
            assert type(merged.blocks[0].mlp.fc1) is (Own if cls is Own else nn.Linear)
            assert torch.allclose(merged(x), after, atol=1e-5)
    assert "blocks.0.mlp.fc1 is a Scaled" in refusal(recombine.apply, swapped(Scaled), Svd())


@pytest.mark.parametrize("method", [Crisp(chunk=8), Svd(targets=("q", "up")), Peft()], ids=["crisp", "svd", "lora"])
def test_merging_freezes_again_what_was_frozen(method, tmp_path):
    model = build("tiny_vit")
    frozen = {"cls_token", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "head.bias"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    fresh = copy.deepcopy(model)
    file = recombine.save(recombine.apply(model, method), tmp_path / "file.safetensors")
    recombine.apply(model, Full(targets=ALL))
    for merged in (recombine.merge(model), recombine.merge(recombine.load(file, fresh))):
        assert {name for name, p in merged.named_parameters() if not p.requires_grad} == frozen


def test_a_layer_in_two_places_stays_one(tmp_path):
    def tied():
        model = build("tiny_vit")
        model.blocks[2].mlp.fc1 = model.blocks[0].mlp.fc1
        return model

    model = tied()
    recombine.apply(model, Svd(targets=ALL), "retained_50")
    assert model.blocks[2].mlp.fc1 is model.blocks[0].mlp.fc1
    x, file = batch(model), recombine.save(model, tmp_path / "svd.safetensors")
    again = recombine.load(file, tied())
    assert again.blocks[2].mlp.fc1 is again.blocks[0].mlp.fc1 and torch.equal(again(x), model(x))
    after = model(x)
    recombine.merge(model)
    assert model.blocks[2].mlp.fc1 is model.blocks[0].mlp.fc1 and torch.allclose(model(x), after, atol=1e-5)


def test_a_target_that_shares_its_weight_with_another_layer_is_refused():
    model = build("tiny_vit")
    model.blocks[2].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    text = refusal(recombine.apply, model, Svd())
    assert "blocks.2.mlp.fc1 shares its weight with blocks.0.mlp.fc1" in text
    recombine.apply(model, Full(targets=ALL))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [Cersa(), Crisp(chunk=8), SvdLlm(), Peft(), Ssf()])
def test_weights_that_are_not_finite_are_refused_by_name(method, value):
    model = build("tiny_vit")
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[-1, 3] = value
    text = refusal(recombine.apply, model, method, losses=losses(model))
    assert "blocks.1.attn.qkv" in text and "weight is not finite" in text


CALLS = {
    "number": ((Svd(), 0.5), "retained_50"),
    "per cent": ((Svd(), 25), "retained_25"),
    "class": ((Svd,), "recombine.Svd()"),
    "word": (("cersa",), "recombine.Cersa()"),
    "float rank": ((Svd(rank=2.5),), "method.rank=2.5"),
    "word rank": ((Cersa(rank="8"),), "method.rank='8'"),
    "lora rank": ((Peft(rank=2.0),), "whole number or none"),
    "part": ((Crisp(chunk=8, mimicry={"steps": 1.5}),), "method.mimicry.steps=1.5"),
    "list": ((SvdLlm(), None, []), "losses is a list"),
    "nothing yielded": ((SvdLlm(), None, lambda: None), "returns a NoneType"),
    "tuples": ((SvdLlm(), None, lambda: [(1, 2)]), "yields a tuple"),
    "no scalar": ((SvdLlm(), None, lambda: [torch.ones(3)]), "(3,)"),
    "no graph": ((Jactus(), None, lambda: [torch.ones(())]), "not called"),
}


@pytest.mark.parametrize("arguments, word", CALLS.values(), ids=CALLS)
def test_a_wrong_call_is_one_line(arguments, word):
    assert word in refusal(recombine.apply, build("tiny_vit"), *arguments)


def test_a_model_that_cannot_be_rewritten_is_one_line():
    model = build("tiny_vit")
    assert "give a torch.nn.Module" in refusal(recombine.apply, "tiny_vit", Svd())
    assert "DataParallel" in refusal(recombine.apply, nn.DataParallel(model), Svd())
    with torch.inference_mode():
        assert "inference_mode" in refusal(recombine.apply, model, Svd())
    detached = lambda: (loss(model, batch(model)).detach() for _ in range(2))  # noqa: E731
    assert "without its graph" in refusal(recombine.apply, model, Jactus(), losses=detached)
    assert "without its graph" in refusal(recombine.apply, model, Rosa(warmup=2), losses=detached)
    assert "meta device" in refusal(recombine.apply, model.to("meta"), Crisp(chunk=8))


FUNCTIONS = {
    "count": recombine.count,
    "adapters": recombine.adapters,
    "quantize": recombine.quantize,
    "merge": recombine.merge,
    "save": partial(recombine.save, path="x"),
    "save_adapter": partial(recombine.save_adapter, path="x"),
    "load_adapter": partial(recombine.load_adapter, path="x"),
    "set_adapter": partial(recombine.set_adapter, name="x"),
    "train_only": partial(recombine.train_only, names=set()),
    "export": partial(recombine.export, folder="x", to="hf"),
}


@pytest.mark.parametrize("given", [None, "vit_s16", nn.Linear], ids=["None", "a word", "a class"])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_is_no_model_is_one_line(function, given):
    assert "give a torch.nn.Module" in refusal(function, given)


def test_a_parameter_to_train_that_the_model_lacks_is_one_line():
    """It would freeze everything."""
    model = build("tiny_vit")
    line = refusal(recombine.train_only, model, {"head.weigth"})
    assert "no parameter head.weigth" in line and "did you mean head.weight" in line
    assert all(p.requires_grad for p in model.parameters())


class Reads(nn.Module):
    """An MLP that reads fc1's weight instead of calling fc1."""

    def __init__(self, mlp):
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    def forward(self, x):
        return self.fc2(F.gelu(F.linear(x, self.fc1.weight, self.fc1.bias)))


def test_a_weight_that_is_read_trains_or_is_refused_by_name():
    def reading():
        model = build("tiny_vit")
        model.blocks[1].mlp = Reads(model.blocks[1].mlp)
        return model

    x = batch(reading())
    for method in (Crisp(chunk=8), Cersa(targets=("up",)), Ssf()):
        model = recombine.apply(reading(), method)
        after = model(x)
        after.square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert torch.allclose(recombine.merge(model)(x), after, atol=1e-5)
    for method in (Jactus(), SvdLlm()):
        model = reading()
        assert "blocks.1.mlp.fc1 was not called" in refusal(recombine.apply, model, method, losses=losses(model))
    model = recombine.apply(reading(), Peft())
    assert "blocks.1.mlp.fc1 is not called" in refusal(model, x)
    model = recombine.apply(build("tiny_vit"), Peft())
    model(x)
    assert not any(m._forward_hooks for m in model.modules())  # nobody looks on any longer


def test_activations_that_write_over_their_input_change_no_statistics():
    wanted, stats = {"inputs", "outputs", "cross", "fisher"}, []
    for inplace in (False, True):
        model = build("tiny_vit")
        for block in model.blocks:
            block.mlp.act = nn.ReLU(inplace=inplace)
        sites = find_sites(model, Svd(targets=("up", "down")))
        stats.append(collect(model, sites, losses(model), wanted))
    for plain, written in zip(*(s.values() for s in stats), strict=True):
        assert torch.equal(plain.gg, written.gg) and torch.equal(plain.gx, written.gx) and plain.gg.any()
        assert torch.equal(plain.fisher, written.fisher) and plain.tokens == written.tokens


def test_a_layer_without_a_gradient_is_refused_by_name():
    model = build("tiny_vit")
    model.blocks[2].mlp.fc2.register_forward_hook(lambda m, a, y: y.detach())
    text = refusal(recombine.apply, model, Jactus(), losses=losses(model))
    assert "no gradient reached blocks.2.mlp.fc1" in text


@pytest.mark.parametrize("arch", ARCHS)
def test_a_chunk_adapts_to_each_width(arch, tmp_path, caplog):
    model = build(arch)
    x, before = batch(model), outputs(model, batch(model))
    recombine.apply(model, Crisp())
    assert torch.allclose(outputs(model, x), before, atol=2e-5)
    chunks = {model.get_submodule(n).in_features: model.get_submodule(n).chunk for n in model.recombined.targets}
    assert chunks == {w: {24: 24, 48: 24, 80: 40}.get(w, 32) for w in chunks}
    assert len(model.recombined.notes) == 1 and caplog.text.count("24 for 48") == 1
    again = recombine.load(recombine.save(model, tmp_path / "crisp.safetensors"), build(arch))
    assert torch.equal(outputs(again, x), outputs(model, x))
    half = recombine.count(recombine.apply(build(arch), Crisp(), "retained_50")).retained
    assert 0.45 < half <= 0.5


@pytest.mark.parametrize(
    "method", [Svd(rank=8), Cersa(targets=("up", "down"), rank=8), Rosa(rank=8, density=0.0), Peft()]
)
def test_a_rank_adapts_to_a_narrow_layer(method):
    def narrow():
        model = build("tiny_vit")
        model.blocks[1].mlp.fc1, model.blocks[1].mlp.fc2 = nn.Linear(48, 5), nn.Linear(5, 48)
        return model

    stored = method.sizes(find_sites(narrow(), method))[0] if not isinstance(method, Peft) else None
    model = recombine.apply(narrow(), method)
    assert (
        "method.rank=8: 2 of" in model.recombined.notes[0]
        and "blocks.1.mlp.fc1 the least, 5" in model.recombined.notes[0]
    )
    if stored:
        assert stored_in_targets(model) == stored
    else:
        assert model.blocks[1].mlp.fc1.r == {"default": 5} and model.blocks[0].mlp.fc1.r == {"default": 8}
