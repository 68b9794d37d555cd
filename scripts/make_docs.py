"""The pages of docs/ that are made from the code.

python scripts/make_docs.py                  writes all of them
python scripts/make_docs.py result           writes docs/result.md
python scripts/make_docs.py --check          exit code 1 and one line for each page that is out of date
"""

import argparse
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NotRequired, get_args, get_origin, get_type_hints, is_typeddict

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the schema of this checkout, installed or not

from recombine import result_schema as schema  # noqa: E402
from scripts import docs_methods  # noqa: E402

HEAD = """# result.json

<!-- made by `python scripts/make_docs.py result` from recombine/result_schema.py: edit that file, not this one -->

A run ends with one file, `result.json`, in its folder. It says what was asked for, what came out, what the model costs,
and on what machine and commit it ran. This page lists its keys.

- **Type** is Python's. JSON has no nan, so it is written as `null` (`None` here). An infinity is written as `1e999` or
  `-1e999`, which is valid JSON: Python and JavaScript read it back as an infinity.
- **Written by** names the parts of a run that may write the key: stages (`adapt`, `compress`, `joint`, `evaluate`,
  `sample`, `retrofit`, `profile`), the `analysis` after the stage, or the `runner` around both. A run has one stage.
  Where the runner is named beside stages, it writes the key if the stage did not. No part overrides what another
  wrote: that is an error.
- A key marked *optional* is left out where it does not apply. Results of older versions may lack other keys too.

A suite (`data.task=all`) writes `suite.json` beside the folders of its tasks. Its keys are at the end of this page.

```python
import json

result = json.load(open("outputs/<date>/<run>/result.json"))
print(result["method"]["label"], result["test"][result["metric"]], result["account"]["trained"])
```
"""


def result_page() -> str:
    """docs/result.md: a table of the whole file, and one of each part of it."""
    lines = [HEAD, "## The keys", ""]
    places = parts_of(schema.Result)
    lines += table(schema.Result, places)
    for part, paths in places.items():
        lines += ["", f"## {title(paths)}", "", inspect.getdoc(part), "", *table(part, places)]
    lines += ["", "## suite.json", "", inspect.getdoc(schema.Suite), "", *table(schema.Suite, places)]
    return "\n".join(lines) + "\n"


def parts_of(whole: type, prefix: str = "") -> dict[type, list[str]]:
    """The TypedDicts below one, in the order of its keys, each with the dotted keys that it lies at."""
    found: dict[type, list[str]] = {}
    for key, hint in get_type_hints(whole).items():
        for part in filter(is_typeddict, [hint, *get_args(hint)]):
            found.setdefault(part, []).append(prefix + key)
            for inner, paths in parts_of(part, f"{prefix}{key}.").items():
                found.setdefault(inner, []).extend(paths)
    return found


def table(part: type, places: dict[type, list[str]]) -> Iterator[str]:
    """The Markdown table of a TypedDict's keys."""
    keys = {key: get_args(hint) for key, hint in get_type_hints(part, include_extras=True).items()}  # (type, Key)
    columns = ["key", "type", "unit", "meaning"]
    if any(fact.by for _, fact in keys.values()):
        columns.insert(3, "written by")
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for key, (hint, fact) in keys.items():
        optional = get_origin(hint) is NotRequired
        kind = type_name(get_args(hint)[0] if optional else hint, places) + (", optional" if optional else "")
        cells = {"key": f"`{key}`", "type": kind, "unit": fact.unit, "meaning": fact.meaning}
        cells["written by"] = ", ".join(fact.by)
        yield f"| {' | '.join(cells[column].replace('|', '&#124;') for column in columns)} |"


def type_name(hint: Any, places: dict[type, list[str]]) -> str:
    """A type as Python writes it, a part as a link to its table."""
    if is_typeddict(hint):
        paths = places[hint]
        anchor = re.sub(r"[^\w -]", "", title(paths).lower()).replace(" ", "-")  # as GitHub makes it
        return f"[{paths[0]}](#{anchor})"
    if get_origin(hint) is types.UnionType:
        return " or ".join(type_name(one, places) for one in get_args(hint))
    if arguments := get_args(hint):
        return f"{get_origin(hint).__name__}[{', '.join(type_name(one, places) for one in arguments)}]"
    return "None" if hint is types.NoneType else hint.__name__


def title(paths: list[str]) -> str:
    """The heading of a part's table."""
    return " and ".join(f"`{path}`" for path in paths)


def methods_page() -> str:
    """docs/methods.md: the page as it stands, with a fresh table of all methods."""
    return docs_methods.page(docs_methods.PAGE.read_text())


PAGES: dict[str, Callable[[], str]] = {"methods": methods_page, "result": result_page}  # docs/<name>.md


def main(arguments: list[str]) -> int:
    """Writes or checks pages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help=f"of {', '.join(PAGES)}; none: all")
    parser.add_argument("--check", action="store_true", help="write nothing")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.pages) - PAGES.keys():
        parser.error(f"there is no page {unknown.pop()}: choose from {', '.join(PAGES)}")
    old = []
    for name in asked.pages or PAGES:
        path, text = ROOT / "docs" / f"{name}.md", PAGES[name]()
        if not asked.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            old.append(name)
            print(f"docs/{name}.md is out of date: run python scripts/make_docs.py {name}", file=sys.stderr)
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
