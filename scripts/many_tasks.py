"""Many tasks on one compressed base: runs it, puts all adapters on one live model, and compares bytes.

    python scripts/many_tasks.py [--out outputs/many_tasks] [--to experiments/adapters]

CRISP compresses DINOv2 ViT-S/14 to half once. Eight offline tasks adapt that base, a run each; finished runs are kept.
Then one model in memory holds all eight adapters. The script asserts that each has, on its test set, the very scores of
its own run, and that its outputs equal those of the run's checkpoint bit for bit. It writes tasks.csv, totals.csv and
bytes.svg, and the tables of README.md.
"""

import argparse
import csv
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import nn

import recombine
from recombine import data, disable_adapters, load_adapter, mixed, models, save_adapter, set_adapter
from recombine.core.budget import Budget
from recombine.report.plot_drawing import COLOURS, STYLE
from recombine.runner import ranks
from recombine.runner.config import resolve
from recombine.stages.adapt import test
from recombine.stages.context import RunContext
from recombine.training import objectives
from recombine.training.lit import LitRecombine

TASKS = (
    "emoji",
    "openclipart",
    "fashion_mnist",
    "dsprites_loc",
    "dsprites_ori",
    "clevr_count",
    "clevr_dist",
    "snorb_elev",
)
COMMON = ["model=dinov2_s14", "model.image_size=42", "data=offline", "data.limit=150", "data.batch_size=8"]
COMMON += ["trainer=cpu", "trainer.progress=false"]
CRISP = ["method=crisp", "method.group_size=1", "method.chunk=64", "method.fit=aware"]
BASE = [
    *CRISP,
    "stage=compress",
    "budget=retained_50",
    "data.task=openclipart",
    "stage.distil.epochs=4",
    "trainer.epochs=3",
]
ADAPT = ["method=crisp", "method.lr=1e-3", "trainer.epochs=2", "probe=false"]
MARK = "<!-- made by scripts/many_tasks.py -->"
MB = 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/many_tasks"))
    parser.add_argument("--to", type=Path, default=Path("experiments/adapters"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in the runs, so that sums are added in the same order
    run(args.out / "base", BASE)
    for task in TASKS:
        run(args.out / task, [*ADAPT, f"base={args.out / 'base'}", f"data.task={task}"])
    model = recombine.load(args.out / "base" / "best.safetensors").eval()
    for task in TASKS:
        load_adapter(model, args.out / task / "adapter.safetensors", task)
    rows = [tested(model, task, args.out / task) for task in TASKS]
    swap, difference = milliseconds(model), mixed_difference(model)
    totals = bytes_of_all(model, args.out)
    args.to.mkdir(parents=True, exist_ok=True)
    write_csv(args.to / "tasks.csv", rows)
    write_csv(args.to / "totals.csv", totals)
    draw(args.to / "bytes.svg", totals)
    write_tables(args.to / "README.md", rows, totals, swap, difference)
    print((args.to / "README.md").read_text().partition(MARK)[2])


def run(folder: Path, overrides: Sequence[str]) -> None:
    """One run, as `python run.py` with these words does it."""
    ranks.main(composed(overrides), folder)


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration of a run."""
    with initialize_config_dir(str(models.CONF.parent), version_base="1.3"):
        return compose("config", [*COMMON, *overrides])


def tested(model: nn.Module, task: str, folder: Path) -> dict:
    """The scores of a task with its adapter on, which are those of its own run."""
    result = json.loads((folder / "result.json").read_text())
    spec = resolve(composed([*ADAPT, f"data.task={task}"]))
    module = data.build(**spec.data)
    module.attach_model(**models.for_data(model.recombine_source))
    module.prepare_data()
    module.setup()
    set_adapter(model, task)
    context = RunContext(spec.settings, folder, folder, model, spec.method, Budget(), module)
    scores = test(context, LitRecombine(model, spec.method, context.objective()))
    assert scores == result["test"], (task, scores, result["test"])
    alone = recombine.load(folder / "best.safetensors").eval()
    images, _ = objectives.fetch(module, module.test, list(range(16)), torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(model.eval()(images), alone(images)), task
    return {
        "task": task,
        "classes": recombine.adapters(model)[task].classes,
        "its own run": round(100 * result["test"]["acc"], 1),
        "swapped in": round(100 * scores["acc"], 1),
        "trained": recombine.adapters(model)[task].parameters,
        "bytes": (folder / "adapter.safetensors").stat().st_size,
    }


def milliseconds(model: nn.Module, times: int = 400) -> float:
    """The median time to put another adapter on."""
    order, took = random.Random(0).choices(TASKS, k=times), []
    for before, task in zip(order, order[1:], strict=False):
        set_adapter(model, before)
        start = time.perf_counter()
        set_adapter(model, task)
        took += [1000 * (time.perf_counter() - start)] * (task != before)
    return statistics.median(took)


@torch.no_grad()
def mixed_difference(model: nn.Module) -> float:
    """The largest difference between outputs of a batch of all tasks and of each adapter alone, over the largest."""
    images = torch.randn(len(TASKS), 3, 42, 42, generator=torch.Generator().manual_seed(0))
    with mixed(model.eval(), TASKS):
        together = model(images)
    worst = []
    for i, task in enumerate(TASKS):
        alone = set_adapter(model, task)(images[i : i + 1])[0]
        worst.append(((together[i, : len(alone)] - alone).abs().max() / alone.abs().max()).item())
    return max(worst)


def bytes_of_all(model: nn.Module, out: Path) -> list[dict]:
    """Bytes of files for 1 to 8 tasks, in each way to keep them."""
    method = resolve(composed(["method=lora", "method.rank=8"])).method
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "file"
        ours = [recombine.save(disable_adapters(model), file, whole=True).stat().st_size]
        ours += [(out / task / "adapter.safetensors").stat().st_size for task in TASKS]
        merged, alone, lora = [0], [0], [size(models.build(**model.recombine_source | {"num_classes": 0}), file)]
        for task in TASKS:
            adapted = recombine.load(out / task / "best.safetensors")
            alone.append(recombine.save(adapted, file, whole=True).stat().st_size)
            merged.append(size(recombine.merge(adapted), file))
            classes = recombine.adapters(model)[task].classes
            dense = models.build(**model.recombine_source | {"num_classes": classes})
            lora.append(save_adapter(recombine.apply(dense, method), file).stat().st_size)
    ways = {
        "merged models": merged,
        "compressed models": alone,
        "dense base + LoRA r=8": lora,
        "CRISP base + adapters": ours,
    }
    return [{"way": way, **{f"{n} tasks": sum(sizes[: n + 1]) for n in range(1, 9)}} for way, sizes in ways.items()]


def size(model: nn.Module, file: Path) -> int:
    """Bytes of a plain model's file."""
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    return file.stat().st_size


def draw(path: Path, totals: Iterable[dict]) -> None:
    """Bytes against the number of tasks."""
    with plt.rc_context(STYLE | {"svg.hashsalt": "adapters"}):
        figure, ax = plt.subplots(figsize=(6.2, 3.6))
        for i, row in enumerate(totals):
            sizes = [row[f"{n} tasks"] / MB for n in range(1, 9)]
            ax.plot(range(1, 9), sizes, "o-", color=COLOURS[i], markersize=4)
            label = f"{row['way']}: {sizes[-1]:.0f} MB"
            ax.annotate(label, (8, sizes[-1]), (6, 0), textcoords="offset points", va="center")
        ax.set_xlim(0.8, 11.4)
        ax.set_yscale("log")
        ax.set_xticks(range(1, 9))
        ax.set_yticks([50, 100, 200, 400, 800], ["50", "100", "200", "400", "800"])
        ax.minorticks_off()
        ax.set_xlabel("tasks")
        ax.set_ylabel("bytes of all files (MB)")
        figure.savefig(path, facecolor="white", metadata={"Date": None})


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_tables(path: Path, rows: Sequence[dict], totals: Sequence[dict], swap: float, difference: float) -> None:
    """Replaces what follows the mark in the README."""
    shown = [f"{n} tasks" for n in (1, 4, 8)]
    mb = [{"way": row["way"], **{f"{key} (MB)": f"{row[key] / MB:.1f}" for key in shown}} for row in totals]
    takes = ", ".join(f"{row['8 tasks'] / MB:.0f} MB as {row['way']}" for row in totals)
    said = [
        f"Swapping takes {swap:.2g} ms (median of 400, one thread of a busy machine). In a batch of all eight tasks "
        f"each sample's outputs differ from those of its adapter alone by at most {difference:.1g} of the largest.",
        f"![Files of eight tasks take {takes}.](bytes.svg)",
    ]
    text = path.read_text().partition(MARK)[0] if path.is_file() else ""
    parts = [text.rstrip(), MARK, table(rows), *said, table(mb)]
    path.write_text("\n\n".join(parts).lstrip() + "\n")


def table(rows: Sequence[dict]) -> str:
    """Rows as markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
