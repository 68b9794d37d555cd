"""Training step and inference of every method against peft LoRA (training) and the dense model (inference).

    python scripts/bench_step.py [--size 70] [--batch 32] [--rounds 5]

All rivals live in one process and take turns; printed are ratios of medians (more than 1: faster than the reference).
"""

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F

import recombine
from recombine import models

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--size", type=int, default=70)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    arch = {"arch": args.model, "pretrained": False, "image_size": args.size, "num_classes": 16}
    dense = models.build("bench", **arch).to(device)
    rivals = {"dense": dense} | {
        name: recombine.apply(copy.deepcopy(dense), copy.copy(m)).to(device) for name, m in RIVALS.items()
    }
    x = torch.randn(args.batch, 3, args.size, args.size, device=device)
    y = torch.randint(16, (args.batch,), device=device)
    train, infer = ({name: [] for name in rivals} for _ in range(2))
    for turn in range(args.rounds + 1):
        for name, model in rivals.items():
            took = step(model.train(), x, y), forward(model.eval(), x)
            if turn:  # the first round warms up
                train[name].append(took[0])
                infer[name].append(took[1])
    reference = statistics.median(train["lora r=8 (peft)"]), statistics.median(infer["dense"])
    print(f"{args.model} at {args.size} px, batch {args.batch}, {device}, {torch.get_num_threads()} threads")
    print(f"{'':28}{'training / lora':>16}{'inference / dense':>20}")
    for name in rivals:
        ratios = reference[0] / statistics.median(train[name]), reference[1] / statistics.median(infer[name])
        print(f"{name:28}{ratios[0]:>16.2f}{ratios[1]:>20.2f}")


def step(model, x, y) -> float:
    start = time.perf_counter()
    F.cross_entropy(model(x), y).backward()
    synchronize(x)
    model.zero_grad()
    return time.perf_counter() - start


@torch.no_grad()
def forward(model, x) -> float:
    model(x)  # builds what eval keeps
    start = time.perf_counter()
    model(x)
    synchronize(x)
    return time.perf_counter() - start


def synchronize(x) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
