"""Tiny Llama models, their packages' stand-ins and no network."""

import json
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers import config
from recombine import UsageError, data, models
from recombine.data.language import choices, instructions, text
from recombine.models import causal_lm


def build(**overrides) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build(**config("tiny_llama", **overrides)).eval()


def line(function, *args, **kwargs) -> str:
    """The one line that this is refused with."""
    with pytest.raises(UsageError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def tiny_llama():
    return build()


@pytest.fixture(scope="module")
def byte_tokenizer():
    return causal_lm.byte_tokenizer()


@pytest.fixture
def offline(monkeypatch):
    """Any connection fails, at once."""

    def refuse(*_, **__):
        raise OSError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def toy_packages(monkeypatch):
    """Articles, senses and questions in the place of the packages'."""
    named = {"test": "abcdefgh", "val": "ijklmnop", "train": "qrstuvwxyz"}
    made = {
        split: [
            {"title": 3 * c, "extract": f"{c}{c} is a letter. " * 9, "description": f"{c} {i}", "topic": "Letters"}
            for i, c in enumerate(letters)
        ]
        for split, letters in named.items()
    }
    made["test"] += [
        {"title": town, "extract": town, "description": f"Capital and largest city of {land}", "topic": "Uncategorized"}
        for town, land in (("Aa", "Oz"), ("Bb, Uz", "the Uz"), ("Cc", "Iz"), ("Dd", "Ez"))
    ]
    made["train"] += [
        {"title": land, "extract": land, "description": "Island country in a sea", "topic": "Uncategorized"}
        for land in ("Oz", "Uz", "Iz", "Ez")
    ]
    words = [(f"{3 + i % 2:02}", [f"n{chr(97 + i // 26)}{chr(97 + i % 26)}"], f"thing {i}", []) for i in range(60)]
    monkeypatch.setattr(choices, "articles", lambda: made)
    monkeypatch.setattr(choices, "senses", lambda: [("00", ["adjective"], "no noun", []), *words])
    monkeypatch.setattr(text, "sentences_of", lambda source: {f"{source} has {i} opinions.": 0.0 for i in range(40)})
    monkeypatch.setattr(text, "PORTION", 3)
    monkeypatch.setattr(choices, "WORDS", {"test": 8, "val": 4, "train": 10})
    monkeypatch.setattr(instructions, "gsm8k", lambda: [{"question": "1 + 1?", "answer": "two\n#### 1,002"}] * 3)
    for cached in (choices.items, choices.nouns):
        cached.cache_clear()
    yield
    for cached in (choices.items, choices.nouns):
        cached.cache_clear()


def loaded(name: str, tokenizer, **kwargs):
    module = data.build(name, **kwargs)
    module.tokenizer = tokenizer
    module.prepare_data()
    module.setup()
    return module


def rows(count: int) -> list[dict]:
    """As commonsense_170k has them."""
    return [
        {
            "instruction": f"Please answer the following question with true or false, question: {i}?",
            "input": "",
            "output": f"the correct answer is {str(i % 2 == 0).lower()}",
            "answer": str(i % 2 == 0).lower(),
        }
        for i in range(count)
    ]


def write(path: Path, found: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(found), path)
    else:
        path.write_text(json.dumps(found))
    return path
