"""What a GPU gives, beside the papers: the gpu tests, CRISP Tab. 5, CERSA Fig. 9 and Tab. 14, a row of each table.

    python scripts/gpu_report.py              on this machine's GPU: experiments/gpu/<device>.md, hours
    python scripts/gpu_report.py --dry        on a CPU, with tiny models: that all of it runs; outputs/gpu/dry.md

Every run is made in float32 and in bfloat16. What `stage=plan` foresees of its peak stands beside the peak. A run that
is there already is not made again, so that the same command goes on. What fails is named in the report, and the exit
code is 1.
"""

import argparse
import contextlib
import csv
import gc
import json
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402

import recombine  # noqa: E402, F401  before timm and transformers: recombine/runtime/torchvision_guard.py
from recombine import results  # noqa: E402
from recombine.core.account import MIB  # noqa: E402
from recombine.errors import one_line  # noqa: E402
from recombine.runner import grid, ranks  # noqa: E402
from recombine.runner.plan import Plan  # noqa: E402
from recombine.runner.plan_devices import find  # noqa: E402
from recombine.runner.plan_table import planned  # noqa: E402
from recombine.runtime.conf import CONF  # noqa: E402
from recombine.runtime.environment import environment  # noqa: E402
from scripts.gpu_tables import beside, gigabytes, markdown, number, slug  # noqa: E402

PRECISIONS = ("32-true", "bf16-mixed")
TINY = ["model=tiny_vit", "data=offline", "model.image_size=32", "data.limit=8", "data.batch_size=4"]
DTD = 15 * 3760  # pictures: 15 epochs of its 1,880 to train and 1,880 to validate, as CERSA Fig. 9 has it
SCALE_MODELS = [
    *("crisp_tab01", "crisp_tab02", "crisp_tab04", "crisp_tab08", "crisp_tab09", "jactus_vision", "llama"),
    *(f"cersa_tab{table}" for table in ("02", "03", "04_10", "05", "06", "07_09", "08", "15", "16")),
]
NOT_RUN = (
    "Nobody has run this report on a GPU before: what the first one finds wrong is a fault of ours. Several GPUs "
    "(NCCL) are tried by the gpu tests where there are two; several machines are not."
)


class Machine:
    """Where the runs are made, and what went wrong there. dry: a CPU and tiny models."""

    def __init__(self, dry: bool, out: Path):
        self.dry, self.out, self.failed = dry, out, []
        self.name = "dry" if dry else torch.cuda.get_device_name().replace(" ", "_").replace("/", "_")
        self.accelerator = "cpu" if dry else "cuda"

    def run(self, what: str, overrides: list[str], precision: str) -> dict | None:
        """The result of one run; None: it failed.

        It has `peak_mib` of its process's memory on the GPU, and `plan_mib`, what a plan foresees of that.
        """
        folder = self.out / self.name / what / precision
        words = [*overrides, "trainer.progress=false", f"trainer.precision={precision}"]
        words += [f"trainer.accelerator={self.accelerator}", "logger=none"]
        folder.mkdir(parents=True, exist_ok=True)
        if not self.dry:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = compose("config", words)
            expected = foreseen(planned(cfg, find("here", self.accelerator, timed=False)))
            with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log):
                ranks.main(cfg, folder)
            result = results.read(folder / "result.json")
        except Exception as error:
            (folder / "trace.txt").write_text(traceback.format_exc())
            self.failed.append(f"{what}, {precision}: {one_line(error)}")
            return None
        kept = folder / "peak.json"
        if not self.dry and not kept.is_file():
            kept.write_text(json.dumps(torch.cuda.max_memory_allocated() / MIB))
        return result | {"plan_mib": expected, "peak_mib": json.loads(kept.read_text()) if kept.is_file() else None}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="a CPU and tiny models")
    parser.add_argument("--out", type=Path, default=None, help="folder of the runs; default outputs/gpu")
    parser.add_argument("--skip", nargs="*", default=[], choices=[*PARTS], help="parts to leave out")
    args = parser.parse_args(arguments)
    if not args.dry and not torch.cuda.is_available():
        print("gpu_report.py: torch sees no GPU; say --dry to try it on a CPU", file=sys.stderr)
        return 2
    machine = Machine(args.dry, args.out or ROOT / "outputs" / "gpu")
    path = machine.out / "dry.md" if args.dry else ROOT / "experiments" / "gpu" / f"{machine.name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {machine.name}", "", *about(machine), ""]
    for name, part in PARTS.items():
        if name not in args.skip:
            lines += [*part(machine), ""]
            path.write_text("\n".join(lines))  # as far as it got
    lines += [f"Failed: {len(machine.failed)}.", *(f"- {what}" for what in machine.failed)]
    path.write_text("\n".join(lines) + "\n")
    print(f"{path}: {len(machine.failed)} failed")
    return 1 if machine.failed else 0


