"""Peak resident memory and seconds of recombining one model with one method, each in a fresh process.

    python scripts/bench_memory.py run smollm2_135m svd crisp svd_llm jactus
    python scripts/bench_memory.py apply llama32_1b svd_llm jactus --memory 6gb
    python scripts/bench_memory.py apply llama2_7b svd_llm jactus --memory 8gb --samples 4 --folder WEIGHTS

run: run.py with stage=retrofit and the packaged weights. apply: the library with random weights, in memory or, with
--folder, in files that are mapped and that are written there once. Both keep 70 % of the weights and calibrate on 16
windows of 128 tokens. The peak is what the kernel says of the child when it has ended: weights, libraries, pages of
files and everything else.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import recombine
from recombine import models
from recombine.core.budget import Budget
from recombine.core.rewrite import apply
from recombine.core.sites import block_of
from recombine.methods.from_config import from_name
from recombine.models import roles
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
    parser.add_argument("--folder", type=Path, help="apply: of the weights, in files")
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
    known |= {"pretrained": False, "gradient_checkpointing": False} | fewer
    if args.folder is not None:
        if not (args.folder / "config.json").is_file():
            write_random(known, args.folder)
        known |= {"pretrained": True, "checkpoint": args.folder}
    model = models.build(**known)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(model.config.vocab_size, (args.samples, args.tokens), generator=generator)

    def losses():
        for batch in windows.split(BATCH):
            yield model(input_ids=batch, labels=batch).loss

    method = from_name(args.methods[0], {}, "method")
    apply(model, method, Budget.parse(args.budget), losses, memory=args.memory)
    print(recombine.count(model))


def write_random(known: dict, folder: Path) -> None:
    """Writes random weights as transformers does, one block in memory at a time."""
    with torch.device("meta"):
        model = models.build(**known)
    blocks = roles.block_names(model)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, p in model.named_parameters():
        index = block_of(name, blocks)
        parts.setdefault("rest" if index is None else blocks[index], {})[name] = p
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    for block, tensors in parts.items():
        drawn = {n: torch.ones(p.shape) if p.ndim < 2 else torch.randn(p.shape) * 0.02 for n, p in tensors.items()}
        save_file(
            {n: t.to(tensors[n].dtype) for n, t in drawn.items()}, folder / f"{block}.safetensors", {"format": "pt"}
        )
        index |= dict.fromkeys(tensors, f"{block}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    model.config.save_pretrained(folder)


if __name__ == "__main__":
    main()
