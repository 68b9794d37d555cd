"""The table of all methods in docs/methods.md, made from conf/method/*.yaml and the docstrings of recombine/methods.

python scripts/docs_methods.py             writes the table between its two markers
python scripts/docs_methods.py --check     exit code 1 and one line if the page is out of date
"""

import ast
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/methods.md"
BEGIN, END = "<!-- methods: begin, made by scripts/docs_methods.py -->", "<!-- methods: end -->"
PAPER = r"(?:arXiv )?(\d{4}\.\d{5}|ICLR \d{4}|ICML \d{4}|\w+ & \w+ \d{4})"  # an arXiv id, a venue, or authors and year


class Source(NamedTuple):
    """Where a class is defined."""

    path: Path
    module: str  # the module's docstring
    own: str  # the class's docstring


def table() -> str:
    """The Markdown table, one row a file of conf/method."""
    classes, rows = sources(), []
    choices = {path.stem: path.read_text() for path in sorted((ROOT / "conf/method").glob("*.yaml"))}
    targets = {name: yaml.safe_load(text)["_target_"].rpartition(".")[2] for name, text in choices.items()}
    users = Counter(classes[target].path for target in targets.values())
    for name, text in choices.items():
        source = classes[targets[name]]
        comment = text.partition("\n")[0].removeprefix("#")
        # a module that serves several methods says what they have in common; the YAML's comment tells them apart
        sentence = first_sentence(source.module if users[source.path] == 1 else comment)
        link = f"[{targets[name]}](../{source.path.relative_to(ROOT)})"
        rows.append(f"| `{name}` | {link} | {sentence} | {paper(name, comment, source)} |")
    head = ["| `method=` | class | what it is | source |", "|---|---|---|---|"]
    return "\n".join(head + rows)


def sources() -> dict[str, Source]:
    """{class name: Source} of all classes under recombine/methods; nothing is imported."""
    found = {}
    for path in sorted((ROOT / "recombine/methods").rglob("*.py")):
        tree = ast.parse(path.read_text())
        module = ast.get_docstring(tree) or ""
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = Source(path, module, ast.get_docstring(node) or "")
    return found


def first_sentence(text: str) -> str:
    """The first sentence on one line, without the source in brackets at its end."""
    line = re.sub(rf" \((?:{PAPER}|[^()]*\bEq\.)[^()]*\)", "", " ".join(text.split()))
    return re.match(r".*?(?:\.(?=\s)|$)", line).group().replace("|", r"\|")


def paper(name: str, comment: str, source: Source) -> str:
    """The source of a method: the one after its name in a docstring, else the first of its YAML or its class."""
    for text in (comment, source.own):
        if match := re.search(rf"\({PAPER}", " ".join(text.split())):
            return linked(match.group(1))
    line = " ".join(source.module.split())
    papers = {re.sub(r"\W", "", word).lower(): id for word, id in re.findall(rf"([\w-]+) \({PAPER}", line)}
    words = name.replace("_", "")
    found = papers.get(words) or next((id for word, id in papers.items() if words.endswith(word)), None)
    if found is None and (match := re.search(rf"\({PAPER}", line)):
        found = match.group(1)
    return linked(found) if found else "–"


def linked(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if re.match(r"\d{4}\.", paper) else paper


def page(text: str) -> str:
    """The page with a fresh table."""
    before, _, rest = text.partition(BEGIN)
    assert END in rest, f"{PAGE} lacks its markers: {BEGIN} and {END}"
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str]) -> int:
    text = PAGE.read_text()
    new = page(text)
    if "--check" not in arguments:
        PAGE.write_text(new)
    elif new != text:
        print(f"{PAGE.name} is out of date: run python scripts/docs_methods.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
