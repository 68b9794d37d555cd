"""RECAST's mean over K coefficient sets: K products averaged against one product with the averaged coefficients.

    python scripts/bench_recast.py [--sets 2 8] [--size 70] [--batch 32] [--rounds 5]

CRISP Tab. 5 finds RECAST 50 times slower than CRISP to train and 94 times to run, and blames the K sets. Both forms
make the same weights. All rivals live in one process and take turns; printed are ratios of medians to the averaged form
(more than 1: slower). K-fold and averaged build every weight at each step, as the paper's implementations do; `cached`
is the averaged form as recombine runs it, which keeps a weight in eval mode.
"""

import argparse
import copy
import statistics

import torch
from bench_step import forward, step
from torch import Tensor, nn

import recombine
from recombine import models
from recombine.layers import SharedBasisLinear


class KFold(nn.Module):
    """y = reshape(mean_k templates a_k) x + bias, as RECAST writes it: templates (m n, r), coefficients (K, r)."""

    def __init__(self, layer: SharedBasisLinear, sets: int):
        super().__init__()
        self.shape = (layer.out_features, layer.in_features)
        self.templates, self.bias = layer.basis, layer.bias
        spread = torch.randn(sets, layer.basis_rank, device=layer.mixer.device)
        self.coefficients = nn.Parameter(layer.mixer.T + spread - spread.mean(0))

    def forward(self, x: Tensor) -> Tensor:
        weight = sum(self.templates @ a for a in self.coefficients) / len(self.coefficients)
        return nn.functional.linear(x, weight.view(self.shape), self.bias)


class Rebuilt(nn.Module):
    """The layer without what eval keeps."""

    def __init__(self, layer: SharedBasisLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.dense_weight(), self.layer.bias)


def change(model: nn.Module, to) -> nn.Module:
    model = copy.deepcopy(model)
    for name in list(model.recombined.targets):
        model.set_submodule(name, to(model.get_submodule(name)))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--sets", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--size", type=int, default=70)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    arch = {"arch": args.model, "pretrained": False, "image_size": args.size, "num_classes": 16}
    dense = models.build("bench", **arch).to(device)
    recast = recombine.apply(copy.deepcopy(dense), recombine.Recast())
    crisp = recombine.apply(copy.deepcopy(dense), recombine.Crisp())
    rivals = {"averaged": change(recast, Rebuilt)}
    rivals |= {f"K = {k}": change(recast, lambda layer, k=k: KFold(layer, k)) for k in args.sets}
    rivals |= {"cached": recast, "crisp rebuilt": change(crisp, Rebuilt), "crisp cached": crisp, "dense": dense}
    x = torch.randn(args.batch, 3, args.size, args.size, device=device)
    y = torch.randint(16, (args.batch,), device=device)
    with torch.no_grad():
        reference = rivals["averaged"].eval()(x)
        for name in ("cached", *(f"K = {k}" for k in args.sets)):
            assert torch.allclose(rivals[name].eval()(x), reference, atol=1e-3)
    train, infer = ({name: [] for name in rivals} for _ in range(2))
    for turn in range(args.rounds + 1):
        for name, model in rivals.items():
            took = step(model.train(), x, y), forward(model.eval(), x)
            if turn:  # the first round warms up
                train[name].append(took[0])
                infer[name].append(took[1])
    print(f"{args.model} at {args.size} px, batch {args.batch}, {device}, {torch.get_num_threads()} threads")
    print(f"{'':20}{'training':>12}{'inference':>12}   times the averaged form")
    for name in rivals:
        ratios = (statistics.median(t[name]) / statistics.median(t["averaged"]) for t in (train, infer))
        print(f"{name:20}" + "".join(f"{ratio:>12.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
