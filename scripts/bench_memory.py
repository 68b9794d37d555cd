"""Peak resident memory and seconds of recombining one model with one method, each in a fresh process.

    python scripts/bench_memory.py run smollm2_135m svd crisp svd_llm jactus
    python scripts/bench_memory.py apply llama32_1b svd_llm jactus --memory 6gb

run: run.py with stage=retrofit and the packaged weights. apply: the library with random weights. Both keep 70 % of the
weights and calibrate on 16 windows of 128 tokens. The peak is what the kernel says of the child when it has ended:
weights, libraries and everything else.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import recombine
from recombine import models
from recombine.core.budget import Budget
from recombine.core.rewrite import apply
from recombine.methods.from_config import from_name
from recombine.runtime import conf

ROOT = Path(__file__).parents[1]
BATCH = 4  # windows at once
POSITIONAL = ("how", "model", "methods")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=("run", "apply", "child"))
    parser.add_argument("model")
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--memory", default="auto")
    parser.add_argument("--budget", default="retained_70")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--blocks", type=int, help="apply: as many blocks instead of all")
    args = parser.parse_args()
    if args.how == "child":
        recombined(args)
        return
    for method in args.methods:
        peak, seconds = measured(command(args, method))
        print(f"{args.model:16}{method:14}{args.memory:>8}{peak / 2**30:8.2f} GiB{seconds:8.0f} s", flush=True)


def command(args: argparse.Namespace, method: str) -> list[str]:
    """What a child runs."""
    if args.how == "apply":
        options = [f"--{key}={value}" for key, value in vars(args).items() if key not in POSITIONAL and value]
        return [sys.executable, __file__, "child", args.model, method, *options]
    data = ["data=text", f"data.max_length={args.tokens}", f"calibration.samples={args.samples}"]
    more = [f"calibration.batch_size={BATCH}", f"calibration.memory={args.memory}", f"budget={args.budget}"]
    keys = [f"model={args.model}", f"method={method}", "stage=retrofit", *data, *more]
    return [sys.executable, str(ROOT / "run.py"), *keys, f"hydra.run.dir={tempfile.mkdtemp(prefix='memory-')}"]


def measured(words: list[str]) -> tuple[int, float]:
    """Peak bytes and seconds of a command; its last lines are shown where it fails."""
    start = time.perf_counter()
    child = subprocess.Popen(
        words, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        print(said.decode()[-2000:])
    scale = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * scale, time.perf_counter() - start


def recombined(args: argparse.Namespace) -> None:
    """The child: a language model with random weights, rewritten with random windows."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    fewer = {"num_hidden_layers": args.blocks} if args.blocks else {}
    known = {key: value for key, value in conf.load("model", args.model).items() if key != "tag"}
    model = models.build(**known | {"pretrained": False, "gradient_checkpointing": False} | fewer)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(model.config.vocab_size, (args.samples, args.tokens), generator=generator)

    def losses():
        for batch in windows.split(BATCH):
            yield model(input_ids=batch, labels=batch).loss

    method = from_name(args.methods[0], {}, "method")
    apply(model, method, Budget.parse(args.budget), losses, memory=args.memory)
    print(recombine.count(model))


if __name__ == "__main__":
    main()
