"""Scores of a language model in memory, recombined or not: lm-evaluation-harness, and perplexity.

Local tasks (LOCAL) are the YAML files of ``recombine/data/tasks`` on documents out of packages; they never touch the
network. COMMONSENSE are lm-eval's own names of the eight sets of CRISP Tab. 3 and JACTUS, whose data lm-eval takes from
the hub, or from its cache. ``commonsense_<set>`` lets the model answer LLM-Adapters' test files, which the caller has.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import nn

from recombine.data.language import choices, instructions, prompts
from recombine.data.language.prompts import COMMONSENSE
from recombine.data.readers import table
from recombine.errors import UsageError, first_line
from recombine.runtime import progress
from recombine.training import objectives

TASKS = Path(__file__).parents[1] / "data" / "tasks"
LOCAL = (*choices.TASKS, "gsm8k_metamath")
FILES = {f"commonsense_{name}": name for name in prompts.ANSWERS}


def evaluate(
    model: nn.Module,
    tokenizer,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    root: str | Path | None = None,
) -> dict[str, float]:
    """Scores of a language model: {"task/metric": value}, with "task/metric_stderr" beside it. It keeps its mode.

    Args:
        tasks: names of LOCAL or FILES, or any that lm-eval knows, for example ["gsm8k_metamath", "hellaswag"].
        limit: documents a task; None: all.
        root: folder with LLM-Adapters' ``<set>/test.json``, for the tasks of FILES.

    Raises:
        UsageError: unknown task, or its data cannot be had.
    """
    from lm_eval.evaluator import evaluate as run  # seconds
    from lm_eval.models.huggingface import HFLM

    mode = model.training
    with silence_lm_eval():
        loaded = load(tasks, root)
        try:
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            report = run(lm, loaded, limit=limit, bootstrap_iters=1000, log_samples=False)
        finally:
            model.train(mode)
    scores = {}
    for task, row in report["results"].items():
        for key, value in row.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, int | float) and kind:
                scores[f"{task}/{metric}" + ("" if kind == "none" else f"/{kind}")] = float(value)
    return scores


@torch.no_grad()
def perplexity(model: nn.Module, samples, *, batch_size: int = 8, limit: int | None = None) -> float:
    """The perplexity: exp of the mean negative log-likelihood over all tokens with a label. The model keeps its mode.

    Args:
        samples: a split of a language data module.
        limit: how many samples; None: all.
    """
    mode, device, total, count = model.training, next(model.parameters()).device, 0.0, 0
    model.eval()
    try:
        indices = list(range(min(len(samples), limit or len(samples))))
        for start in progress.of(range(0, len(indices), batch_size), "perplexity", "batches"):
            batch = {k: v.to(device) for k, v in samples.__getitems__(indices[start : start + batch_size]).items()}
            logits, labels = objectives.call(model, batch)[:, :-1].float(), batch["labels"][:, 1:]
            total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum").item()
            count += (labels != -100).sum().item()
    finally:
        model.train(mode)
    return float(torch.tensor(total / max(count, 1), dtype=torch.float64).exp())


# Tasks


def load(names: Sequence[str], root: str | Path | None = None) -> dict:
    """Tasks as lm-eval's `evaluate` takes them.

    Raises:
        UsageError: there is no such task, or its data cannot be had.
    """
    remote = require_known(names, root)
    manager, loaded = index(bool(remote)), {}
    for name in names:
        if name in remote:
            try:
                loaded |= manager.load([name])["tasks"]
            except Exception as error:  # the transport's own errors, which differ between the client's versions
                ways = f"connect once, or set HF_HOME to a filled cache, or take a local task: {', '.join(LOCAL)}"
                raise UsageError(
                    f"task {name}: its data is not cached and the hub fails ({first_line(error)}): {ways}"
                ) from error
        else:
            loaded |= manager.load([local(name, root)])["tasks"]
    for task in loaded.values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=1234)  # as lm-eval's command line
    return {"tasks": loaded}


def fetch(names: Sequence[str], root: str | Path | None) -> None:
    """Has the data of those tasks in the cache that are lm-eval's own: what cannot be had is said before a run begins.

    Raises:
        UsageError: as `load` does.
    """
    if remote := require_known(names, root):
        with silence_lm_eval():
            load(remote)


def require_known(names: Sequence[str], root: str | Path | None) -> list[str]:
    """Refuses a task that there is not, before any of them is loaded. Returns those that are lm-eval's own.

    Raises:
        UsageError: names the nearest task, or the folder that lacks its file.
    """
    remote = [name for name in names if name not in LOCAL and name not in FILES]
    for name in names:
        if name in FILES:
            require_file(name, root)
    for name in remote:
        if name not in spelled() or name not in index(True).all_tasks:
            alike = [known for known in spelled() if known[:2] == name[:2]]
            close = get_close_matches(name, [*LOCAL, *FILES], 1) or get_close_matches(name, alike, 1, 0.8)
            hint = f"did you mean {close[0]}? " if close else ""
            local = ", ".join(LOCAL)
            raise UsageError(
                f"harness.tasks=[{name}]: there is no such task; {hint}choose from {local}, or any of lm-eval's"
            )
    return remote


def require_file(name: str, root: str | Path | None) -> Path:
    """The file of one of LLM-Adapters' tests.

    Raises:
        UsageError: the folder lacks it, or is not given.
    """
    path = None if root is None else Path(root).expanduser() / FILES[name] / "test.json"
    if path is None or not path.is_file():
        raise UsageError(
            f"task {name}: no {path or 'root'}: give the folder of LLM-Adapters' dataset/, or take {COMMONSENSE[0]}"
        )
    return path


@cache
def spelled() -> frozenset[str]:
    """Every word that could be the name of one of lm-eval's tasks: the last ones of the lines of its task files.

    These are all names and many other words. They are read in a second, where lm-eval's index takes twenty.
    """
    from lm_eval import tasks

    last = re.compile(r"""[^\s"',\[\]{}:#]+(?=["'\],]*\s*(?:#.*)?$)""", re.MULTILINE)
    files = [path for path in Path(tasks.__file__).parent.rglob("*") if path.suffix in ("", ".yaml", ".yml")]
    return frozenset(word for path in files if path.is_file() for word in last.findall(path.read_text("utf-8")))


@cache
def index(defaults: bool):
    """lm-eval's task manager. defaults: it knows lm-eval's own tasks, which are thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def local(name: str, root: str | Path | None) -> dict:
    """A local task as lm-eval takes it: its YAML with its documents."""
    if name in FILES:
        config = yaml.safe_load((TASKS / "commonsense.yaml").read_text()) | {"task": name}
        config["filter_list"][0]["filter"][0]["regex_pattern"] = prompts.ANSWERS[FILES[name]]
    else:
        config = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    return config | {"custom_dataset": documents(name, root)}


def documents(name: str, root: str | Path | None) -> Callable:
    """The documents of a local task: each has a prompt and an answer, and options where it is multiple choice."""
    if name in choices.TASKS:
        ask = prompts.CHOICES[name].format
        rows = [{"prompt": ask(item["question"]), **item} for item in choices.items(name, "test")]
    elif name in FILES:
        path = require_file(name, root)
        tests = table([path], ("instruction", "answer"), str(path))
        rows = [{"prompt": prompts.alpaca(row["instruction"]), "answer": row["answer"]} for row in tests]
    else:
        rows = [
            {"prompt": prompts.metamath(row["question"]), "answer": row["answer"].split("#### ")[1].replace(",", "")}
            for row in instructions.gsm8k()
        ]

    def dataset(**_):
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    return dataset


@contextmanager
def silence_lm_eval():
    """Silences lm-eval's warnings, and its bars where `trainer.progress=false`."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with progress.bars_as_wanted():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
