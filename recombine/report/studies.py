"""What the READMEs under experiments/ say: a folder's study, and the sentences about an experiment and its plots.

A folder `experiments/<name>/` is a study once it has a README.md. The page reads of it

    # Title                     # the first heading
    ![what it shows](x.svg)     # the first SVG, whose text is the sentence that it proves; or else
    x.csv                       # the first CSV with the columns `method` and `accuracy`, and `low` and `high` if there
                                # are intervals: drawn as bars
    ## Findings                 # its list; the first three stand on the first screen
    - A sentence. More.

The first of `LEADS` that has a picture and findings leads the page; the other studies are folded below. Of an
experiment with a table, a paragraph or an item of a list that links to a file of its evidence says what is known of it,
and the sentence that links to a plot is the plot's caption.
"""

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from recombine.report import records

LEADS = ("leaderboard", "compressors")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z*\[`\"])")
LEAD_IN = re.compile(r"^\*\*[^*]+\*\*[^:]*:\s*")  # **Tab. 8** ([table](...), two sentence tasks):


@dataclass(frozen=True)
class Study:
    """A folder with a README. Texts are Markdown as they stand there, each on one line."""

    folder: Path
    title: str
    text: str

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def blocks(self) -> list[str]:
        return blocks(self.text)

    @property
    def intro(self) -> str:
        """The first sentence below the title."""
        plain = (block for block in self.blocks if not block.startswith(("#", "|", "-", "<", "!", "*")))
        return sentences(next(plain, ""))[0]

    @property
    def findings(self) -> list[str]:
        """The items of the list under `## Findings`."""
        _, _, below = self.text.partition("\n## Findings\n")
        found = []
        for block in blocks(below):
            if block.startswith("#"):
                break
            found += [block[2:]] if block.startswith("- ") else []
        return found

    @cached_property
    def picture(self) -> tuple[Path, str] | None:
        """(an SVG or a CSV, what it shows); None: there is neither."""
        for _, caption, target in (link for link in LINK.findall(self.text) if link[0]):
            if target.endswith(".svg") and (path := self.folder / target).is_file():
                return path, caption
        for path in sorted(self.folder.glob("*.csv")):
            with path.open(newline="") as file:
                if {"method", "accuracy"} <= set(next(csv.reader(file), ())):
                    return path, self.title
        return None


@dataclass
class Said:
    """What the READMEs say of one experiment. captions: name of a plot -> a sentence; base: where links start from."""

    texts: list[str] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)
    base: Path = Path()


def studies() -> list[Study]:
    """Every folder under experiments/ with a README, by name."""
    return list(filter(None, (study(path.parent) for path in sorted(records.EVIDENCE.glob("*/README.md")))))


def study(folder: Path) -> Study | None:
    """A folder's study; None where it has no README with a title."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    title = re.search(r"^# (.+)$", text, flags=re.M)
    return Study(folder, title[1], text) if title else None


def lead(found: Iterable[Study]) -> Study | None:
    """The study of the first screen."""
    ready = {study.name: study for study in found if study.findings and study.picture}
    return next((ready[name] for name in LEADS if name in ready), None)


def said(found: Iterable[Study]) -> dict[str, Said]:
    """Experiment -> what the studies say of it."""
    about: dict[str, Said] = {}
    for study in found:
        for block in study.blocks:
            if not block.startswith(("#", "|")):
                note(about, block, study.folder)
    return about


def note(about: dict[str, Said], block: str, base: Path) -> None:
    """Adds a paragraph to what is said of the experiments that it links to."""
    block = block.removeprefix("- ")
    begin = found.end() if (found := LEAD_IN.match(block)) else 0
    parts = sentences(block[begin:])
    places = [(parts[0], block[:begin]), *((part, part) for part in parts)]  # (caption, where its link stands)
    for name in dict.fromkeys(filter(None, (linked(target, base)[0] for _, _, target in LINK.findall(block)))):
        one = about.setdefault(name, Said(base=base))
        one.texts.append(block)
        for caption, where in places:
            for experiment, plot in (linked(target, base) for _, _, target in LINK.findall(where)):
                if experiment == name and plot:
                    one.captions[plot] = LINK.sub(r"\2", caption)


def linked(target: str, base: Path) -> tuple[str | None, str | None]:
    """(experiment, name of its plot) of a link to a file of its evidence, as ../offline/crisp_fig03/accuracy.svg."""
    path = (base / target.split("#")[0]).resolve()
    if "://" in target or not path.is_relative_to(records.EVIDENCE.resolve()):
        return None, None
    name = path.parent.relative_to(records.EVIDENCE.resolve()).as_posix()
    if "/" not in name:
        return None, None
    return name, path.stem if path.suffix == ".svg" else None


def blocks(text: str) -> list[str]:
    """Paragraphs, headings, items of lists and tables, each on one line; without what is indented as code."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if not line.strip() or line.startswith("    "):
            found.append([])
        elif line.startswith(("- ", "#", "```")):
            found.append([line])
        else:
            found[-1].append(line.strip())
    return [" ".join(lines) for lines in found if lines]


def sentences(block: str) -> list[str]:
    """A paragraph's sentences; at least one, which may be empty."""
    return SENTENCE.split(block)
