"""Models that no row knows: own classes, wrappers, and rows that a user registers."""

import copy
import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import recombine
from helpers import refusal
from recombine.models import lookup, roles
from recombine.models.infer import infer
from scripts.tiny_models import MODELS

D = 16


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        return self.to_out(F.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(D)
        self.net = nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D))
        self.side = nn.Linear(D, D)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.net(x) + self.side(x)


class Own(nn.Module):
    """A transformer of a user's own, with names from nobody's library."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.fc = nn.Linear(4, D), nn.ModuleList(Block() for _ in range(3)), nn.Linear(D, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.body:
            x = block(x)
        return self.fc(x.mean(1))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
        self.backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
        self.classifier = nn.Linear(16, 3)

    def forward(self, x):
        return self.classifier(self.backbone(x))


def test_roles_by_name_and_shape(caplog):
    model, x = Own(), torch.randn(2, 6, 4)
    with caplog.at_level(logging.INFO):
        lookup.SAID.clear()
        assert roles.role_names(model) == ["qkv", "o", "up", "down"] and roles.role_names(model)
    assert caplog.text.count("Own is of no known family") == 1 and "no role for side stem" in caplog.text
    assert roles.head(model) is model.fc and len(roles.blocks(model)) == 3
    found = roles.find(model, ("q", "k", "v", "o", "up", "down", "gate?"))  # the fused layer is not split
    assert list(found.values()) == ["qkv", "o", "up", "down"] * 3
    assert "name qkv, or all of q k v" in refusal(roles.find, model, ("q",))
    assert list(roles.find(model, ("side",)).values()) == ["side"] * 3

    plain = copy.deepcopy(model)
    recombine.apply(model, recombine.Cersa(targets=("all-linear",)), "retained_50")
    assert "fc" not in model.recombined.targets and model.recombined.targets["stem"] == "stem"
    recombine.merge(model)
    assert model.state_dict().keys() == plain.state_dict().keys() and model(x).isfinite().all()


def test_a_model_around_a_known_one(tmp_path):
    model = Wrapped()
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 16, 16)
    assert roles.head(model) is model.classifier
    assert list(roles.find(model, ("q", "o")))[:2] == ["backbone.blocks.0.attn.qkv.q", "backbone.blocks.0.attn.proj"]
    recombine.apply(model, recombine.Svd(ratio=0.5))
    loaded = recombine.load(recombine.save(model, tmp_path / "a.safetensors"), plain)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", ["Llama", "CLIP", "T5", "Whisper", "timm CaiT", "BLOOM", "wav2vec 2.0", "DINOv2"])
def test_what_is_inferred_is_what_the_row_says(name):
    model = MODELS[name].fresh()
    guess, row = infer(model, lookup.linear_layers(model)), roles.family(model)
    layers = list(lookup.linear_layers(model))
    assert {n: guess.plays(n) for n in layers} == {n: row.plays(n) for n in layers}
    assert [n for n, _ in model.named_modules() if guess.plays(n)]


def test_a_registered_family_comes_first(monkeypatch):
    monkeypatch.setattr(lookup, "REGISTERED", [])
    body = r"body\.\d+"
    parts = {part: rf"{body}\.attention\.to_qkv\.{part}" for part in "qkv"}
    mine = recombine.Family(
        classes="Own",
        roles={"qkv": rf"{body}\.attention\.to_qkv", **parts, "o": rf"{body}\.attention\.to_out"},
        blocks=body,
        head="fc",
        layout=lambda attention, fused: recombine.Layout(1, (D, D, D)),
    )
    assert recombine.register(mine) is mine
    model, x = Own(), torch.randn(2, 6, 4)
    before = model(x)
    assert roles.family(model) is mine
    recombine.apply(model, recombine.Peft(targets=("q", "v"), rank=2))
    assert list(model.recombined.targets.values()) == ["q", "v"] * 3
    torch.testing.assert_close(model(x), before)
    recombine.merge(model)
    assert type(model.body[0].attention.to_qkv) is nn.Linear
    assert "it has qkv q k v o" in refusal(roles.find, model, ("up",))


def test_what_is_no_family_is_refused(monkeypatch):
    monkeypatch.setattr(lookup, "REGISTERED", [])
    assert "give a recombine.Family(" in refusal(recombine.register, {"classes": "Own"})
    broken = recombine.Family(classes="Own", roles={"q": r"body\.(\d"}, blocks="body")
    assert "Family.roles['q']='body" in refusal(recombine.register, broken) and not lookup.REGISTERED


def test_nothing_to_go_by_is_one_line():
    assert "recombine.register(recombine.Family(...))" in refusal(recombine.apply, nn.Linear(2, 2), recombine.Svd())
    assert "experts are one tensor" in refusal(recombine.apply, MODELS["Mixtral"].fresh(), recombine.Svd())
    assert "reads its weights" in refusal(recombine.apply, MODELS["torchvision ViT"].fresh(), recombine.Svd())
