"""The packaged text tasks."""

import pytest

from helpers import refusal
from helpers.texts import ready
from recombine import data
from recombine.data.text import sentences


@pytest.mark.parametrize("task", [*sentences.SUITE, *sentences.SHIFTS])
def test_packaged_tasks_are_the_pinned_ones(task, cache, packages, tokenizer, monkeypatch):
    packages("wordnet" if task == "gloss_match" else "vader")
    module = ready(data.build("sentences", task=task), tokenizer)  # refuses another sha256 by itself
    assert [len(module.train), len(module.val), len(module.test)] == pytest.approx([4000, 1000, 2000], rel=0.02)
    assert module.info["shared_train_test"] == 0 and module.info["licence"]
    if module.classes:
        assert all(0.3 < part.labels.mean() < 0.75 for part in (module.train, module.val, module.test))
    monkeypatch.setitem(sentences.PINS, task, "0" * 16)
    assert "expected 0000000000000000" in refusal(ready, data.build("sentences", task=task), tokenizer)


def test_gloss_match_has_no_one_sided_answer(packages):
    packages("wordnet")
    source = sentences.gloss_match()
    for rows, labels in source.splits.values():
        for side in range(2):  # every definition and every example: once in a match, once not
            seen = {}
            for row, label in zip(rows, labels, strict=True):
                seen.setdefault(row[side], []).append(label)
            assert all(sorted(found) == [0, 1] for found in seen.values())
        matches = [row for row, label in zip(rows, labels, strict=True) if label]
        assert not any(sentences.stems(definition) & sentences.stems(example) for definition, example in matches)
    apart = [{part for row in rows for part in row} for rows, _ in source.splits.values()]
    assert not apart[0] & apart[1] and not apart[0] & apart[2] and not apart[1] & apart[2]
    truth = {(definition, example) for _, _, definition, examples in sentences.senses() for example in examples}
    rows, labels = source.splits["test"]
    assert all((row in truth) == bool(label) for row, label in zip(rows, labels, strict=True))
