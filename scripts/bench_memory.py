"""Peak resident memory and CPU seconds of recombining one model with one method, each in a fresh process.

    python scripts/bench_memory.py run smollm2_135m svd crisp svd_llm jactus
    python scripts/bench_memory.py apply llama32_1b svd_llm jactus --memory 6gb
    python scripts/bench_memory.py apply llama2_7b svd_llm jactus --memory 8gb --samples 4 --folder WEIGHTS
    python scripts/bench_memory.py apply vit_l16 jactus cersa --memory 1gb

run: run.py with stage=retrofit and the packaged weights of a language model. apply: the library with random weights, in
memory or, with --folder, in files that are mapped and that are written there once. Both keep 70 % of the weights and
calibrate on 16 random samples: windows of 128 tokens, or pictures. The loss is the language model's own, or that of a
classifier. The peak is what the kernel says of the child when it has ended: weights, libraries, pages of files and
everything else. The ratio is the peak over the model's bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import recombine
from recombine import models
from recombine.core.budget import Budget
from recombine.core.calibration import Losses
from recombine.core.rewrite import apply
from recombine.core.sites import block_of
from recombine.methods.from_config import from_name
from recombine.models import roles
from recombine.models.rebuild import parameters_on_meta
from recombine.runtime import conf
from recombine.training import objectives

ROOT = Path(__file__).parents[1]
CLASSES = 100
POSITIONAL = ("how", "model", "methods")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=("run", "apply", "child"))
    parser.add_argument("model")
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--memory", default="auto")
    parser.add_argument("--budget", default="retained_70")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="samples at once")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="apply: of the weights, in files")
    parser.add_argument("--blocks", type=int, help="apply: as many blocks instead of all; not of Swin")
    args = parser.parse_args()
    if args.how == "child":
        recombined(args)
        return
    size = weights(args)
    for method in args.methods:
        if (found := measured(command(args, method))) is None:
            continue
        peak, seconds = found
        words = f"{size / 2**30:8.2f} GiB{peak / 2**30:8.2f} GiB{peak / size:8.2f} x{seconds:8.0f} s"
        print(f"{args.model:16}{method:14}{args.memory:>8}{words}", flush=True)


def command(args: argparse.Namespace, method: str) -> list[str]:
    """What a child runs."""
    if args.how == "apply":
        options = [f"--{key}={value}" for key, value in vars(args).items() if key not in POSITIONAL and value]
        return [sys.executable, __file__, "child", args.model, method, *options]
    data = ["data=text", f"data.max_length={args.tokens}", f"calibration.samples={args.samples}"]
    more = [f"calibration.batch_size={args.batch}", f"calibration.memory={args.memory}", f"budget={args.budget}"]
    keys = [f"model={args.model}", f"method={method}", "stage=retrofit", *data, *more]
    return [sys.executable, str(ROOT / "run.py"), *keys, f"hydra.run.dir={tempfile.mkdtemp(prefix='memory-')}"]


def measured(words: list[str]) -> tuple[int, float] | None:
    """Peak bytes and CPU seconds of a command; None where it fails, and its last line is shown."""
    child = subprocess.Popen(
        words, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        print(f"failed: {(said.decode().strip() or f'status {status}').splitlines()[-1]}", flush=True)
        return None
    scale = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * scale, usage.ru_utime + usage.ru_stime


def recombined(args: argparse.Namespace) -> None:
    """The child: a model with random weights, rewritten with random samples."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    known = arguments(args)
    if args.folder is not None:
        if not (args.folder / "config.json").is_file():
            write_random(known, args.folder)
        known |= {"pretrained": True, "checkpoint": args.folder}
    model = models.build(**known)
    method = from_name(args.methods[0], {}, "method")
    apply(model, method, Budget.parse(args.budget), losses_of(model, args), memory=args.memory)
    print(recombine.count(model))


def arguments(args: argparse.Namespace) -> dict:
    """What builds the model without weights of its own."""
    known = dict(conf.load("model", args.model)) | {"pretrained": False}
    known.pop("tag", None)
    if args.blocks:
        known["depth" if known.get("library", "timm") == "timm" else "num_hidden_layers"] = args.blocks
    lm = models.objective(known) == "lm"
    return known | ({"gradient_checkpointing": False} if lm else {"num_classes": CLASSES})


def weights(args: argparse.Namespace) -> int:
    """Bytes of the model's parameters."""
    with parameters_on_meta():
        model = models.build(**arguments(args))
    return sum(p.numel() * p.element_size() for p in model.parameters())


def losses_of(model: nn.Module, args: argparse.Namespace) -> Losses:
    """The loss of each batch of random samples, the same at every call."""
    source, generator = model.recombine_source, torch.Generator().manual_seed(0)
    if models.modality(source) == "vision":
        samples = torch.randn(args.samples, 3, source["image_size"], source["image_size"], generator=generator)
    else:
        samples = torch.randint(model.config.vocab_size, (args.samples, args.tokens), generator=generator)
    labels = torch.randint(CLASSES, (args.samples,), generator=generator)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if models.objective(source) == "lm":
            return model(input_ids=x, labels=x).loss
        batch = (x, y) if x.is_floating_point() else {"input_ids": x, "attention_mask": torch.ones_like(x)}
        return F.cross_entropy(objectives.call(model, batch), y)

    return lambda: (loss(*batch) for batch in zip(samples.split(args.batch), labels.split(args.batch), strict=True))


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
