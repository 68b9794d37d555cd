"""Learning rates: their schedule, and rates that say how far a step moves a layer's weight, whatever its factors are.

Adam and its like move every entry of a tensor by about the rate. How far that moves the weight W (m, n) which the
tensor stands for depends on the other factors, on gates and on sizes: a step of 1e-3 moves W by 0.5 % of its norm from
the closed form of CRISP, by 0.6 % at a chunk of 128, by 0.9 to 1.7 % from mimicry. A relative rate is divided by that.

A step of relative rate r moves the weight of each of L layers by r / L of its norm where all its entries train, and by
sqrt(mn / P) times that where the tensor has P entries. Then a first step makes the loss fall equally, whatever trains:
in a layer it falls by the length of the step times that of the part of the gradient G which P directions reach, which
is |G| sqrt(P / mn) as long as G lies evenly in W, and the layers add up. Measured: CRISP's best r is the same for 512
to 32,768 entries a layer, and for 12 and 48 layers (experiments/crisp/start.md).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from recombine.training.settings import OptimizerSettings

SCHEDULES = {  # share of the steps after the warm-up that is left -> factor of the rate
    "cosine": lambda left: 0.5 - 0.5 * math.cos(math.pi * left),
    "linear": lambda left: left,
    "constant": lambda left: 1.0,
}
RELATIVE = 0.08  # the rate where none is given
NO_MATRIX = ("norm", "embed")  # roles of layers that no input times a matrix is
DIFFERENCE = 1e-2  # of a step, to each side; the layers that need it are linear in each of their tensors
PROBES = 64  # random inputs by which a weight's norm is told


def scheduled(optim: OptimizerSettings, steps: int) -> Callable[[int], float]:
    """What the rates are multiplied with at a step, of so many: a linear warm-up, then the schedule."""
    warm = max(1, round(optim.warmup * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return SCHEDULES[optim.schedule](max(0.0, (steps - step) / max(1, steps - warm)))

    return factor


def movements(model: nn.Module) -> dict[str, float]:
    """L |dW| / |W| sqrt(P / mn) where all P entries of one of a layer's tensors move by 1, up or down at random.

    Norms are Frobenius norms, told by random inputs. A tensor of several layers has the root mean square over them.
    One that moves no weight by itself, such as LoRA's A beside B = 0, has the largest value in its layer.

    Returns:
        By parameter name, for every tensor that trains in a layer which a method rewrote, biases left out.
    """
    found: dict[int, list[float]] = {}
    layers = 0
    for name, role in model.recombined.targets.items() if hasattr(model, "recombined") else ():
        layer = model.get_submodule(name)
        trained = ((key, p) for key, p in layer.named_parameters() if p.requires_grad)
        mine = {key: p for key, p in trained if not key.endswith(("bias", "beta"))}
        if not mine or role in NO_MATRIX or not hasattr(layer, "in_features"):
            continue
        layers += 1
        values = {id(p): movement(layer, key, p) for key, p in mine.items()}
        most = max(values.values())
        for key, value in values.items():
            found.setdefault(key, []).append(value or most)
    means = {key: layers * (sum(v * v for v in values) / len(values)) ** 0.5 for key, values in found.items()}
    return {name: value for name, p in model.named_parameters() if (value := means.get(id(p)))}


def derivative(function: Callable[[Tensor], Tensor], at: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """A function's value and its derivative along a step.

    Of functions that know no forward derivative (peft's RandLoRA and LoHa), by a central difference.
    """
    try:
        return jvp(function, (at,), (step,))
    except RuntimeError:  # an error of the function itself comes again
        ahead, behind = (function(at + share * step) for share in (DIFFERENCE, -DIFFERENCE))
        return function(at), (ahead - behind) / (2 * DIFFERENCE)


def movement(layer: nn.Module, key: str, p: Tensor) -> float:
    """|dW| / |W| sqrt(P / mn) of one layer (m, n) where every entry of its tensor of that name moves by 1."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(PROBES, layer.in_features, generator=rng).to(p)
    step = (torch.randint(2, p.shape, generator=rng) * 2 - 1).to(p)
    mode = layer.training
    try:
        layer.eval()  # no dropout
        with torch.enable_grad():  # without, layers keep what they build
            zero = layer(torch.zeros_like(x[:1]))  # the bias
            y, moved = derivative(lambda value: functional_call(layer, {key: value}, (x,)), p.detach(), step)
    finally:
        layer.train(mode)
    size = (y - zero).detach().double().norm()
    share = p.numel() / (layer.out_features * layer.in_features)
    return float(moved.detach().double().norm() / size) * share**0.5 if size > 0 else 0.0
