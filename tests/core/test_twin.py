"""A twin shares every parameter until one of the two takes its own."""

import torch

import recombine
from recombine import Crisp
from recombine.core.rewrite import train_only
from recombine.core.twin import sharing, unshare
from zoo import batch, build, outputs


def test_a_teacher_stays_as_it_was_while_the_student_is_rewritten_and_trained():
    model = build("tiny_llama")
    x, held = batch(model), {id(p) for p in model.parameters()}
    before = outputs(model, x)
    twin = sharing(model)
    assert {id(p) for p in twin.parameters()} == held
    recombine.apply(model, Crisp(chunk=16, basis_rank=9))
    train_only(model, Crisp().distillation_parameters(model))
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    both = {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert both & trained.keys()  # norms train
    unshare(twin, model)
    left = {id(p) for p in twin.parameters()}
    assert not left & trained.keys() and both - trained.keys() <= left
    assert twin.lm_head.weight is twin.model.embed_tokens.weight is model.lm_head.weight
    with torch.no_grad():
        for p in trained.values():
            p.add_(1)
    assert torch.equal(outputs(twin, x), before)
