"""The tables that a run and a suite end with, for the terminal."""

from pathlib import Path

from recombine import results
from recombine.result_schema import AccountPart, DataPart, MethodPart, Result, Suite

TITLES = {("vtab", "cifar"): "CIFAR-100"}  # tasks whose name misleads; a result's data.title goes before
WORDS = {  # keys of a result -> how a table calls them
    "acc": "accuracy",
    "balanced_acc": "balanced accuracy",
    "acc_norm": "accuracy by length-normalised likelihood",
    "ppl": "perplexity",
    "mcc": "Matthews correlation",
    "f1": "F1",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "exact_match": "exact match",
    "tasks_mean": "mean of the tasks",
    "dino": "DINO similarity to the subject",
    "dino_prior": "of the class to what was drawn before",
    "dino_leak": "of the class to the subject",
    "clip_i": "CLIP similarity to the subject",
    "clip_t": "CLIP similarity to the prompt",
    "setup": "set-up",
    "probe": "linear probe",
    "retrofit": "rewriting",
    "train_best": "training",
    "train_distilled": "distillation",
}
PLAIN = ("loss", "ppl")  # scores that are no shares


def summary_table(result: Result, path: Path) -> str:
    """The table of one run. Results of older versions, which lack some keys, can be shown too."""
    rows = [("stage", f"{result['stage']}, seed {result['seed']}")]
    if result["test"]:
        rows.append(("protocol", result["data"]["protocol"]))
    if result["budget"] != "none":
        rows.append(("budget", result["budget"]))
    rows += [*score_rows(result), *comparison_rows(result), *cost_rows(result["account"])]
    rows += [
        ("seconds", ", ".join(f"{worded(part)} {value:.1f}" for part, value in result["seconds"].items())),
        ("result", str(path)),
        ("again with", result["command"]),
    ]
    rows += [("note", note) for note in result.get("notes", [])]
    method = result["method"]
    if result["account"]["retained"] > 1.01 and method and method.get("compresses"):
        rows.append(("note", "the target layers store more than dense: these ranks adapt, they do not compress"))
    return f"{heading(result)}, data {data_title(result['data'])}\n{results.table(rows)}"


def suite_table(summary: Suite, result: Result, path: Path) -> str:
    """The table of a suite: a row a task, then the means. result: of one of its tasks."""
    data, tasks = result["data"], [(g, t, v) for g, found in summary["tasks"].items() for t, v in found.items()]
    rows = [(f"{group}: {task_title(data['name'], task)}", percent(value)) for group, task, value in tasks]
    rows += [(f"mean of {group}", percent(value)) for group, value in summary["groups"].items()]
    rows += [
        ("mean of the groups", percent(summary["mean"])),
        ("mean of the tasks", percent(summary["mean_of_tasks"])),
        ("result", str(path)),
    ]
    return f"{heading(result)}, data {data['name']}, test scores of {len(tasks)} tasks in %\n{results.table(rows)}"


def heading(result: Result) -> str:
    """What a table is about, for example "svd + lora on dinov2_s14"."""
    parts = [label(part) for part in (result["compressor"], result["method"]) if part]
    return f"{' + '.join(parts) or 'original'} on {result['model']['name']}"


def label(part: MethodPart) -> str:
    """What the user called a method; its class in results of versions that did not write that down."""
    return part.get("label") or part["name"].lower()


def data_title(data: DataPart) -> str:
    """The data and its task, for example "offline: dsprites_loc". A folder of the user's has no task."""
    name, task = data["name"], data["task"]
    return data.get("title") or (name if task in (None, name) else f"{name}: {task_title(name, task)}")


def task_title(name: str, task: str) -> str:
    """The name of a task as a reader knows it."""
    return TITLES.get((name, task), task)


def worded(key: str) -> str:
    """A key of a result in words: acc is accuracy, copa/acc is copa accuracy."""
    task, _, last = key.rpartition("/")
    return f"{task} {WORDS.get(last, last)}".strip()


def number(value: float | None) -> float:
    """A number of a result.json as a float; nan for null, which stands for nan."""
    return float("nan") if value is None else value


def percent(share: float | None) -> str:
    """A share in per cent: 0.1234 as "12.3"."""
    return f"{100 * number(share):.1f}"


def score_rows(result: Result) -> list[tuple[str, str]]:
    """The test scores, the one that validation goes by first, and that of the linear probe."""
    rows = []
    if shown := {key: value for key, value in result["test"].items() if "stderr" not in key}:
        first = result["metric"]  # the score that validation chose the weights by
        shown = {key: shown[key] for key in sorted(shown, key=lambda key: (key != first, key == "loss"))}
        values = {key: f"{number(v):.3g}" if key in PLAIN else f"{percent(v)} %" for key, v in shown.items()}
        rows.append(("test", ", ".join(f"{worded(key)} {value}" for key, value in values.items())))
    if (linear := result["linear_probe"]) and linear["test"] is not None:
        rows.append(("linear probe, same data", f"{percent(linear['test'])} %"))
    return rows


def comparison_rows(result: Result) -> list[tuple[str, str]]:
    """How far the model is from the original one, and how fast it is beside the reference."""
    rows = []
    if errors := result.get("weight_error"):
        errors = {layer: number(error) for layer, error in errors.items()}
        worst, mean = max(errors, key=errors.get), sum(errors.values()) / len(errors)
        rows.append(("relative weight error", f"mean {mean:.2g}, worst {errors[worst]:.2g} ({worst})"))
    if "logit_error" in result:
        rows.append(("logit error", f"{number(result['logit_error']):.2g} of {number(result['logit_scale']):.3g}"))
    if speed := result.get("profile"):
        for kind in ("train", "infer"):
            if (ratio := speed["ratio"][kind]) is not None:
                value = f"{speed[f'{kind}_samples_s']:.1f} samples a second, {ratio:.2f} times the reference"
                rows.append((kind, value))
    return rows


def cost_rows(account: AccountPart) -> list[tuple[str, str]]:
    """Parameters, memory and operations."""
    mib = {key: account[f"bytes_{key}"] / 2**20 for key in ("weights", "gradients", "optimizer")}
    memory = " + ".join(f"{key} {value:.1f}" for key, value in mib.items())
    without = {key: f"({account[f'{key}_without_head']:,} without the head)" for key in ("trained", "stored")}
    layers, model = percent(account["retained"]), percent(account["retained_total"])
    return [
        ("trained", f"{account['trained']:,} parameters {without['trained']}"),
        ("stored", f"{account['stored']:,} parameters {without['stored']}"),
        ("retained", f"{layers} % of the target layers, {model} % of the model"),
        ("MiB to train", f"{memory} = {account['memory_mib']:.1f}"),
        ("GFLOPs a sample", "not measured" if account["flops"] is None else f"{account['flops'] / 1e9:.3f}"),
    ]
