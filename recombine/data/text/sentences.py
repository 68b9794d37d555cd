"""Real sentence tasks out of packages: what GLUE's kinds of task are, without a hub. None of them is a GLUE task.

    sentiment    movie sentences, people's mean rating at least 0.5 away from neutral: negative or positive
    sentiment_{tweets,amazon,nyt}   shift: trained on the movie sentences, tested on another source's
    rating       the mean rating itself, -4 to 4, of all movie sentences: regression
    gloss_match  a WordNet definition and an example sentence: are they of the same sense?

The sentences and ratings are VADER's (ICWSM 2014). The movie sentences come from the collection that SST was made of,
so neither is independent of the other; ids do not tell reviews apart, so one review may be in train and in test.

In gloss_match every definition and every example comes once in a matching pair and once in another, within one split
and one lexicographer file (noun.animal, verb.motion ...), so that neither alone says anything; a definition and its
example share no word stem, which alone would score 65 %. Senses are split by word: none of train is in val or test.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections import Counter

import numpy as np

from recombine.data.base import require_known
from recombine.data.sampling import shuffled
from recombine.data.text.base import TextData, TextSource
from recombine.data.text.tokenised import Row
from recombine.errors import UsageError
from recombine.runtime.archives import read, read_many
from recombine.runtime.assets import ASSETS, cache_dir, fetch
from recombine.runtime.kinds import Word

SIZES = {"train": 4000, "val": 1000, "test": 2000}  # rows; an epoch of minilm is a minute or two on two cores
VADER = {  # source -> its files
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
}
ARCHIVE = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
NEUTRAL = 0.5  # a mean rating nearer to 0 than this is neither negative nor positive
PARTS = ("noun", "verb", "adj", "adv")
SUITE = ("sentiment", "rating", "gloss_match")
SHIFTS = tuple(f"sentiment_{source}" for source in VADER if source != "movies")
PINS = {  # task -> the first 16 digits of sha256(train + val + test), each a sha256 of sentences and labels
    "sentiment": "fdc212a8f2e377a5",
    "rating": "d3c01cbe043e74d3",
    "gloss_match": "5955af9c24b14b93",
    "sentiment_tweets": "508a47b1ff7cad61",
    "sentiment_amazon": "33c6ae73cc3745ec",
    "sentiment_nyt": "b8ae258e923a4dd1",
}


class Sentences(TextData):
    """A task of SUITE or SHIFTS. Splits are the same for every seed."""

    name = "sentences"
    task_labels = {"gloss_match": "gloss match"} | {
        f"sentiment_{source}": f"sentiment, tested on {source}" for source in ("tweets", "amazon", "nyt")
    }
    suite = {"sentiment": "single", "rating": "single", "gloss_match": "pair"}

    def __init__(self, *, task: Word, **kwargs):
        require_known("data.task", "sentences task", task, (*SUITE, *SHIFTS))
        super().__init__(task=task, **kwargs)
        self.group = "shift" if task in SHIFTS else self.suite[task]
        self.classes = {"rating": None, "gloss_match": ["other", "same"]}.get(task, ["negative", "positive"])
        self.scores = ("pearson", "spearman") if task == "rating" else ("acc", "balanced_acc")

    @property
    def foreseen(self) -> dict[str, int]:
        return {split: min(size, self.limit or size) for split, size in SIZES.items()}

    def identity(self) -> str:
        return f"sentences {self.task} {PINS[self.task]}"

    def source(self) -> TextSource:
        if self.task == "gloss_match":
            return gloss_match()
        if self.task == "rating":
            return rating()
        return sentiment(self.task.removeprefix("sentiment").removeprefix("_") or "movies")

    def check(self, digests: dict[str, str]) -> None:
        digest = hashlib.sha256("".join(digests[split] for split in SIZES).encode()).hexdigest()[:16]
        if digest != PINS[self.task]:
            raise UsageError(
                f"{self.task}: sha256 of the splits is {digest}, expected {PINS[self.task]}; remove "
                f"{cache_dir()}/texts and run again"
            )


def vader(source: str) -> dict[str, float]:
    """{sentence: mean rating in [-4, 4]}; a sentence that comes again keeps its first rating."""
    with tarfile.open(fileobj=io.BytesIO(read(fetch("vader"), ARCHIVE))) as archive:
        raw = archive.extractfile(f"hutto_ICWSM_2014/{VADER[source]}_GroundTruth.txt").read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    ratings: dict[str, float] = {}
    for line in text.splitlines():
        if len(cells := line.split("\t", 2)) == 3:
            ratings.setdefault(cells[2].strip(), float(cells[1]))
    return ratings


def sentiment(source: str) -> TextSource:
    """Train and val from the movie sentences, test from the source's."""
    polar = {s: {t: r for t, r in vader(s).items() if abs(r) >= NEUTRAL} for s in {"movies", source}}
    splits = cut([((text,), int(r > 0)) for text, r in polar["movies"].items()], np.int64)
    if source != "movies":
        splits["test"] = cut([((text,), int(r > 0)) for text, r in polar[source].items()], np.int64)["test"]
    return TextSource(ASSETS["vader"].licence, splits, note(f"|mean rating| >= {NEUTRAL}, test on {source}"))


