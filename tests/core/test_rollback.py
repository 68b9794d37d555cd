"""Whatever fails while a model is rewritten or loaded leaves it as it was."""

from dataclasses import dataclass

import pytest
import torch

import recombine
import zoo
from recombine.core.method import Site
from scripts.tiny_models import MODELS


class Stop(BaseException):
    """Like Ctrl-C."""


@dataclass(kw_only=True)
class Breaks(recombine.Svd):
    """An SVD that is interrupted at a layer."""

    at: str = ""
    ratio: float = 0.5

    def recombine(self, site: Site):
        if site.name == self.at:
            raise Stop
        return super().recombine(site)


def state(model) -> list:
    """Everything that could differ, by identity."""
    modules = [(name, module, module.training) for name, module in model.named_modules()]
    return [
        modules,
        [(n, p, p.data_ptr(), p._version, p.requires_grad) for n, p in model.named_parameters()],
        vars(model).keys(),
    ]


def same(before, after) -> bool:
    pairs = zip(before[0] + before[1], after[0] + after[1], strict=True)
    return before[2] == after[2] and all(a[0] == b[0] and a[1] is b[1] and a[2:] == b[2:] for a, b in pairs)


@pytest.mark.parametrize(
    "name, at",
    [("timm ViT", "blocks.1.mlp.fc1"), ("GPT-2", "transformer.h.1.attn.c_attn.k"), ("timm BEiT", "blocks.1.mlp.fc1")],
)
def test_an_interruption_leaves_the_model_as_it_was(name, at):
    model, x = MODELS[name].fresh(), MODELS[name].inputs()
    next(model.parameters()).requires_grad_(False)  # the user's own choice
    before = state(model)
    with pytest.raises(Stop):
        recombine.apply(model, Breaks(at=at))
    assert same(before, state(model))
    recombine.apply(model, Breaks())  # nothing is left in the way
    assert torch.equal(state(model)[1][0][1], before[1][0][1]) and model.recombined.targets[at]
    assert (model(x) if isinstance(x, torch.Tensor) else model(**x).logits).isfinite().all()


def test_a_second_method_that_fails_leaves_the_first(tmp_path):
    model = zoo.build("tiny_vit")
    recombine.apply(model, recombine.Svd(targets=("qkv",), ratio=0.5))
    before, record = state(model), model.recombined
    with pytest.raises(Stop):
        recombine.apply(model, Breaks(targets=("o", "up"), at="blocks.2.attn.proj"))
    assert same(before, state(model)) and model.recombined is record


def test_a_file_of_another_model_leaves_it_as_it_was(tmp_path):
    file = recombine.save(
        recombine.apply(zoo.build("tiny_vit"), recombine.Svd(ratio=0.5)), tmp_path / "a.safetensors", False
    )
    other = zoo.build("tiny_vit", seed=1)  # other weights
    before = state(other)
    with pytest.raises(recombine.UsageError, match="differs from the backbone"):
        recombine.load(file, other)
    assert same(before, state(other))


def test_layers_with_one_weight_are_not_parted_in_silence():
    model = zoo.build("tiny_vit")
    model.blocks[2].mlp.fc1.weight = model.blocks[1].mlp.fc1.weight
    with pytest.raises(recombine.UsageError, match="blocks.2.mlp.fc1 shares its weight with blocks.1.mlp.fc1"):
        recombine.apply(model, recombine.Svd(ratio=0.5))
    recombine.apply(model, recombine.Svd(targets=("qkv", "o"), ratio=0.5))

    twice = zoo.build("tiny_vit")
    twice.blocks[2] = twice.blocks[1]  # one block, used twice
    x = zoo.batch(twice)
    recombine.apply(twice, recombine.Svd(ratio=0.5))
    assert twice.blocks[2] is twice.blocks[1] and len(twice.recombined.targets) == 3 * 6
    recombine.merge(twice)
    assert twice.blocks[2] is twice.blocks[1] and twice(x).isfinite().all()