def about(machine: Machine) -> list[str]:
    """What the numbers were measured on."""
    found = environment()
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items() if value)
    if machine.dry:
        nothing = "A dry run: tiny models on a CPU. Its numbers say nothing."
        return [nothing, "", f"Commit {found['commit']}, {versions}."]
    gpu = torch.cuda.get_device_properties(0)
    size = f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return [f"{size}. Commit {found['commit']}, {versions}.", "", NOT_RUN]


def gpu_tests(machine: Machine) -> list[str]:
    """The tests that are marked gpu."""
    chosen = ["tests/gpu", "-k", "cpu"] if machine.dry else ["-m", "gpu"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *chosen], cwd=ROOT, capture_output=True, text=True)
    said = done.stdout.strip().splitlines()
    if done.returncode:
        machine.failed.append(f"the gpu tests: exit code {done.returncode}")
    return ["## The gpu tests", "", *(line for line in said if line.startswith("FAILED")), said[-1] if said else "none"]


def crisp_tab05(machine: Machine) -> list[str]:
    """CRISP Tab. 5: the speed of a step and of a forward, ViT-B/16."""
    metrics = {
        "train_samples_s": "train throughput",
        "infer_samples_s": "inference throughput",
        "latency_ms": "latency",
    }
    wanted, rows = paper("crisp/tab05_efficiency_l40s.csv"), []
    for label, overrides in labelled("crisp/tab05", machine):
        for precision in PRECISIONS:
            small = [*TINY, "stage.rounds=1"] if machine.dry else []
            if (result := machine.run(f"crisp_tab05/{slug(label)}", [*overrides, *small], precision)) is None:
                continue
            speed = result["profile"]
            pairs = [(speed[key], wanted.get((label, metric))) for key, metric in metrics.items()]
            pairs.append((gigabytes(speed["peak_mib"]), wanted.get((label, "peak memory"))))
            pairs.append((gigabytes(result["plan_mib"]), None))
            lora = wanted.get(("LoRA", "train throughput"))
            pairs.append((speed["ratio"]["train"], (pairs[0][1] or float("nan")) / lora if lora else None))
            rows.append([label, precision, *(beside(*pair) for pair in pairs)])
    head = ["method", "precision", "training /s", "inference /s", "latency ms", "peak GB", "plan GB", "training / LoRA"]
    note = "ViT-B/16, batches of 64; in brackets the paper's, on an L40S in an unknown precision and batch size."
    return ["## CRISP Tab. 5", "", note, "", *markdown(head, rows)]


