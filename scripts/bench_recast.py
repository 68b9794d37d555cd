"""RECAST's mean over K coefficient sets: K products averaged against one product with the averaged coefficients.

    python scripts/bench_recast.py [--sets 2 8] [--size 70] [--batch 32] [--rounds 5]

CRISP Tab. 5 finds RECAST 50 times slower than CRISP to train and 94 times to run, and blames the K sets. Both forms
make the same weights. All rivals live in one process and take turns; printed are ratios of medians to the averaged form
(more than 1: slower). K-fold and averaged build every weight at each step, as the paper's implementations do; `cached`
is the averaged form as recombine runs it, which keeps a weight in eval mode.
"""

import copy

import torch
from bench_step import arguments, medians, setting
from torch import Tensor, nn

import recombine
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
    parser = arguments(__doc__)
    parser.add_argument("--sets", type=int, nargs="+", default=[2, 8])
    args = parser.parse_args()
    dense, x, y = setting(args)
    recast = recombine.apply(copy.deepcopy(dense), recombine.Recast())
    crisp = recombine.apply(copy.deepcopy(dense), recombine.Crisp())
    rivals = {"averaged": change(recast, Rebuilt)}
    rivals |= {f"K = {k}": change(recast, lambda layer, k=k: KFold(layer, k)) for k in args.sets}
    rivals |= {"cached": recast, "crisp rebuilt": change(crisp, Rebuilt), "crisp cached": crisp, "dense": dense}
    with torch.no_grad():
        reference = rivals["averaged"].eval()(x)
        for name in ("cached", *(f"K = {k}" for k in args.sets)):
            assert torch.allclose(rivals[name].eval()(x), reference, atol=1e-3)
    train, infer = medians(rivals, x, y, args.rounds)
    print(f"{'':20}{'training':>12}{'inference':>12}   times the averaged form")
    for name in rivals:
        ratios = (seconds[name] / seconds["averaged"] for seconds in (train, infer))
        print(f"{name:20}" + "".join(f"{ratio:>12.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