def rating() -> TextSource:
    """All movie sentences with their mean ratings."""
    splits = cut([((text,), r) for text, r in vader("movies").items()], np.float32)
    return TextSource(ASSETS["vader"].licence, splits, note("mean rating of all sentences"))


def note(what: str) -> str:
    """The note of a result on VADER's sentences."""
    return f"VADER's movie sentences (vaderSentiment 2.5), {what}; kin of SST, not independent of it"


def cut(rows: list[tuple[Row, float]], kind: type) -> dict[str, tuple[list[Row], np.ndarray]]:
    """test, val and train of SIZES, in this order, from one shuffled list; a short list gives a short test only."""
    order, splits = shuffled(len(rows), 2014).tolist(), {}
    for split in ("test", "val", "train"):
        mine, order = order[: SIZES[split]], order[SIZES[split] :]
        splits[split] = [rows[i][0] for i in mine], np.array([rows[i][1] for i in mine], kind)
    return {split: splits[split] for split in SIZES}


# WordNet


def senses() -> list[tuple[str, list[str], str, list[str]]]:
    """(lexicographer file, words, definition, examples) of every synset, in the order of the files."""
    members = {part: f"usr/share/wordnet/data.{part}" for part in PARTS}
    texts, synsets = read_many(fetch("wordnet"), members.values()), []
    for part in PARTS:
        for line in texts[members[part]].decode("latin-1").splitlines():
            if line.startswith("  "):  # the licence
                continue
            data, gloss = line.split(" | ", 1)
            fields = data.split(" ")  # offset, file, part of speech, words in hex, then word and sense number by turns
            words = [re.sub(r"\(\w+\)$", "", word).lower() for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            definition = re.split(r';\s*"', gloss)[0].strip(" ;")
            synsets.append((fields[1], words, definition, re.findall(r'"([^"]+)"', gloss)))
    return synsets


def stems(text: str) -> set[str]:
    """The first five letters of all words but the short ones."""
    return {word[:5] for word in re.findall(r"[a-z]{4,}", text.lower())}


def gloss_match() -> TextSource:
    """One example a synset, of three words or more, that shares no stem with the definition; none that comes twice."""
    known = senses()
    often = Counter(text for _, _, definition, examples in known for text in (definition, *examples))
    pool = []
    for file, words, definition, examples in known:
        fit = [e for e in examples if len(e.split()) >= 3 and often[e] == 1 and not stems(e) & stems(definition)]
        if fit and often[definition] == 1:
            pool.append((file, words, definition, fit[0]))
    splits, taken = {split: [] for split in SIZES}, {}
    for i in shuffled(len(pool), 1998):  # a sense goes where its words are already, else where most is missing
        file, words, *pair = pool[i]
        where = {taken[word] for word in words if word in taken}
        if len(where) > 1:
            continue  # it would join two splits
        split = where.pop() if where else min(SIZES, key=lambda s: len(splits[s]) / SIZES[s])
        splits[split].append((file, *pair))
        taken |= dict.fromkeys(words, split)
    rows = {split: pairs(triples, SIZES[split] // 2) for split, triples in splits.items()}
    return TextSource(ASSETS["wordnet"].licence, rows, "WordNet 3.0, made into pairs")


def pairs(senses: list[tuple[str, str, str]], count: int) -> tuple[list[Row], np.ndarray]:
    """`count` senses (file, definition, example) -> each with its example, and each with the next one's of its file."""
    files = Counter(file for file, *_ in senses)
    senses = sorted([s for s in senses if files[s[0]] > 1][:count], key=lambda s: s[0])
    files = Counter(file for file, *_ in senses)
    senses = [s for s in senses if files[s[0]] > 1]
    rows: list[tuple[Row, int]] = []
    for i, (file, definition, example) in enumerate(senses):
        after = i + 1 if i + 1 < len(senses) and senses[i + 1][0] == file else i + 1 - files[file]
        rows += [((definition, example), 1), ((definition, senses[after][2]), 0)]
    order = shuffled(len(rows), 30)
    return [rows[i][0] for i in order], np.array([rows[i][1] for i in order], np.int64)
