"""Training step and inference of every method against peft LoRA (training) and the dense model (inference).

    python scripts/bench_step.py [--size 70] [--batch 32] [--rounds 5]

All rivals live in one process and take turns; printed are ratios of medians (more than 1: faster than the reference).
"""

import argparse
import copy
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recombine
from recombine import models
from recombine.stages.profile import timed, turns

RIVALS = {
    "lora r=8 (peft)": recombine.Peft(targets=("q", "k", "v"), options={"lora_alpha": 16}),
    "lora r=8 all (peft)": recombine.Peft(targets=("q", "k", "v", "o", "up", "down"), options={"lora_alpha": 16}),
    "full": recombine.Full(),
    "crisp exact (64, 32)": recombine.Crisp(),
    "crisp exact (32, 32)": recombine.Crisp(group_size=1),
    "crisp 50% (32, 64)": recombine.Crisp(chunk=64, basis_rank=32),
    "crisp 25% (16, 64)": recombine.Crisp(chunk=64, basis_rank=16),
    "cersa 95% qkv": recombine.Cersa(),
    "crisp 50% alone (61, 128)": recombine.Crisp(group_size=1, chunk=128, basis_rank=61),
    "svd 50%": recombine.Svd(targets=("qkv", "o", "up", "down")),
    "svd 25%": recombine.Svd(targets=("qkv", "o", "up", "down"), ratio=0.25),
}


def main() -> None:
    args = arguments(__doc__).parse_args()
    dense, x, y = setting(args)
    rivals = {"dense": dense} | {
        name: recombine.apply(copy.deepcopy(dense), copy.copy(m)).to(x.device) for name, m in RIVALS.items()
    }
    train, infer = medians(rivals, x, y, args.rounds)
    print(f"{'':28}{'training / lora':>16}{'inference / dense':>20}")
    for name in rivals:
        ratios = train["lora r=8 (peft)"] / train[name], infer["dense"] / infer[name]
        print(f"{name:28}{ratios[0]:>16.2f}{ratios[1]:>20.2f}")


def arguments(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--size", type=int, default=70)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--packaged", action="store_true", help="DINOv2's packaged weights, not random ones")
    return parser


def setting(args: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """The dense model, a batch (B, 3, S, S) and its labels; says what they are."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    weights = {"pretrained": True, "tag": "packaged"} if args.packaged else {"pretrained": False}
    arch = {"arch": args.model, "image_size": args.size, "num_classes": 16} | weights
    dense = models.build("dinov2_s14" if args.packaged else "bench", **arch).to(device)
    print(f"{args.model} at {args.size} px, batch {args.batch}, {device}, {torch.get_num_threads()} threads")
    x = torch.randn(args.batch, 3, args.size, args.size, device=device)
    return dense, x, torch.randint(16, (args.batch,), device=device)


def medians(rivals: dict[str, nn.Module], x: Tensor, y: Tensor, rounds: int) -> tuple[dict, dict]:
    """Seconds of a training step and of a forward in eval mode, medians over the rounds in which rivals take turns."""
    works = {}
    for name, model in rivals.items():
        works |= {(name, step): partial(step, model, x, y), (name, forward): partial(forward, model, x)}
    seconds = turns(works, rounds)
    return tuple({name: statistics.median(seconds[name, kind]) for name in rivals} for kind in (step, forward))


def step(model: nn.Module, x: Tensor, y: Tensor) -> float:
    def work():
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()

    model.train()
    return timed(work, x.device)


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> float:
    model.eval()(x)  # builds what eval keeps
    return timed(partial(model, x), x.device)


if __name__ == "__main__":
    main()
