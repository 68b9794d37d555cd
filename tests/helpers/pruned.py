"""Methods that cut, and distillation steps for them."""

import torch

import recombine
from recombine import Dgmr, Isomorphic, Modegpt, Peft, PruneNet, WeCoLora
from zoo import batch, build, outputs

CUTTERS = [Dgmr(ratio=0.4), PruneNet(ratio=0.4, episodes=2), Isomorphic(), WeCoLora(rank=4), Modegpt()]
LORA = Peft(rank=3, options={"lora_alpha": 3})


def ids(methods):
    return [type(method).__name__ for method in methods]


def reload(model, arch, path):
    recombine.save(model, path / "model.safetensors")
    return recombine.load(path / "model.safetensors", build(arch))


def distil(model, teacher, method, steps):
    """A distillation as the stages run it: the method's schedule moves before every step."""
    x = batch(model)
    with torch.no_grad():
        target = outputs(teacher, x)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, weight_decay=0)
    history = []
    for step in range(steps):
        method.on_distillation_step(model, step / (steps - 1))
        loss = (outputs(model.train(), x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history