def cersa_large(machine: Machine) -> list[str]:
    """CERSA Fig. 9 and Tab. 14: the speed and the memory of ViT-L/16."""
    wanted, rows = paper("cersa/tab14_memory_vitl.csv"), []
    common = ["model=vit_l16", "stage=profile", "data=offline", "data.limit=64", "data.batch_size=32"]
    common += ["stage.rounds=10", "stage.reference.name=lora", "+stage.reference.rank=32"]
    for label, overrides in labelled("cersa/tab14", machine):
        for precision in PRECISIONS:
            small = [*TINY, "stage.rounds=1", "model.pretrained=false"] if machine.dry else []
            if (
                result := machine.run(f"cersa_large/{slug(label)}", [*common, *overrides[1:], *small], precision)
            ) is None:
                continue
            speed, counted = result["profile"], result["account"]["memory_mib"]
            row = label.replace("CERSA α = β = ", "CERSA a=b=")
            minutes = DTD / speed["train_samples_s"] / 60
            peak = speed["peak_mib"]
            rows.append([label, precision, number(speed["train_samples_s"]), number(minutes)])
            rows[-1] += [beside(counted, wanted.get((row, "total memory"))), number(peak), number(result["plan_mib"])]
            rows[-1] += [number(peak and peak - counted)]
    head = ["method", "precision", "training /s", "minutes of Fig. 9", "account MiB", "peak MiB", "plan MiB"]
    head.append("activations MiB")
    note = (
        "ViT-L/16, batches of 32. Fig. 9 prints no numbers; its minutes are computed from the speed. In brackets: Tab. "
        "14. The account has weights, gradients and moments; what the peak has beyond is activations."
    )
    return ["## CERSA Fig. 9 and Tab. 14", "", note, "", *markdown(head, rows)]


def rows_in_small(machine: Machine) -> list[str]:
    """One row of each scale model, beside what a CPU gave."""
    rows = []
    for name in ["crisp_tab01", "cersa_tab07_09"] if machine.dry else SCALE_MODELS:
        cell = grid.load(f"offline/{name}").cells[0]
        expected = committed(name, cell)
        for precision in PRECISIONS:
            small = [*TINY, "trainer.epochs=1"] if machine.dry else []
            words = [f"experiment=offline/{name}", *cell.overrides, *small]
            if (result := machine.run(f"rows/{name}", words, precision)) is None:
                continue
            score, metric = result["test"].get(result["metric"]), result["metric"]
            row = [name, " ".join(cell.overrides), precision, f"{metric} {beside(score, expected)}"]
            counted = result["account"]["memory_mib"]
            sizes = counted, result["peak_mib"], result["plan_mib"]
            rows.append([*row, number(result["seconds"]["total"]), *map(number, sizes)])
    head = ["table", "row", "precision", "test score", "seconds", "account MiB", "peak MiB", "plan MiB"]
    return ["## A row of each table in small", "", "In brackets: on a CPU, in float32.", "", *markdown(head, rows)]


PARTS = {"tests": gpu_tests, "crisp": crisp_tab05, "cersa": cersa_large, "rows": rows_in_small}


def foreseen(found: Plan) -> float:
    """MiB that a plan has for what is measured: of a profile, its timed steps; else the whole run."""
    timed = [phase.bytes for phase in found.told.phases if phase.name == "time"]
    return max(timed or [found.peak]) / MIB


def labelled(experiment: str, machine: Machine) -> Iterator[tuple[str, list[str]]]:
    """(label of the method, overrides) of an experiment's cells; in a dry run of two."""
    cells = [cell for cell in grid.load(experiment).cells if str(cell.labels.get("seed", 0)) == "0"]
    for cell in [cells[0], cells[-1]] if machine.dry else cells:
        yield cell.labels["method"], [f"experiment={experiment}", *cell.overrides]


def paper(file: str) -> Mapping[tuple[str, str], float]:
    """(row, metric) -> the paper's number."""
    with (ROOT / "experiments" / file).open() as lines:
        return {(row["row"], row["metric"]): float(row["value"]) for row in csv.DictReader(lines) if row["value"]}


def committed(name: str, cell: grid.Cell) -> float | None:
    """The test score that the committed evidence has for a cell; None: it has none."""
    path = ROOT / "experiments" / "offline" / name / "runs.jsonl"
    for run in map(json.loads, path.read_text().splitlines() if path.is_file() else ()):
        if sorted(run["cell"].split(",")) == sorted(word.strip("+") for word in cell.overrides):
            return run["test"].get(run["metric"])
    return None


if __name__ == "__main__":
    sys.exit(main())
