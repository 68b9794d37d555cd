"""Text-to-image models: the roles of a UNet, every kind of method on it, and what is refused."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")  # an extra

import recombine  # noqa: E402
import recombine.data  # noqa: E402
from helpers import config, drawing, refusal  # noqa: E402
from helpers.rows import ROWS  # noqa: E402
from recombine import models  # noqa: E402
from recombine.core.account import layer_report  # noqa: E402
from recombine.methods.from_config import from_name  # noqa: E402
from recombine.models import roles  # noqa: E402
from recombine.training import objectives  # noqa: E402

CPU = torch.device("cpu")
WORK = [
    "crisp", "crisp small", "recast", "cersa", "cersa whole", "jactus", "svd", "fwsvd", "asvd", "svd_llm", "kfac_svd",
    "basis_sharing", "dfjr", "balf", "dobi_svd", "lora all", "dora", "pissa", "ia3", "eva", "svfit", "svft", "ssf",
    "rosa", "pc_lora", "full", "dgmr", "prunenet",
]  # fmt: skip
REFUSED = {
    "wecolora": "none would be left out",
    "isomorphic": "gate and up are in one layer",
    "modegpt": "whose heads cannot be made narrower",
    "linear_probe": "no classification head",
    "svft top_k": "is 32 x 16",
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECOMBINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def plain():
    return drawing.build()


@pytest.fixture(scope="module")
def data(plain, tmp_path_factory):
    return drawing.module(plain, drawing.subject(tmp_path_factory.mktemp("pictures")))


def output(model, batch):
    with torch.no_grad():
        return model(**objectives.inputs_of(batch)).logits


def test_the_roles_are_those_of_attention_and_feed_forward(plain):
    found = roles.find(plain, ("q", "k", "v", "o", "up", "down"))
    attention = {f"attn{i}.to_{part}": part for i in (1, 2) for part in "qkv"} | {"attn1.to_out.0": "o"}
    for block in roles.block_names(plain):
        inside = {name.removeprefix(f"{block}."): role for name, role in found.items() if name.startswith(block)}
        assert inside == attention | {"attn2.to_out.0": "o", "ff.net.0.proj": "up", "ff.net.2": "down"}
    assert len(found) == 10 * len(roles.block_names(plain)) == 40
    assert all(
        isinstance(plain.get_submodule(n), torch.nn.LayerNorm) for n in roles.find(plain, ("norm",), torch.nn.Module)
    )


@pytest.mark.parametrize("name", WORK)
def test_a_method_rewrites_trains_and_comes_back_from_a_file(name, plain, data, tmp_path):
    row, batch = ROWS[name], objectives.fetch(data, data.train, [0, 1, 2], CPU)
    model, objective = copy.deepcopy(plain), objectives.build(data)
    recombine.apply(
        model,
        copy.copy(row.method),
        losses=lambda: (objective.loss(model, objectives.fetch(data, data.train, [i], CPU))[0] for i in range(3)),
    )
    before, after = output(plain, batch), output(model, batch)
    assert after.isfinite().all() and torch.allclose(before, after, atol=1e-4) == row.exact
    if trains := [p for p in model.parameters() if p.requires_grad]:
        loss = objective.loss(model, batch)[0] + row.method.penalty(model)
        grads = torch.autograd.grad(loss, trains, allow_unused=True)
        assert any(g is not None and g.any() for g in grads)
    loaded = recombine.load(recombine.save(model, tmp_path / "part", whole=False), copy.deepcopy(plain)).eval()
    alone = recombine.load(recombine.save(model, tmp_path / "whole", whole=True)).eval()
    for other in (loaded, alone):
        assert torch.allclose(output(other, batch), after, atol=1e-5)
        assert recombine.count(other) == recombine.count(model)
    recombine.merge(model)
    assert torch.allclose(output(model, batch), after, atol=1e-4)


def test_convolutions_can_be_reported(plain):
    model = copy.deepcopy(plain)
    recombine.apply(model, from_name("full", {"targets": [r"unet\..*conv1"]}, "method"))
    weights = {f"{name}.weight": p for name, p in model.named_modules() if name.endswith("conv1") for p in [p.weight]}
    assert len(rows := layer_report(model)) == len(weights) > 0
    for row in rows:
        p = weights[f"{row['name']}.weight"]
        assert row["shape"] == [len(p), p[0].numel()] and row["kind"] == "Conv2d" and row["held"] == 1


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_does_not_fit_says_so(name, plain):
    assert REFUSED[name] in refusal(recombine.apply, copy.deepcopy(plain), copy.copy(ROWS[name].method))


def test_blocks_and_layers_are_in_the_order_in_which_they_run(plain, data):
    """A UNet is registered as down, up, middle."""
    model, ran = copy.deepcopy(plain), []
    names = {*roles.block_names(model), *roles.find(model, ("q", "o", "down"), nn.Linear)}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    output(model, objectives.fetch(data, data.train, [0], CPU))
    blocks = roles.block_names(model)
    assert blocks == [name for name in ran if name in blocks] and "mid_block" in blocks[1]
    q = list(roles.find(model, ("q",), nn.Linear))
    assert q == [name for name in ran if name in q] and len(q) == 2 * len(blocks)


def test_the_noise_follows_from_the_seeds_alone(plain, data):
    batch = objectives.fetch(data, data.train, [0, 1], CPU)
    steps, noise = plain.drawn(batch["draw"], torch.zeros(4, 12, 8, 8))
    alone = plain.drawn(batch["draw"][2:3], torch.zeros(1, 12, 8, 8))
    assert steps[2] == alone[0] and torch.equal(noise[2:3], alone[1])
    copied = copy.deepcopy(plain).train()
    assert torch.equal(output(plain, batch), output(copied, batch))
    assert copied.parts.inner is plain.parts.inner  # what is frozen is there once


def test_a_perfect_prediction_has_no_loss(plain, data):
    """The target is the velocity: sqrt(a) noise - sqrt(1 - a) x."""
    batch = objectives.fetch(data, data.test, [0], CPU)
    x = torch.nn.functional.pixel_unshuffle(batch["pixels"], 2)
    step, noise = plain.drawn(batch["draw"], x)
    kept = plain.schedule.alphas_cumprod[step].view(-1, 1, 1, 1)
    with torch.no_grad():
        said = plain(**objectives.inputs_of(batch))
    assert torch.allclose(said.target, kept.sqrt() * noise - (1 - kept).sqrt() * x, atol=1e-5)
    assert torch.equal(plain.parts.inner.decode(x), batch["pixels"])


def test_the_prior_counts_where_its_pictures_stand(plain, data):
    batch, objective = objectives.fetch(data, data.train, [0, 1], CPU), objectives.Denoising(prior=0.5)
    assert batch["labels"].tolist() == [1, 1, 0, 0]
    with torch.no_grad():
        said = plain(**objectives.inputs_of(batch))
        errors = (said.logits - said.target).square().flatten(1).mean(1)
        model = copy.deepcopy(plain)
        whole = errors[:2].mean() + 0.5 * errors[2:].mean()
        for mode in (True, False):  # calibration sees what training will
            assert objective.loss(model.train(mode), batch)[0].item() == pytest.approx(whole.item())


@pytest.mark.parametrize("change, words", [
    ({"block_out_channels": [16, 33]}, "cannot be built"),
    ({"image_size": None, "sample_size": None}, "set model.image_size"),
    ({"image_size": 17}, "image_size=17 is no multiple of 4"),
    ({"depth": 3}, "model.depth=3: UNet2DConditionModel has no such key"),
    ({"schedule": {"steps": 3}}, "model.schedule.steps: there is no such key"),
    ({"text": "folder"}, "a random model has no folder"),
    ({"pretrained": True}, "pretrain_tiny_diffusion.py"),
    ({"pretrained": True, "checkpoint": "/nowhere"}, "holds no unet/config.json"),
])  # fmt: skip
def test_what_cannot_be_built_is_one_line(change, words):
    def build():
        model = models.build(**config("tiny_diffusion") | drawing.SIZES | change)
        models.tokenizer(model.recombine_source)

    assert words in refusal(build)


def test_without_diffusers_one_line_names_the_extra(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert "pip install 'recombine[images]'" in refusal(models.check, **config("tiny_diffusion"))


def test_a_text_encoder_that_trains_is_a_part_of_the_model(tmp_path):
    model = drawing.build(train_text=True)
    data = drawing.module(model, drawing.subject(tmp_path), prior=0)
    batch = objectives.fetch(data, data.train, [0, 1], CPU)
    targets = (drawing.LINEAR, r"text_encoder\..*attention\..*(?:query|key|value|dense)")
    plain = copy.deepcopy(model)
    recombine.apply(model, recombine.Cersa(targets=targets, alpha=0.9))
    linear = {name for name, m in plain.unet.named_modules(prefix="unet") if isinstance(m, torch.nn.Linear)}
    assert linear == {name for name in model.recombined.targets if name.startswith("unet.")}
    rewritten = {name.split(".")[0] for name in model.recombined.targets}
    assert rewritten == {"unet", "text_encoder"}
    objectives.build(data).loss(model, batch)[0].backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == rewritten
    after = output(model.eval(), batch)
    loaded = recombine.load(recombine.save(model, tmp_path / "part", whole=False), plain).eval()
    alone = recombine.load(recombine.save(model, tmp_path / "whole", whole=True)).eval()
    for other in (loaded, alone):
        assert torch.allclose(output(other, batch), after, atol=1e-5)


def test_data_of_another_kind_is_refused(plain, tmp_path):
    words = {"sentences": "take data=dreambooth", "offline": "take data=dreambooth"}
    for name, fix in words.items():
        module = recombine.data.build(name, task={"sentences": "sentiment", "offline": "dsprites_loc"}[name])
        assert fix in refusal(module.attach_model, **models.for_data(plain.recombine_source))
    module = recombine.data.build("dreambooth", root=str(drawing.subject(tmp_path)))
    vit = {"name": "tiny_vit", "arch": "vit", "image_size": 16}
    assert "take model=tiny_diffusion" in refusal(module.attach_model, **models.for_data(vit))
