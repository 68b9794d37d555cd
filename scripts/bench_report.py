"""How long the report of 1,000 results takes, in a fresh process from its start to the printed table.

python scripts/bench_report.py [--results 1000]
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from omegaconf import OmegaConf

from recombine import report
from recombine.report import render
from recombine.runner.grid import Experiment

SCRIPT = str(Path(__file__).resolve())
ROLES = ("q", "k", "v", "o", "up", "down")


def experiment(results: int) -> Experiment:
    """Ten methods, twenty tasks, as many seeds as it takes."""
    grid = {
        "method": {f"method {i}": {"method": "cersa", "method.alpha": 0.5 + i / 20} for i in range(10)},
        "data.task": [f"task{i}" for i in range(20)],
        "seed": list(range(-(-results // 200))),
    }
    table = {
        "rows": "method",
        "columns": "data.task",
        "values": {"top-1": {"key": "test.{metric}", "scale": 100, "best": "max"}},
        "extra": {"memory (MiB)": {"key": "account.memory_mib", "best": "min"}},
        "means": {"mean": None},
    }
    return Experiment("bench", OmegaConf.create({"grid": grid, "report": table, "only": None}))


def result(random: random.Random) -> dict:
    """As large as a run's on ViT-L: 24 blocks of six layers, 100 epochs, its whole configuration."""
    shape = {"shape": [1024, 1024], "kind": "FactoredLinear"}
    return {
        "command": "python run.py experiment=bench",
        "stage": "adapt",
        "model": {"name": "vit_l16", "tag": "augreg_in21k"},
        "metric": "acc",
        "val": {"acc": random.random()},
        "test": {"acc": random.random(), "loss": random.random()},
        "account": {"trained": 10_000_000, "memory_mib": 1000 + random.random()},
        "layers": [
            {
                "name": f"blocks.{i}.{role}",
                "role": role,
                **shape,
                "rank": random.randrange(999),
                "held": random.random(),
            }
            for i in range(24)
            for role in ROLES
        ],
        "weight_error": {f"blocks.{i}.{role}": random.random() for i in range(24) for role in ROLES},
        "curves": {name: [random.random() for _ in range(100)] for name in ("train/loss", "val/loss", "val/acc")},
        "config": {f"group{i}": {f"key{j}": random.random() for j in range(10)} for i in range(12)},
        "environment": {"commit": "0" * 40, "device": "cpu", "versions": {"torch": "2.13.0"}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=int, default=1000, help="a multiple of 200")
    parser.add_argument("--print", action="store_true", help="print the table of the results in this folder")
    given = parser.parse_args()
    if given.print:
        print(render.text(report.build(experiment(given.results)).table))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        made, source = experiment(given.results), random.Random(0)
        for cell in made.cells:
            (path := made.folder / cell.folder).mkdir(parents=True)
            (path / "result.json").write_text(json.dumps(result(source), indent=1))
        size = sum(p.stat().st_size for p in Path().rglob("result.json")) / 2**20
        seconds, before = [], resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in range(3):
            start = time.perf_counter()
            command = [sys.executable, SCRIPT, "--print", "--results", str(given.results)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / len(seconds)
    print(printed)
    took = f"{min(seconds):.2f} s (best of 3), {cpu:.2f} s of it on the CPU; target 2 s"
    print(f"{len(made.cells)} results, {size:.0f} MiB of JSON: {took}")


if __name__ == "__main__":
    main()
