"""The loss of a distillation, and the one that WeCoLoRA's paper uses."""

import copy

import pytest
import torch

import recombine
from recombine import Isomorphic, WeCoLora
from recombine.models import roles
from recombine.training.distillation import Distillation
from zoo import ARCHS, batch, build, losses


def blocks_of(model, given):
    """The outputs of the blocks, by hooks of their own."""
    found = []
    hooks = [
        block.register_forward_hook(lambda m, x, y: found.append(y[0] if isinstance(y, tuple) else y))
        for block in roles.blocks(model)
    ]
    with torch.no_grad():
        model(**given) if isinstance(given, dict) else model(given)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_the_last_block_follows_the_originals_last_block(arch):
    """WeCoLoRA's mae/engines/engine_kd.py: mean |teacher - student| of the last features, whatever blocks are gone."""
    student, x = build(arch).eval(), batch(build(arch))
    teacher = copy.deepcopy(student)
    recombine.apply(student, WeCoLora(rank=2))
    if isinstance(x, dict):
        x |= {"attention_mask": torch.ones_like(x["input_ids"]), "labels": x["input_ids"]}
        given = {k: v for k, v in x.items() if k != "labels"}
    else:
        given, x = x, (x, torch.zeros(len(x), dtype=torch.long))
    mine, theirs = blocks_of(student, given), blocks_of(teacher, given)
    assert len(mine) < len(theirs)
    wanted = (theirs[-1] - mine[-1]).abs().mean().item()
    own = Distillation(teacher, kl=0, mse=0, features=0, l1=1).loss(student, x)[0]
    assert own.item() == pytest.approx(wanted, rel=1e-5) and wanted > 0
    crisp, both = (Distillation(teacher, l1=w).loss(student, x)[0].item() for w in (0, 2))
    assert both == pytest.approx(crisp + 2 * wanted, rel=1e-5)
    assert Distillation(teacher).loss(student, x)[0].item() == crisp


def test_a_last_block_of_another_width_has_no_such_loss():
    student = build("tiny_vit")
    teacher = copy.deepcopy(student)
    recombine.apply(student, Isomorphic(), "retained_50", losses(student))
    x = (batch(student), torch.zeros(len(batch(student)), dtype=torch.long))
    with pytest.raises(recombine.UsageError, match=r"^stage.distil.l1=1: the last block[^\n]*$"):
        Distillation(teacher, l1=1.0).loss(student, x)
