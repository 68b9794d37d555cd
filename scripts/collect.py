"""Groups the result.json files under some folders over their seeds, and prints a Markdown table.

python scripts/collect.py outputs/2026-11-22 [--csv results.csv]
"""

import argparse
import csv
import statistics
from pathlib import Path

from recombine import results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--csv", type=Path, help="also write one row a run")
    args = parser.parse_args()
    runs = [row(results.read(p)) for folder in args.folders for p in sorted(folder.rglob("result.json"))]
    runs = [run for run in runs if run["test"] is not None]
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(runs[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(runs)
    print("| command | seeds | test accuracy | linear probe | trained | retained | MiB to train |")
    print("|---|---|---|---|---|---|---|")
    for command in dict.fromkeys(run["command"] for run in runs):
        same = [run for run in runs if run["command"] == command]
        test = [100 * run["test"] for run in same]
        spread = f" ± {statistics.stdev(test):.1f}" if len(test) > 1 else ""
        first = same[0]
        print(
            f"| `{command}` | {len(same)} | {statistics.mean(test):.1f}{spread} | {100 * first['linear_probe']:.1f} "
            f"| {first['trained']:,} | {100 * first['retained']:.0f}% | {first['mib']:.0f} |"
        )


def row(result: dict) -> dict:
    """What the table needs of one run; trained without the head, retained of the target layers."""
    words = result["command"].removeprefix("python run.py").split()
    noise = ("seed=", "hydra.", "trainer.progress")
    own_lr = [w for w in words if w.startswith("optim.lr=") and float(w.split("=")[1]) == result["method"]["lr"]]
    account = result["account"]
    return {
        "command": " ".join(w for w in words if not w.startswith(noise) and w not in own_lr) or "(default)",
        "seed": result["seed"],
        "val": result["val"].get("acc"),
        "test": result["test"].get("acc"),
        "linear_probe": (result["linear_probe"] or {}).get("test"),
        "trained": account["trained_without_head"],
        "retained": account["retained"],
        "mib": account["memory_mib"],
        "best_epoch": result.get("best_epoch"),
        "seconds": result["seconds"]["total"],
    }


if __name__ == "__main__":
    main()
