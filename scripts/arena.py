"""LowRankArena's retention of an experiment's runs, beside the published rows: how much of the dense model they keep.

    python scripts/arena.py arena/llama31_8b
    python scripts/arena.py offline/arena

A perplexity keeps dense / compressed, a score compressed / dense. The arena takes the mean over WikiText-2, C4, the
mean of its seven choice tasks, MathQA and MMLU's mathematics (`Q. Ret.`). `of three` leaves the last two out, as our
runs do.
"""

import argparse
import csv
from collections.abc import Mapping
from pathlib import Path

from recombine.report import records
from recombine.runner import grid

PUBLISHED = Path(__file__).parents[1] / "experiments" / "arena" / "published.csv"
TEXTS = ("WT2", "C4")
SCORES = ("MCQ Avg.", "MathQA", "MMLU-M")
MODELS = {"arena/llama31_8b": "Llama-3.1-8B", "arena/qwen3_8b": "Qwen3-8B-Base"}


def retention(dense: Mapping[str, float], row: Mapping[str, float], scores: tuple[str, ...] = SCORES) -> float:
    """The mean share of the dense model's quality over two perplexities and these scores."""
    shares = [dense[key] / row[key] for key in TEXTS] + [row[key] / dense[key] for key in scores]
    return sum(shares) / len(shares)


def published(model: str) -> dict[tuple[str, str], dict[str, float]]:
    """{(keep, method): {metric: value}} of the arena's README."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    with PUBLISHED.open(newline="") as file:
        for line in csv.DictReader(file):
            if line["model"] == model:
                rows.setdefault((line["keep"], line["row"]), {})[line["metric"]] = float(line["value"])
    return rows


def measured(name: str) -> dict[tuple[str, str], dict[str, float]]:
    """The same of our runs that have a result, with `MCQ Avg.` over the experiment's own choice tasks."""
    experiment = grid.load(name)
    choices = [value["key"] for value in experiment.report["values"].values() if "/acc" in value["key"]]
    (other,) = experiment.config.analyse.elsewhere
    rows = {}
    for record in records.read(experiment).records:
        scores = [record.get(key) for key in choices]
        row = {"WT2": record.get("test.ppl"), "C4": record.get(f"elsewhere.after.{other}")}
        row["MCQ Avg."] = None if None in scores else sum(scores) / len(scores)
        if None not in row.values():
            rows[record.labels["budget"].removeprefix("retained_"), record.labels["method"]] = row
    return rows


def table(rows: Mapping[tuple[str, str], Mapping[str, float]], whose: str) -> list[str]:
    """A line a method, those of the largest retention of three first."""
    lines = []
    for keep in dict.fromkeys(keep for keep, _ in rows):
        if (dense := rows.get((keep, "Dense FP"))) is None:
            continue
        kept = {method: (retention(dense, row, SCORES[:1]), row) for (k, method), row in rows.items() if k == keep}
        for method, (three, row) in sorted(kept.items(), key=lambda item: -item[1][0]):
            five = f"{row['Q. Ret.']:.3f}" if "Q. Ret." in row else ""
            numbers = [f"{row[key]:.2f}" for key in TEXTS] + [f"{row['MCQ Avg.']:.3f}", five, f"{three:.3f}"]
            lines.append(f"| {keep} | {method} | {whose} | {' | '.join(numbers)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="arena/llama31_8b, arena/qwen3_8b or offline/arena")
    name = parser.parse_args().experiment
    print("| keep (%) | method | whose | WT2 | C4 | choices | Q. Ret. | of three |\n" + "|---|---|---|" + "---:|" * 5)
    theirs = table(published(MODELS[name]), "published") if name in MODELS else []
    print("\n".join([*theirs, *table(measured(name), "ours")]))


if __name__ == "__main__":
    main()
