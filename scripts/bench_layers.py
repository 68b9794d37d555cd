"""The two ways of one layer in inference, structured and built, and what a rule that chooses between them loses.

    python scripts/bench_layers.py [--tokens 1 4 16 197] [--shares 0.9 0.7 0.5 0.25]

Layers of SVD and of CRISP (chunk 128 or 64) with random weights, eager, in shapes of ViT-S, ViT-B, SmolLM2 and a small
Llama. Both ways take turns in one process; a way's time is the least of its CPU seconds. A rule takes the built weight
where the dense multiplications are fewer than c times the structured ones plus a number for the start of the second
product (`recombine/layers/base.py`). Printed is what each rule takes above the better way of each case, mean and worst.
"""

import argparse
import time

import torch

from recombine.layers.base import OVERHEAD, START, RecombinedLinear
from recombine.layers.factored import FactoredLinear
from recombine.layers.shared_basis import SharedBasisLinear

SHAPES = {  # (out, in)
    "ViT-S": ((384, 384), (1152, 384), (1536, 384), (384, 1536)),
    "ViT-B": ((768, 768), (3072, 768), (768, 3072)),
    "SmolLM2": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
    "Llama": ((2048, 2048),),
}
SAMPLE = 0.002  # seconds that one reading of the clock should span


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 197])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.25])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    shapes = [shape for model in SHAPES.values() for shape in model]
    layers = [layer for shape in shapes for share in args.shares for layer in structured(*shape, share)]
    rules = [(c, start) for c in (1, 1.1, 1.15, 1.3) for start in (0, 50e3, 100e3, 200e3)]
    print(f"{len(layers)} layers, above the better way: mean, worst. In use: c {OVERHEAD}, start {START:.0f}\n")
    print("| tokens | c | start | mean | worst |\n|---|---|---|---|---|")
    for tokens in args.tokens:
        cases = [case(layer, tokens, args.rounds) for layer in layers]
        for c, start in rules:
            lost = [times[dense < c * few + start] / min(times) - 1 for few, dense, times in cases]
            print(f"| {tokens} | {c} | {start:.0f} | {sum(lost) / len(lost):.1%} | {max(lost):.0%} |", flush=True)


def structured(m: int, n: int, share: float) -> list[RecombinedLinear]:
    """A layer of each kind of that shape, (m, n), with a share of the dense weights."""
    rank, chunk = max(1, round(share * m * n / (m + n))), 64 if n % 128 else 128
    basis = max(1, round(share * chunk))
    return [
        FactoredLinear(torch.randn(m, rank), torch.randn(rank, n)).eval(),
        SharedBasisLinear(torch.randn(m * n // chunk, basis), torch.randn(basis, chunk), n).eval(),
    ]


def case(layer: RecombinedLinear, tokens: int, rounds: int) -> tuple[float, float, tuple[float, float]]:
    """(structured multiplications, dense ones, (seconds of the structured way, of the built one))."""
    x, built = torch.randn(tokens, layer.in_features), layer.merged()
    ways = (layer.factored_forward, built)
    for way in ways:
        way(x)
    start = time.perf_counter()
    built(x)
    repeats = max(3, int(SAMPLE / (time.perf_counter() - start)))
    least = [float("inf")] * 2
    for _ in range(rounds):
        for i, way in enumerate(ways):
            start = time.process_time()
            for _ in range(repeats):
                way(x)
            least[i] = min(least[i], (time.process_time() - start) / repeats)
    few, dense, _ = layer.flops(tokens, False)
    return few, dense, tuple(least)


if __name__ == "__main__":
    main()
