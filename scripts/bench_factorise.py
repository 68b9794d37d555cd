"""`recombine.linalg.svd` beside other factorisations of one weight: ratios of time and of error.

    python scripts/bench_factorise.py [--shapes 768x768 4096x11008] [--ranks 16 half] [--rounds 3] [--threads 1]
                                      [--spectrum gauss|decaying] [--rivals lapack64 lapack32 lowrank gesdd float32]

Two questions stand behind it: what a method pays for its factors, and how PiSSA-like starts become cheaper
(huggingface/peft#3049). All rivals live in one process and take turns. Printed for each are the median over the rounds
of its CPU time over ours (more than 1: ours is faster), and its error |W - W'| over the least error of that rank.

    ours      recombine.linalg.svd(W, k)
    float32   the same, with subspaces found in float32, as on a GPU whose float64 is slow
    lapack64  torch.linalg.svd in float64, cut to k
    lapack32  torch.linalg.svd in float32, cut to k
    lowrank   torch.svd_lowrank in float32 with q = k and niter = 4, as peft's pissa_niter_4
    gesdd     scipy.linalg.svd in float64, where scipy is installed

`gauss` draws a weight as a network starts, which is the hardest for iteration. `decaying` has the spectrum j^-1/2 and
random bases, nearer to a trained weight.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from recombine import linalg

SHAPES = ("576x576", "1536x576", "768x768", "3072x768", "1024x1024", "4096x1024")  # SmolLM2, ViT-B, ViT-L


def lapack(weight: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """torch.linalg.svd, cut to k."""
    u, s, vh = torch.linalg.svd(weight.to(dtype), full_matrices=False)
    return u[:, :k], s[:k], vh[:k]


def lowrank(weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """peft's fast start of PiSSA."""
    u, s, v = torch.svd_lowrank(weight, q=k, niter=4)
    return u, s, v.T


def gesdd(weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """scipy's divide and conquer, cut to k."""
    import scipy.linalg  # only where it is asked for

    u, s, vh = (torch.from_numpy(part) for part in scipy.linalg.svd(weight.double().numpy(), full_matrices=False))
    return u[:, :k], s[:k], vh[:k]


RIVALS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]] = {
    "ours": linalg.svd,
    "float32": lambda weight, k: linalg.svd(weight, k, torch.float32),
    "lapack64": lambda weight, k: lapack(weight, k, torch.float64),
    "lapack32": lambda weight, k: lapack(weight, k, torch.float32),
    "lowrank": lowrank,
    "gesdd": gesdd,
}


def draw(m: int, n: int, spectrum: str) -> Tensor:
    """A weight (m, n) in float32."""
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    if spectrum == "gauss":
        return weight
    left, right = (torch.linalg.qr(w)[0] for w in (weight[:, : min(m, n)], weight[: min(m, n)].T))
    return left * torch.arange(1, min(m, n) + 1).pow(-0.5) @ right.T


def compare(weight: Tensor, k: int, names: list[str], rounds: int) -> dict[str, tuple[float, float, float]]:
    """CPU seconds, their ratio to ours and the error ratio of every rival."""
    spent, errors = {name: [] for name in names}, {}
    wide = (weight if len(weight) <= weight.shape[1] else weight.T).double()
    least = torch.linalg.eigvalsh(wide @ wide.T)[:-k].clamp(min=0).sum().sqrt()
    for _ in range(rounds):
        for name in names:
            start = time.process_time()
            u, s, vh = RIVALS[name](weight, k)
            spent[name].append(time.process_time() - start)
            errors[name] = float((weight.double() - u.double() * s.double() @ vh.double()).norm() / least)
    ours = spent["ours"]
    return {
        name: (median(took), median(t / o for t, o in zip(took, ours, strict=True)), errors[name])
        for name, took in spent.items()
    }


def main() -> None:
    """Prints a table for every shape and rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--ranks", nargs="+", default=("16", "half"), help="numbers, or half: min(m, n) / 2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--spectrum", choices=("gauss", "decaying"), default="gauss")
    parser.add_argument("--rivals", nargs="+", choices=tuple(RIVALS)[1:], default=("float32", "lapack64", "lapack32"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for shape in args.shapes:
        m, n = map(int, shape.split("x"))
        weight = draw(m, n, args.spectrum)
        for rank in args.ranks:
            k = min(m, n) // 2 if rank == "half" else int(rank)
            print(f"\n{shape}, rank {k}, {args.spectrum}: CPU seconds, time / ours, error / least", flush=True)
            for name, (took, ratio, error) in compare(weight, k, ["ours", *args.rivals], args.rounds).items():
                print(f"  {name:9s} {took:8.3f}  {ratio:6.2f}  {error:.6f}", flush=True)


if __name__ == "__main__":
    main()
